"""Distributes requests over the replicas of a model and scores texts with them.

Rank 0 runs the harness and sends out its requests; every replica answers its share. Requests travel over a gloo
group of all processes. All processes of a replica take part in its forward passes; the one that holds the results
answers.

`TextScorer` answers the harness's questions in its terms: texts in, log-likelihoods or texts out.
"""

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch.distributed as dist
from torch.distributed import ProcessGroup

from tide_mega.data.tokenizer import Tokenizer
from tide_mega.errors import BrokenReplicaError, EvaluationError
from tide_mega.lab.zero_shot.scorer import (
    Counts,
    Likelihood,
    Prompt,
    ReplicaScorer,
    Span,
    encode_pair,
    refuse_not_finite,
    windows,
)

log = logging.getLogger(__name__)

ROUND_CALLS = 8
"""Model calls of each replica between two synchronisations of all processes."""
SAY_EVERY = 15.0
"""Seconds between progress lines."""

_SCORE, _GENERATE, _DONE, _FAILED = "score", "generate", "done", "failed"


class Replicas:
    """One model on all processes. Rank 0 calls `score` and `generate`; the others `serve` meanwhile."""

    def __init__(self, scorer: ReplicaScorer, host: ProcessGroup) -> None:
        """Take this process's part of its replica, and a gloo group of all processes."""
        self.scorer, self.host = scorer, host

    def score(self, spans: Sequence[Span]) -> list[Likelihood]:
        """Score spans in any order; on rank 0, while all others serve.

        Raises:
            EvaluationError: a process failed, or a log-likelihood is not finite.
        """
        per_round = self.scorer.spans_at_once * ROUND_CALLS * self._number
        return self._ask(_SCORE, spans, [len(span.tokens) for span in spans], per_round)

    def generate(self, prompts: Sequence[Prompt]) -> list[str]:
        """Continue prompts; on rank 0, while all others serve."""
        lengths = [len(prompt.tokens) + prompt.most for prompt in prompts]
        return self._ask(_GENERATE, prompts, lengths, self.scorer.batch * self._number)

    @contextlib.contextmanager
    def leading(self) -> Iterator[None]:
        """Context around rank 0's requests: ends the others' `serve`, with the error if there is one."""
        try:
            yield
        except BrokenReplicaError:
            raise  # the others may be in any state; they end with this process
        except Exception as error:
            with contextlib.suppress(Exception):  # this fails too if a process has died
                self._broadcast((_FAILED, f"{type(error).__name__}: {error}"))
            raise
        self._broadcast((_DONE, None))

    def serve(self) -> None:
        """Answer rank 0's requests until it has no more.

        Raises:
            EvaluationError: rank 0 gave up; its message says why.
        """
        while True:
            kind, content = self._broadcast(None)
            if kind == _DONE:
                return
            if kind == _FAILED:
                raise EvaluationError(content)
            self._answer(kind, content)

    @property
    def _number(self) -> int:
        return self.scorer.model.groups.data_size

    def _ask(self, kind: str, items: Sequence[Any], lengths: Sequence[int], per_round: int) -> list[Any]:
        """Distribute items of similar length over the replicas in rounds, longest first: OOM shows early."""
        order = sorted(range(len(items)), key=lambda i: -lengths[i])
        results: list[Any] = [None] * len(items)
        said = time.monotonic()
        for first in range(0, len(order), per_round):
            chosen = order[first : first + per_round]
            shares = [chosen[replica :: self._number] for replica in range(self._number)]
            content = [[items[i] for i in share] for share in shares]
            self._broadcast((kind, content))
            answers = self._answer(kind, content)
            if kind == _SCORE:
                self._check(answers)
            for share, answer in zip(shares, answers, strict=True):
                for i, result in zip(share, answer, strict=True):
                    results[i] = result
            if time.monotonic() - said > SAY_EVERY:
                said = time.monotonic()
                log.info("  %s of %s requests", f"{first + len(chosen):,}", f"{len(items):,}")
        return results

    def _check(self, answers: list[list[Likelihood]]) -> None:
        finite = [math.isfinite(nats) for answer in answers for nats, _ in answer]
        run = self.scorer.model.run
        refuse_not_finite(run, "log-likelihoods", finite.count(False), len(finite))

    def _answer(self, kind: str, content: list[list[Any]]) -> list[list[Any]]:
        """Compute this replica's share; on rank 0 return the answers of all replicas.

        Raises:
            EvaluationError: on rank 0, a replica of one process failed.
            BrokenReplicaError: this process failed while others of its replica may wait for it.
        """
        groups = self.scorer.model.groups
        work: Callable[[Any], list[Any]] = self.scorer.score if kind == _SCORE else self.scorer.generate
        try:
            answer: tuple[int, Any, str | None] | None = (
                groups.data_rank,
                work(content[groups.data_rank]),
                None,
            )
        except Exception as error:
            if groups.model.size() > 1:
                raise BrokenReplicaError(
                    f"rank {dist.get_rank()}: {type(error).__name__}: {error}"
                ) from error
            log.debug("a share of the requests failed", exc_info=True)
            answer = (groups.data_rank, None, f"rank {dist.get_rank()}: {type(error).__name__}: {error}")
        answers = self._gather(answer if self.scorer.has_results else None)
        failures = [failure for _, _, failure in answers if failure is not None]
        if failures:
            raise EvaluationError("; ".join(failures))
        return [result for _, result, _ in sorted(answers, key=lambda answer: answer[0])]

    def _broadcast(self, message: tuple[str, Any] | None) -> tuple[str, Any]:
        box = [message]
        if self.host.size() > 1:
            dist.broadcast_object_list(box, src=0, group=self.host)
        assert box[0] is not None
        return box[0]

    def _gather(self, answer: Any) -> list[Any]:
        """Gather the answers that are not None on rank 0; return nothing elsewhere."""
        if self.host.size() == 1:
            return [answer]
        answers: list[Any] | None = [None] * self.host.size() if self.host.rank() == 0 else None
        dist.gather_object(answer, answers, dst=0, group=self.host)
        return [given for given in answers or [] if given is not None]


DEFAULT_MOST = 256
"""Default number of generated tokens per request."""
_MOST_KEYS = ("max_gen_toks", "max_new_tokens", "max_tokens")


class TextScorer:
    """Answers lm-evaluation-harness's three kinds of requests with all replicas; on rank 0."""

    def __init__(self, replicas: Replicas, tokenizer: Tokenizer) -> None:
        self.replicas, self.tokenizer = replicas, tokenizer
        self.longest = replicas.scorer.longest
        self.counts = Counts()

    def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> list[Likelihood]:
        """Score continuations of contexts: log-likelihoods in nats, and whether greedy decoding gives them.

        An empty context stands for the end-of-document token; an empty continuation is certain (0 nats).
        """
        encoded = []
        for context, continuation in pairs:
            head, tail, apart = encode_pair(self.tokenizer, context, continuation)
            self.counts.apart += apart
            self.counts.truncated += len(tail) <= self.longest < len(head) + len(tail) - 1
            encoded.append((head, tail))
        return self._score(encoded)

    def loglikelihood_rolling(self, texts: Sequence[str]) -> list[float]:
        """Score whole texts: every token once, after the end-of-document token or the window before it.

        A text longer than a sequence is split into windows whose scored tokens do not overlap; only the last one
        is filled up with context that was already scored (`windows`).
        """
        encoded = [encode_pair(self.tokenizer, "", text)[:2] for text in texts]
        return [nats for nats, _ in self._score(encoded)]

    def _score(self, encoded: Sequence[tuple[list[int], list[int]]]) -> list[Likelihood]:
        spans: list[Span] = []
        owners: list[int] = []
        for i, (head, tail) in enumerate(encoded):
            cut = list(windows(head, tail, self.longest)) if tail else []
            self.counts.windowed += len(cut) > 1
            spans += cut
            owners += [i] * len(cut)
        self.counts.requests += len(encoded)
        parts: list[list[Likelihood]] = [[] for _ in encoded]
        for i, likelihood in zip(owners, self.replicas.score(spans), strict=True):
            parts[i].append(likelihood)
        return [(math.fsum(nats for nats, _ in part), all(top for _, top in part)) for part in parts]

    def generate(self, requests: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
        """Continue contexts greedily, each limited by its request's `until` and `max_gen_toks`.

        Raises:
            EvaluationError: a request asks for other than greedy decoding.
        """
        prompts = [self._prompt(context, dict(arguments)) for context, arguments in requests]
        self.counts.requests += len(prompts)
        self.counts.truncated += sum(len(prompt.tokens) > self.longest for prompt in prompts)
        return self.replicas.generate(prompts)

    def _prompt(self, context: str, arguments: dict[str, Any]) -> Prompt:
        if arguments.get("do_sample") or arguments.get("temperature"):
            raise EvaluationError(
                f"a task wants sampled text ({arguments}), and only greedy decoding is there: set do_sample=false "
                "and temperature=0 in it, or leave it out."
            )
        until = arguments.get("until") or []
        stops = (until,) if isinstance(until, str) else tuple(until)
        most = next(
            (int(arguments[key]) for key in _MOST_KEYS if arguments.get(key) is not None), DEFAULT_MOST
        )
        tokens = [int(token) for token in self.tokenizer.encode_batch([context])[0]]
        return Prompt(tuple(tokens or [self.tokenizer.eos_id]), stops, most)

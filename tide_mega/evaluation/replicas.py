"""The processes of an evaluation: rank 0 runs the harness and asks, every replica answers for its share.

Requests travel over a gloo group of all processes. Within a replica every process takes part in its passes;
the one that holds the results answers.
"""

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch.distributed as dist
from torch.distributed import ProcessGroup

from tide_mega.evaluation.errors import BrokenReplicaError, EvaluationError
from tide_mega.evaluation.scorer import Likelihood, Prompt, ReplicaScorer, refuse_not_finite
from tide_mega.evaluation.spans import Span

log = logging.getLogger(__name__)

ROUND_CALLS = 8
"""Calls of the model by each replica between two meetings of all processes."""
SAY_EVERY = 15.0
"""Seconds between two lines on progress."""

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
        """Around rank 0's requests: ends the others' `serve`, with the error where there is one."""
        try:
            yield
        except BrokenReplicaError:
            raise  # the others may be anywhere; they end with this process
        except Exception as error:
            with contextlib.suppress(Exception):  # a process that has died fails this too
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
        """Deal items of like length to the replicas, round by round, the longest first: memory fails early."""
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
        """Do this replica's share; on rank 0 return the answers of all replicas.

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
        answers = self._gather(answer if self.scorer.speaks else None)
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
        """The answers that are not None, on rank 0; elsewhere nothing."""
        if self.host.size() == 1:
            return [answer]
        answers: list[Any] | None = [None] * self.host.size() if self.host.rank() == 0 else None
        dist.gather_object(answer, answers, dst=0, group=self.host)
        return [given for given in answers or [] if given is not None]

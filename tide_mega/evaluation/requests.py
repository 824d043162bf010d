"""What a task asks, answered in its own terms: texts in, log-likelihoods or texts out."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from tide_mega.data.tokenizer import Tokenizer
from tide_mega.evaluation.errors import EvaluationError
from tide_mega.evaluation.replicas import Replicas
from tide_mega.evaluation.scorer import Likelihood, Prompt
from tide_mega.evaluation.spans import Counts, Span, encode_pair, windows

DEFAULT_MOST = 256
"""Tokens generated where a request does not say how many."""
_MOST_KEYS = ("max_gen_toks", "max_new_tokens", "max_tokens")


class TextScorer:
    """The three questions of lm-evaluation-harness, put to all replicas; on rank 0."""

    def __init__(self, replicas: Replicas, tokenizer: Tokenizer) -> None:
        self.replicas, self.tokenizer = replicas, tokenizer
        self.longest = replicas.scorer.longest
        self.counts = Counts()

    def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> list[Likelihood]:
        """Score continuations after their contexts: nats, and whether greedy decoding would give them.

        An empty context is the end-of-document token, an empty continuation certain (0 nats).
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

        A text of more tokens than a sequence is cut into windows whose scored tokens do not overlap; only the
        last one is filled up with context that was scored before (`spans.windows`).
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
        """Continue contexts greedily, each by its request's `until` and `max_gen_toks`.

        Raises:
            EvaluationError: a request wants something else than greedy decoding.
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

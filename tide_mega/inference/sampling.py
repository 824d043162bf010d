"""Chooses the next token of each request: greedily, or by sampling from a generator of the request's own.

Shapes: B requests, V vocabulary, P the likeliest tokens of a request, those that may be drawn.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tide_mega.errors import GenerationError, refuse

_FIRST_LOOK = 1024
"""This many tokens nearly always cover `top_p`; sorting the whole vocabulary costs as much as a layer."""


@dataclass(frozen=True)
class Sampling:
    """How a request's tokens are chosen.

    Raises:
        ConfigError: a value out of range.
    """

    temperature: float = 0.0
    """Divisor of the logits; 0 takes the likeliest token."""
    top_k: int = 0
    """Sample from this many likeliest tokens; 0 means all."""
    top_p: float = 1.0
    """Sample from the fewest likeliest tokens whose total probability is at least this."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            refuse("temperature", self.temperature, "is no temperature", "use 0 for the likeliest, or more")
        if self.top_k < 0:
            refuse("top_k", self.top_k, "is below 0", "use 0 for all tokens, or more")
        if not 0 < self.top_p <= 1:
            refuse("top_p", self.top_p, "is no part of the probability", "use more than 0, at most 1")


class Sampler:
    """Chooses the tokens of B requests; each depends only on its own logits and seed."""

    def __init__(self, samplings: Sequence[Sampling], seeds: Sequence[int], device: torch.device) -> None:
        """Take each request's sampling and seed; draws are made on `device`, where the logits are."""
        self._samplings = list(samplings)
        self._generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
        self._all_greedy = all(sampling.temperature == 0 for sampling in self._samplings)

    def choose(self, logits_BV: Tensor, names: Sequence[str], finished: set[int]) -> Tensor:
        """Return a token id for each request [B]; arbitrary for finished ones.

        Args:
            logits_BV: of the next token.
            names: names of the requests in errors.
            finished: requests that need no token.

        Raises:
            GenerationError: logits of a request are not numbers.
        """
        best_B, ids_B = logits_BV.max(-1)
        for b, best in enumerate(best_B.tolist()):
            if b not in finished and not abs(best) < float("inf"):  # a NaN anywhere becomes the maximum
                raise GenerationError(
                    f"{names[b]}: the model's logits are not numbers. With dtype=bf16 try dtype=fp32; otherwise "
                    "its weights are damaged, or its training diverged."
                )
        if self._all_greedy:
            return ids_B
        chosen = ids_B.clone()
        for b, sampling in enumerate(self._samplings):
            if b not in finished and sampling.temperature > 0:
                chosen[b] = draw(logits_BV[b], sampling, self._generators[b])
        return chosen


def draw(logits_V: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """Sample an id after applying temperature, then top_k, then top_p."""
    scaled_V = logits_V.double() / sampling.temperature
    if sampling.top_k:
        logits_P, ids_P = scaled_V.topk(min(sampling.top_k, len(scaled_V)))
        probability_P = logits_P.softmax(-1)
    elif sampling.top_p < 1:
        probability_P, ids_P = _likeliest(scaled_V.softmax(-1), sampling.top_p)
    else:
        probability_P, ids_P = scaled_V.softmax(-1), None
    sums_P = probability_P.cumsum(-1)
    if sampling.top_p < 1:
        kept = int((sums_P < sampling.top_p).sum()) + 1
        sums_P = sums_P[:kept]
    at = torch.rand((), dtype=torch.float64, device=logits_V.device, generator=generator) * sums_P[-1]
    place = torch.searchsorted(sums_P, at, right=True).clamp_max(len(sums_P) - 1)
    return place if ids_P is None else ids_P[place]


def _likeliest(probability_V: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """Return at least the likeliest tokens that together cover `top_p`, in descending order."""
    count = min(_FIRST_LOOK, len(probability_V))
    probability_P, ids_P = probability_V.topk(count)
    if count < len(probability_V) and probability_P.sum() < top_p:
        probability_P, ids_P = probability_V.sort(descending=True)
    return probability_P, ids_P

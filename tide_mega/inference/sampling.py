"""The next token of each request: the likeliest, or one drawn, from a generator of the request's own.

Shapes: B requests, V vocabulary, P the likeliest tokens of a request, those that may be drawn.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tide_mega.config.errors import refuse
from tide_mega.inference.errors import GenerationError

_FIRST_LOOK = 1024
"""So many tokens nearly always hold the part `top_p`; sorting all of a vocabulary takes as long as a layer."""


@dataclass(frozen=True)
class Sampling:
    """How a request's tokens are chosen.

    Raises:
        ConfigError: a value out of range.
    """

    temperature: float = 0.0
    """Logits are divided by it; 0 takes the likeliest token."""
    top_k: int = 0
    """Draw among so many likeliest tokens; 0 means all."""
    top_p: float = 1.0
    """Draw among the fewest likeliest tokens that together have at least this part of the probability."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            refuse("temperature", self.temperature, "is no temperature", "use 0 for the likeliest, or more")
        if self.top_k < 0:
            refuse("top_k", self.top_k, "is below 0", "use 0 for all tokens, or more")
        if not 0 < self.top_p <= 1:
            refuse("top_p", self.top_p, "is no part of the probability", "use more than 0, at most 1")


class Sampler:
    """Chooses the tokens of B requests; what one gets depends on its own logits and seed alone."""

    def __init__(self, samplings: Sequence[Sampling], seeds: Sequence[int], device: torch.device) -> None:
        """Take what belongs to each request; draws are made on `device`, where the logits are."""
        self._samplings = list(samplings)
        self._generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
        self._all_greedy = all(sampling.temperature == 0 for sampling in self._samplings)

    def choose(self, logits_BV: Tensor, names: Sequence[str], finished: set[int]) -> Tensor:
        """Return a token id for each request [B], any for those that have finished.

        Args:
            logits_BV: of the next token.
            names: what to call the requests in an error.
            finished: requests that need no token.

        Raises:
            GenerationError: logits of a request are not numbers.
        """
        best_B, ids_B = logits_BV.max(-1)
        for b, best in enumerate(best_B.tolist()):
            if b not in finished and not abs(best) < float("inf"):  # NaN anywhere is the maximum
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
    """Return an id drawn by the probabilities that temperature, then top_k, then top_p leave."""
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
    """Return at least the likeliest tokens that together have the part `top_p`, the likeliest first."""
    count = min(_FIRST_LOOK, len(probability_V))
    probability_P, ids_P = probability_V.topk(count)
    if count < len(probability_V) and probability_P.sum() < top_p:
        probability_P, ids_P = probability_V.sort(descending=True)
    return probability_P, ids_P

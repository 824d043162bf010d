"""What one replica of the model does with spans: batches, log-likelihoods, greedy continuation.

Shapes: B sequences, T tokens, D width, W rows of the output layer that a tensor-parallel rank holds.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from tide_mega.data.batch import IGNORE_LABEL, TokenBatch
from tide_mega.evaluation.errors import EvaluationError
from tide_mega.evaluation.spans import Span
from tide_mega.trained.model import TrainedModel
from tide_mega.trained.run import TrainedRun

Likelihood = tuple[float, bool]
"""Log-likelihood in nats of a span's scored tokens, and whether each is the model's first choice."""

ROUND_TO = 8
"""Lengths of batches are multiples of it, so that few shapes occur."""


@dataclass(frozen=True)
class Prompt:
    """Text to go on from, as tokens."""

    tokens: tuple[int, ...]
    stops: tuple[str, ...]
    """The text ends before the first of them."""
    most: int
    """Tokens to make at most."""


class ReplicaScorer:
    """Runs spans and prompts through a model; every call is collective over the replica's processes."""

    def __init__(self, model: TrainedModel, batch: int) -> None:
        """Take a model and the most sequences of a forward pass."""
        self.model, self.batch = model, batch
        self.longest = model.config.data.seq_length
        self.padding = model.run.tokenizer.eos_id

    @property
    def speaks(self) -> bool:
        """Whether this process has the replica's results: the first tensor rank of the last stage."""
        return self.model.groups.is_last_stage and self.model.groups.tensor_rank == 0

    @property
    def spans_at_once(self) -> int:
        """Spans of one call to the model: a batch for each pipeline stage."""
        return self.batch * self.model.config.parallel.pipeline

    def score(self, spans: Sequence[Span]) -> list[Likelihood]:
        """Score spans, best given by length; empty except on the last pipeline stage."""
        results: list[Likelihood] = []
        for first in range(0, len(spans), self.spans_at_once):
            chosen = spans[first : first + self.spans_at_once]
            number = min(self.model.config.parallel.pipeline, len(chosen))
            scored = self.model.score(self._batches(chosen, number))
            if self.model.groups.is_last_stage:
                results += _likelihoods(chosen, scored)
        return results

    def _batches(self, spans: Sequence[Span], number: int) -> list[TokenBatch]:
        """So many microbatches of one shape, padded on the right, where causal attention leaves it unseen."""
        B = -(-len(spans) // number)
        needed = max(len(span.tokens) - 1 for span in spans)
        T = min(-(-needed // ROUND_TO) * ROUND_TO, self.longest)
        tokens = torch.full((number * B, T), self.padding)
        labels = torch.full((number * B, T), IGNORE_LABEL)
        for row, span in enumerate(spans):
            end = len(span.tokens) - 1
            tokens[row, :end] = torch.tensor(span.tokens[:-1])
            labels[row, end - span.scored : end] = torch.tensor(span.tokens[-span.scored :])
        return [TokenBatch(*pair) for pair in zip(tokens.split(B), labels.split(B), strict=True)]

    def generate(self, prompts: Sequence[Prompt]) -> list[str]:
        """Continue prompts greedily, on every process of the replica alike.

        A text ends before its first stop sequence, at an end-of-document token, or after `most` tokens. Every
        token costs a forward pass over the last `longest` tokens of the growing sequence: nothing is kept between
        passes.
        """
        tokenizer = self.model.run.tokenizer
        made: list[list[int]] = [[] for _ in prompts]
        texts = [""] * len(prompts)
        for first in range(0, len(prompts), self.batch):
            going = [i for i in range(first, min(first + self.batch, len(prompts))) if prompts[i].most > 0]
            while going:
                sequences = [(*prompts[i].tokens, *made[i])[-self.longest :] for i in going]
                chosen = self._next_tokens(sequences)
                still = []
                for i, token in zip(going, chosen, strict=True):
                    if token == tokenizer.eos_id:
                        continue
                    made[i].append(token)
                    text = tokenizer.decode(made[i])
                    texts[i], stopped = _cut(text, prompts[i].stops)
                    if not stopped and len(made[i]) < prompts[i].most:
                        still.append(i)
                going = still
        return texts

    def _next_tokens(self, sequences: Sequence[tuple[int, ...]]) -> list[int]:
        """The likeliest token after each sequence."""
        last_stage, caught = self.model.groups.is_last_stage, []

        def catch(_: nn.Module, __: Any, output: Any) -> None:
            caught.append(output[0] if isinstance(output, tuple) else output)

        chunk = self.model.stage.transformers[-1]
        hook = chunk.decoder.register_forward_hook(catch) if last_stage else None
        try:
            # Any label will do: scoring is what runs the model, on every stage.
            self.model.score(self._batches([Span((*tokens, self.padding), 1) for tokens in sequences], 1))
        finally:
            if hook is not None:
                hook.remove()
        ids_B = torch.zeros(len(sequences), dtype=torch.int64, device=self.model.device.torch_device)
        if last_stage:
            hidden_TBD = caught[0]
            ends = torch.tensor([len(tokens) - 1 for tokens in sequences], device=hidden_TBD.device)
            ids_B = self._likeliest(hidden_TBD[ends, torch.arange(len(sequences), device=hidden_TBD.device)])
        pipeline = self.model.groups.pipeline
        if pipeline.size() > 1:
            dist.broadcast(ids_B, src=dist.get_global_rank(pipeline, pipeline.size() - 1), group=pipeline)
        refuse_not_finite(self.model.run, "greedy choices", int((ids_B < 0).sum()), len(sequences))
        return [int(token) for token in ids_B.tolist()]

    def _likeliest(self, hidden_BD: Tensor) -> Tensor:
        """The argmax over the vocabulary, of which a tensor rank holds consecutive rows; -1 if not finite."""
        chunk, group = self.model.stage.transformers[-1], self.model.groups.tensor
        weight = chunk.output_weight
        weight_WD = chunk.shared_embedding_or_output_weight() if weight is None else weight
        top_B, index_B = F.linear(hidden_BD, weight_WD).float().max(-1)
        ids_B = index_B + group.rank() * weight_WD.size(0)
        if group.size() > 1:
            tops = [torch.empty_like(top_B) for _ in range(group.size())]
            ids = [torch.empty_like(ids_B) for _ in range(group.size())]
            dist.all_gather(tops, top_B.contiguous(), group=group)
            dist.all_gather(ids, ids_B.contiguous(), group=group)
            top_B, best_B = torch.stack(tops).max(0)
            ids_B = torch.stack(ids).gather(0, best_B[None])[0]
        return ids_B.where(top_B.isfinite(), -1)


def refuse_not_finite(run: TrainedRun, what: str, number: int, of: int) -> None:
    """Refuse a model's answers of which some are NaN or infinite: comparing them would still give a score.

    Raises:
        EvaluationError: `number` is not zero.
    """
    if number:
        raise EvaluationError(
            f"{number:,} of {of:,} {what} of {run.label} ({run.weights.path}) are not finite: its weights are "
            "damaged or its training had diverged, so give an earlier checkpoint, or leave it out."
        )


def _likelihoods(spans: Sequence[Span], scored: Sequence[Any]) -> list[Likelihood]:
    losses = torch.cat([result.cross_entropy_BT for result in scored]).double().sum(1).tolist()
    tops = torch.cat([result.is_top_BT for result in scored])
    labels = torch.cat([result.labels_BT for result in scored])
    greedy = (tops | (labels < 0)).all(1).tolist()
    return [(-losses[row], bool(greedy[row])) for row in range(len(spans))]


def _cut(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """The text before its earliest stop sequence, and whether there is one."""
    found = [where for stop in stops if stop and (where := text.find(stop)) >= 0]
    return (text[: min(found)], True) if found else (text, False)

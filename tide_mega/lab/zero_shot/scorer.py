"""Converts texts to spans of tokens, and scores spans and continues prompts with one replica of the model.

Of a span the last tokens are scored. Spans follow lm-evaluation-harness's rules, so that scores are comparable
with those of its other models.

Shapes: B sequences, T tokens, D width, W rows of the output layer that a tensor-parallel rank holds.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from tide_mega.data.loader import IGNORE_LABEL, TokenBatch
from tide_mega.data.tokenizer import Tokenizer
from tide_mega.errors import EvaluationError
from tide_mega.trained.model import TrainedModel
from tide_mega.trained.run import TrainedRun


@dataclass(frozen=True)
class Span:
    """Tokens read together; at most one more than the model's sequence length."""

    tokens: tuple[int, ...]
    scored: int
    """Number of predicted tokens, at the end; the others, at least one, are context."""

    def __post_init__(self) -> None:
        if not 0 < self.scored < len(self.tokens):
            raise ValueError(
                f"{self.scored} of {len(self.tokens)} tokens cannot be scored: one must be context"
            )


@dataclass
class Counts:
    """Counts requests that did not reach the model unchanged."""

    requests: int = 0
    truncated: int = 0
    """Context truncated on the left to fit the model's sequence length."""
    windowed: int = 0
    """Texts longer than a sequence, scored in windows."""
    apart: int = 0
    """Encoded separately, since the continuation's first token would merge with the context."""


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str) -> tuple[list[int], list[int], bool]:
    """Encode both jointly; return the tokens of each, and whether they had to be encoded separately.

    Trailing spaces of the context move to the continuation; the whole is encoded, and split where the tokens of
    the context alone end. An empty context stands for the end-of-document token. If the context alone has as many
    tokens as the whole, nothing would be left to score, so each is encoded by itself.
    """
    if not context:
        return [tokenizer.eos_id], _encode(tokenizer, continuation), False
    kept = context.rstrip()
    continuation, context = context[len(kept) :] + continuation, kept
    whole, head = _encode(tokenizer, context + continuation), _encode(tokenizer, context)
    if len(head) < len(whole) and head:
        return head, whole[len(head) :], False
    return head or [tokenizer.eos_id], _encode(tokenizer, continuation), bool(head)


def windows(context: list[int], continuation: list[int], longest: int) -> Iterator[Span]:
    """Yield spans that score every token of the continuation once.

    Usually one, with the context truncated on the left if it is too long. A continuation longer than `longest`
    tokens is split into windows of that many inputs: the first predicts `longest` tokens from the last token of
    the context; each further one predicts the next tokens, and the last keeps as much context as fits.
    """
    tokens = context + continuation
    if len(continuation) <= longest:
        yield Span(tuple(tokens[-(longest + 1) :]), len(continuation))
        return
    first = len(context)
    while first < len(tokens):
        last = min(first + longest, len(tokens))
        yield Span(tuple(tokens[last - longest - 1 : last]), last - first)
        first = last


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    return [int(token) for token in tokenizer.encode_batch([text])[0]]


Likelihood = tuple[float, bool]
"""Log-likelihood in nats of a span's scored tokens, and whether every one is the argmax."""

ROUND_TO = 8
"""Batch lengths are multiples of this, so that few shapes occur."""


@dataclass(frozen=True)
class Prompt:
    """A tokenised prompt and its limits."""

    tokens: tuple[int, ...]
    stops: tuple[str, ...]
    """Strings before the first of which the text ends."""
    most: int
    """Most tokens to generate."""


class ReplicaScorer:
    """Runs spans and prompts through a model; every call is collective over the replica's processes."""

    def __init__(self, model: TrainedModel, batch: int) -> None:
        """Take a model, and the most sequences per forward pass."""
        self.model, self.batch = model, batch
        self.longest = model.config.data.seq_length
        self.padding = model.run.tokenizer.eos_id

    @property
    def has_results(self) -> bool:
        """Whether this process has the replica's results: the first tensor rank of the last stage."""
        return self.model.groups.is_last_stage and self.model.groups.tensor_rank == 0

    @property
    def spans_at_once(self) -> int:
        """Spans of one call to the model: a batch for each pipeline stage."""
        return self.batch * self.model.config.parallel.pipeline

    def score(self, spans: Sequence[Span]) -> list[Likelihood]:
        """Score spans, ideally sorted by length; empty except on the last pipeline stage."""
        results: list[Likelihood] = []
        for first in range(0, len(spans), self.spans_at_once):
            chosen = spans[first : first + self.spans_at_once]
            number = min(self.model.config.parallel.pipeline, len(chosen))
            scored = self.model.score(self._batches(chosen, number))
            if self.model.groups.is_last_stage:
                results += _likelihoods(chosen, scored)
        return results

    def _batches(self, spans: Sequence[Span], number: int) -> list[TokenBatch]:
        """Make microbatches of one shape, padded on the right, which causal attention never sees."""
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

        A text ends before its first stop sequence, at an end-of-document token, or after `most` tokens. Without a
        KV cache, every token costs a forward pass over the last `longest` tokens of the growing sequence.
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
        """Return the likeliest next token of each sequence."""
        last_stage, caught = self.model.groups.is_last_stage, []

        def catch(_: nn.Module, __: Any, output: Any) -> None:
            caught.append(output[0] if isinstance(output, tuple) else output)

        chunk = self.model.stage.transformers[-1]
        hook = chunk.decoder.register_forward_hook(catch) if last_stage else None
        try:
            # Any label will do: scoring is only used to run the model on every stage.
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
        """Return the argmax over the vocabulary, whose rows tensor ranks hold in order; -1 if not finite."""
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
    """Refuse answers of which some are NaN or infinite: comparing them would still give a score.

    Raises:
        EvaluationError: `number`, the count of such answers, is not zero.
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
    """Return the text up to its earliest stop sequence, and whether there is one."""
    found = [where for stop in stops if stop and (where := text.find(stop)) >= 0]
    return (text[: min(found)], True) if found else (text, False)

"""Evaluation: held-out loss by frequency decile, null-bank weight by layer and decile, perplexity on texts.

Dimensions: B sequences, T tokens, V vocabulary, L layers.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from tide_mega.config.schema import TideConfig
from tide_mega.data.loader import IGNORE_LABEL, TokenBatch, validation_batches
from tide_mega.data.prepare.vocabulary import dataset_tokenizer
from tide_mega.data.stream import TokenStream
from tide_mega.data.texts import TextSet, load_texts
from tide_mega.metrics.deciles import DecileLoss, NullWeight
from tide_mega.metrics.records import EvalRecord, TextResult
from tide_mega.model.stage import TideStage
from tide_mega.model.steps import EvaluatedBatch, evaluate_batches
from tide_mega.parallel.groups import ParallelGroups, sum_over


def open_texts(config: TideConfig) -> list[TextSet]:
    """Read and tokenise `data.perplexity_texts`.

    Raises:
        ConfigError: a text does not exist, or two have the same name.
        DataError: a text cannot be read or is too short.
    """
    if not config.data.perplexity_texts:
        return []
    tokenizer = dataset_tokenizer(Path(config.data.path))
    return load_texts(
        config.data.perplexity_texts,
        tokenizer,
        max_tokens=config.data.perplexity_tokens,
        max_document_bytes=config.data.max_document_bytes,
        key="data.perplexity_texts",
        vocab_size=config.model.vocab_size,
    )


class Evaluator:
    """Evaluates the same held-out sequences and texts each time; every method is collective."""

    def __init__(
        self,
        config: TideConfig,
        stage: TideStage,
        held_out: TokenStream,
        bins_V: Tensor,
        groups: ParallelGroups,
        texts: Sequence[TextSet] = (),
    ) -> None:
        self.config, self.stage, self.held_out, self.groups = config, stage, held_out, groups
        self.texts = texts
        layers = config.model.num_layers if config.memory.num_blocks else 0
        self.deciles, self.null_weights = DecileLoss(bins_V), NullWeight(layers, bins_V)
        self.device: torch.device = bins_V.device

    def evaluate(
        self, step: int, tokens: int, *, on_progress: Callable[[], None] = lambda: None
    ) -> EvalRecord:
        """Return the evaluation after `step` steps and `tokens` training tokens.

        `on_progress` is called before every few batches.
        """
        self.deciles.reset()
        self.null_weights.reset()
        held_out = validation_batches(
            self.held_out,
            seed=self.config.data.seed,
            sequences=self.config.trainer.eval_sequences,
            micro_batch_size=self.config.trainer.micro_batch_size,
            dp_rank=self.groups.data_rank,
            dp_size=self.groups.data_size,
        )
        for result in self._scored(held_out, on_progress):
            self.null_weights.update(result.null_weight_LBT, result.tokens_BT, result.labels_BT)
        deciles = self.deciles.reduce(self._over_replicas)
        null_weights = self.null_weights.reduce(self._over_replicas)
        texts = {text.name: self._score_text(text, on_progress) for text in self.texts}
        return EvalRecord.of(step, tokens, deciles, null_weights, texts)

    def _score_text(self, text: TextSet, on_progress: Callable[[], None]) -> TextResult:
        self.deciles.reset()
        batches = text.batches(
            self.config.data.seq_length,
            self.config.trainer.micro_batch_size,
            dp_rank=self.groups.data_rank,
            dp_size=self.groups.data_size,
        )
        for _ in self._scored(batches, on_progress, routers="nothing"):
            pass
        return TextResult.of(self.deciles.reduce(self._over_replicas), text.num_bytes)

    def _scored(
        self,
        batches: Iterator[TokenBatch],
        on_progress: Callable[[], None],
        routers: Literal["nothing", "null"] = "null",
    ) -> Iterator[EvaluatedBatch]:
        """Yield results and add each to the sums by decile; only the last pipeline stage has any."""
        for group in self._groups_of(batches):
            on_progress()
            for result in evaluate_batches(self.stage, group, routers=routers):
                if result.cross_entropy_BT is not None:
                    self.deciles.update(result.cross_entropy_BT, result.labels_BT)
                    yield result

    def _over_replicas(self, tensor: Tensor) -> Tensor:
        return sum_over(self.groups.pipeline, sum_over(self.groups.data, tensor))

    def _groups_of(self, batches: Iterator[TokenBatch]) -> Iterator[list[TokenBatch]]:
        """Yield micro-batches one at a time, or with interleaving one per stage, padded with unlabelled ones."""
        size = self.groups.pipeline.size() if self.config.parallel.virtual_pipeline > 1 else 1
        while group := [TokenBatch(*(x.to(self.device) for x in batch)) for batch in islice(batches, size)]:
            first = group[0]
            filler = TokenBatch(first.tokens_BT, torch.full_like(first.labels_BT, IGNORE_LABEL))
            yield group + [filler] * (size - len(group))

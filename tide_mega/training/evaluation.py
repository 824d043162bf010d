"""Held-out loss per frequency decile, and the null bank's weight per layer and decile."""

from collections.abc import Callable, Iterator
from itertools import islice

import torch
from torch import Tensor

from tide_mega.config.schema import TideConfig
from tide_mega.data.batch import IGNORE_LABEL, TokenBatch
from tide_mega.data.loader import validation_batches
from tide_mega.data.stream import TokenStream
from tide_mega.metrics.deciles import DecileLoss, NullWeight
from tide_mega.metrics.records import EvalRecord
from tide_mega.model.passes import evaluate_batches
from tide_mega.model.stage import TideStage
from tide_mega.parallel.groups import ParallelGroups, sum_over


class Evaluator:
    """Evaluates the same held-out sequences each time; every method is collective."""

    def __init__(
        self,
        config: TideConfig,
        stage: TideStage,
        held_out: TokenStream,
        bins_V: Tensor,
        groups: ParallelGroups,
    ) -> None:
        self.config, self.stage, self.held_out, self.groups = config, stage, held_out, groups
        layers = config.model.num_layers if config.memory.num_blocks else 0
        self.deciles, self.null_weights = DecileLoss(bins_V), NullWeight(layers, bins_V)
        self.device: torch.device = bins_V.device

    def evaluate(
        self, step: int, tokens: int, *, on_progress: Callable[[], None] = lambda: None
    ) -> EvalRecord:
        """Evaluate after `step` steps and `tokens` training tokens; `on_progress` hears of each few batches."""
        self.deciles.reset()
        self.null_weights.reset()
        batches = validation_batches(
            self.held_out,
            seed=self.config.data.seed,
            sequences=self.config.trainer.eval_sequences,
            micro_batch_size=self.config.trainer.micro_batch_size,
            dp_rank=self.groups.data_rank,
            dp_size=self.groups.data_size,
        )
        for group in self._groups_of(batches):
            on_progress()
            for result in evaluate_batches(self.stage, group):
                if result.cross_entropy_BT is None:  # not the last stage: its sums stay 0
                    continue
                self.deciles.update(result.cross_entropy_BT, result.labels_BT)
                self.null_weights.update(result.null_weight_LBT, result.tokens_BT, result.labels_BT)

        def over_replicas(tensor: Tensor) -> Tensor:
            return sum_over(self.groups.pipeline, sum_over(self.groups.data, tensor))

        return EvalRecord.of(
            step, tokens, self.deciles.reduce(over_replicas), self.null_weights.reduce(over_replicas)
        )

    def _groups_of(self, batches: Iterator[TokenBatch]) -> Iterator[list[TokenBatch]]:
        """Take microbatches one by one, or one for each stage, the last group filled up with unlabelled ones."""
        size = self.groups.pipeline.size() if self.config.parallel.virtual_pipeline > 1 else 1
        while group := [TokenBatch(*(x.to(self.device) for x in batch)) for batch in islice(batches, size)]:
            first = group[0]
            filler = TokenBatch(first.tokens_BT, torch.full_like(first.labels_BT, IGNORE_LABEL))
            yield group + [filler] * (size - len(group))

"""Null-bank weights of a logged step, by layer and by decile of the token.

Shapes: L layers, B sequences, T tokens, V vocabulary.
"""

from torch import Tensor

from tide_mega.data.batch import TokenBatch
from tide_mega.metrics.deciles import NullWeight, NullWeightResult
from tide_mega.model.stage import TideStage
from tide_mega.parallel.groups import sum_over


class StepNullWeights:
    """Reads what the layers left on the board in a step that was told to record."""

    def __init__(self, stage: TideStage, bins_V: Tensor) -> None:
        """Take the stage and the decile of each type, on the device."""
        self._stage = stage
        self._null = NullWeight(stage.num_layers if stage.num_blocks else 0, bins_V)

    def record(self, logged: bool) -> None:
        """Say before a step whether it is to be read."""
        self._stage.board.alpha_L = {} if logged and self._stage.num_blocks else None

    def read(self, batches: list[TokenBatch]) -> NullWeightResult:
        """Average over the input tokens of the step, of these microbatches here; padding counts nothing.

        Clears the board.

        Collective over the world; empty without memory.
        """
        stage = self._stage
        self._null.reset()
        if stage.num_blocks:
            sizes = [batch.tokens_BT.size(0) for batch in batches]
            of_microbatches = stage.null_weights().split(sizes, dim=1)
            stage.board.alpha_L = None
            for null_LBT, batch in zip(of_microbatches, batches, strict=True):
                self._null.update(null_LBT, *batch)
        # Every stage and tensor rank has the weights of all layers: only replicas differ.
        return self._null.reduce(lambda tensor: sum_over(stage.groups.data, tensor))

"""A checkpoint as a running model: the layers of the training run, without optimizer, at any topology.

Dimensions: B sequences, T tokens, L layers, K blocks, J = K + 1, D width, U distinct token types of a micro-batch.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from tide_mega.checkpoint.weights import load_weights
from tide_mega.config.schema import KernelConfig, ParallelConfig, TideConfig
from tide_mega.data.loader import TokenBatch
from tide_mega.kernels.row_lookup import sum_rows
from tide_mega.kernels.row_norm import row_norm
from tide_mega.kernels.token_order import TokenOrder
from tide_mega.memory.memory import MemoryBlocks
from tide_mega.model.stage import TideStage
from tide_mega.model.steps import EvaluatedBatch, accumulate_row_gradients, evaluate_batches
from tide_mega.parallel.device import Device
from tide_mega.parallel.groups import ParallelGroups, make_groups
from tide_mega.trained.run import StoredWeights, TrainedRun


@dataclass(frozen=True)
class LayerStates:
    """Intermediate results of a forward pass."""

    hidden_LBTD: Tensor
    """h of every layer, after feed-forward and memory; fp32."""
    alpha_LBTJ: Tensor | None
    """Router weights, the null bank last; None without memory."""


@dataclass(frozen=True)
class RowGradients:
    """Gradients of a micro-batch's mean loss, for each distinct id in it."""

    ids_U: Tensor
    counts_U: Tensor
    """Number of tokens of each id."""
    embedding_UD: Tensor
    """Gradient of the input embedding's row, through its path into the first layer only."""
    tables_UKD: Tensor | None
    """Gradient of the rows of every table, before their norm; None without memory."""


class TrainedModel:
    """A model with a checkpoint's weights; torch.distributed must be up (`parallel.groups.start_distributed`)."""

    def __init__(
        self,
        run: TrainedRun,
        device: Device,
        *,
        weights: StoredWeights | None = None,
        precision: str = "fp32",
        parallel: ParallelConfig | None = None,
    ) -> None:
        """Build the model and load its weights; collective.

        Args:
            run: the run, for its configuration.
            device: to compute on.
            weights: a checkpoint of the run; None means the one with which the run was opened.
            precision: of weights and computation: fp32 or bf16.
            parallel: tensor and pipeline sizes; None means one process. The remaining factor of the world is
                replicas, which never wait for each other.
        """
        self.run, self.device = run, device
        self.config: TideConfig = replace(
            run.config,
            parallel=replace(parallel or ParallelConfig(), recompute="full"),
            kernels=KernelConfig(),
            memory=replace(run.config.memory, owners="tensor"),
            trainer=replace(run.config.trainer, precision=precision),
        )
        self.groups: ParallelGroups = make_groups(self.config.parallel, self.config.trainer.seed)
        self.stage = TideStage(self.config, self.groups, device.torch_device)
        self.stage = self.stage.to(device.torch_device, self.stage.dtype)
        self.stage.requires_grad_(False)
        self.stage.eval()
        load_weights(self.stage, run.config.model, (weights or run.weights).path)

    @property
    def num_layers(self) -> int:
        """L."""
        return self.config.model.num_layers

    def score(
        self, batches: list[TokenBatch], *, routers: Literal["nothing", "null", "all"] = "nothing"
    ) -> list[EvaluatedBatch]:
        """Score every label of micro-batches of the same shape; collective over a replica.

        `routers` says which router weights to keep, as in `evaluate_batches`; "all" only in a single process.
        """
        if routers == "all":
            self._refuse_parallel()
        return evaluate_batches(self.stage, [self._here(batch) for batch in batches], routers=routers)

    @contextmanager
    def silenced(self, *layers: int) -> Iterator[None]:
        """Context in which these layers, from 0, skip the memory (paper, appendix H)."""
        with self.stage.memory.silencing(layers):
            yield

    @contextmanager
    def reading(self, rows_of: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """Context in which forward passes read other rows than the memory's; only in a single process.

        Args:
            rows_of: returns M [U, K, D], normalised, in the model's dtype, of distinct ids [U], ascending.

        Raises:
            ValueError: there is no memory, or the model is spread over processes.
        """
        self._refuse_parallel()
        self._memory()
        with self.stage.memory.reading_from(rows_of):
            yield

    @torch.no_grad()
    def table_rows(self, ids_U: Tensor) -> Tensor:
        """Return the trained rows E [U, K, D] of ids, before their norm; only in a single process."""
        self._refuse_parallel()
        tables_VKD = self._memory().tables_WKD
        assert tables_VKD is not None  # `owners` is tensor
        return tables_VKD[ids_U]

    @torch.no_grad()
    def normalised(self, rows_UKD: Tensor) -> Tensor:
        """Return M [U, K, D] of rows of the tables, in their dtype: RMSNorm and gain (paper 3.3)."""
        memory = self._memory()
        return row_norm(memory.norm_version, rows_UKD, memory.gains_KD.to(rows_UKD.dtype), memory.norm_eps)

    def look_inside(self, tokens_BT: Tensor) -> LayerStates:
        """Run tokens forward and return the output of every layer; only in a single process."""
        self._refuse_parallel()
        hidden: list[Tensor] = []

        def keep(_: nn.Module, __: object, output: tuple[Tensor, Tensor]) -> None:
            hidden.append(output[0].transpose(0, 1).float())

        batch = self._here(TokenBatch(tokens_BT, torch.full_like(tokens_BT, -1)))
        hooks = [layer.register_forward_hook(keep) for layer in self.stage.transformers[0].decoder.layers]
        try:
            with_alpha = evaluate_batches(self.stage, [batch], routers="all")[0]
        finally:
            for hook in hooks:
                hook.remove()
        return LayerStates(torch.stack(hidden), with_alpha.alpha_LBTJ)

    def row_gradients(self, batch: TokenBatch) -> RowGradients:
        """Differentiate the mean loss of a micro-batch by the rows that its tokens read; only in a single process.

        No parameter gets a gradient, and layers are recomputed in the backward pass, so beside the model only the
        micro-batch's hidden states, one layer's activations and the rows are held in memory.
        """
        self._refuse_parallel()
        batch = self._here(batch)
        leaves: list[Tensor] = []

        def cut(_: nn.Module, __: object, output_TBD: Tensor) -> Tensor:
            leaves.append(output_TBD.detach().requires_grad_())
            return leaves[-1]

        hook = self.stage.transformers[0].embedding.register_forward_hook(cut)
        try:
            ids_U, normed_UKD = accumulate_row_gradients(self.stage, batch)
        finally:
            hook.remove()
        ids_U, index_BT = torch.unique(batch.tokens_BT, return_inverse=True)
        grad_BTD = leaves[0].grad
        assert grad_BTD is not None
        grad_ND = grad_BTD.transpose(0, 1).flatten(0, 1).float()
        embedding_UD = sum_rows(TokenOrder.sort(index_BT.flatten(), len(ids_U)), grad_ND)
        counts_U = torch.bincount(index_BT.flatten(), minlength=len(ids_U))
        return RowGradients(ids_U, counts_U, embedding_UD, self._before_norm(ids_U, normed_UKD))

    def _before_norm(self, ids_U: Tensor, normed_UKD: Tensor | None) -> Tensor | None:
        """Propagate gradients of normalised rows back through the norm."""
        memory = self.stage.memory.blocks
        if normed_UKD is None or memory is None or memory.tables_WKD is None:
            return None
        rows_UKD = memory.tables_WKD[ids_U].float().requires_grad_()
        with torch.enable_grad():
            row_norm("naive", rows_UKD, memory.gains_KD.float(), memory.norm_eps).backward(normed_UKD)
        return rows_UKD.grad

    def _memory(self) -> MemoryBlocks:
        if self.stage.memory.blocks is None:
            raise ValueError("the model has no memory (K = 0), so there are no rows of it to read")
        return self.stage.memory.blocks

    def _here(self, batch: TokenBatch) -> TokenBatch:
        return TokenBatch(*(x.to(self.device.torch_device) for x in batch))

    def _refuse_parallel(self) -> None:
        parallel = self.config.parallel
        if parallel.tensor * parallel.pipeline > 1:
            raise ValueError("only a model in one process can be looked into: leave tensor and pipeline at 1")

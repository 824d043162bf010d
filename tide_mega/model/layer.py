"""The TIDE layer: megatron-core's transformer layer with a router and an injection, and the memory that it reads.

`EmbeddingMemory` holds the K tables and their norms; `MemoryBoard` is what all layers of a stage read from;
`TideLayer` is the layer.

`order_to_model`, `take_order` and `leave_order` are the only code that knows how megatron-core carries a
micro-batch's token order to the layers. A decoder-only GPTModel hands `extra_block_kwargs` to its block, and the
block passes `context` to every layer and through activation recompute without using it; this holds for 0.16 to
0.19. Since 0.19 GPTModel is deprecated in favour of HybridModel, which takes no `extra_block_kwargs` and whose
block passes no `context`: there the order will need another route, which must bring each micro-batch's own order
to its recompute too.

Dimensions: U distinct token types of the step, K memory blocks, J = K + 1, D hidden size, W rows of the tables
on this rank, S tokens of the sequence on this rank, B sequences.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.tensor_parallel import checkpoint
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from tide_mega.kernels.choice import KernelChoice
from tide_mega.kernels.mix import mix
from tide_mega.kernels.norm_router import norm_and_route
from tide_mega.kernels.row_gradient import RowGradient
from tide_mega.kernels.row_norm import row_norm
from tide_mega.kernels.token_order import TokenOrder
from tide_mega.memory.exchange import gather_rows


def order_to_model(packed: Tensor | None) -> dict[str, Any]:
    """Return the keyword arguments of the model's forward pass that carry a packed TokenOrder."""
    return {"extra_block_kwargs": {"context": packed}}


def take_order(arguments: dict[str, Any]) -> Tensor | None:
    """Pop the packed order from a layer's keyword arguments."""
    return arguments.pop("context", None)


def leave_order(hidden: Tensor, packed: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return a layer's outputs, including the order for the next layer."""
    return hidden, packed


class EmbeddingMemory(nn.Module):
    """K MemoryBlocks, M_k(v) = RMSNorm(E_k[v]) (paper 3.3).

    With a `group` the tables are a parameter, sharded by rows over that tensor-parallel group. Without one, their
    rows are owned outside the model (`tide_mega.memory.owned`) and only the gains of the norms live here.
    """

    def __init__(
        self,
        num_blocks: int,
        vocab_size: int,
        width: int,
        norm_eps: float,
        norm_version: str,
        group: ProcessGroup | None,
    ) -> None:
        super().__init__()
        self.norm_version = norm_version
        self.group = group
        self.norm_eps = norm_eps
        self.tables_WKD: nn.Parameter | None = None
        if group is not None:
            self.tables_WKD = nn.Parameter(torch.empty(vocab_size // group.size(), num_blocks, width))
            # With this attribute DeepSpeed counts the parameter on every model-parallel rank instead of once.
            self.tables_WKD.tensor_model_parallel = group.size() > 1  # type: ignore[attr-defined]
        self.gains_KD = nn.Parameter(torch.ones(num_blocks, width))

    def forward(self, ids_U: Tensor, rows_UKD: Tensor | None = None) -> Tensor:
        """Return the normalised rows M [U, K, D] of distinct ids, in the tables' dtype.

        Args:
            ids_U: distinct ids, ascending.
            rows_UKD: their rows, if the tables are owned outside the model.
        """
        if rows_UKD is None:
            if self.tables_WKD is None or self.group is None:
                raise RuntimeError("tables owned outside the model: give their rows")
            rows_UKD = gather_rows(self.tables_WKD, ids_U, self.group)
        return row_norm(self.norm_version, rows_UKD, self.gains_KD, self.norm_eps)


@dataclass
class MemoryBoard:
    """The rows that a stage's layers read during a step: a plain object, so that no layer owns the tables.

    `rows_UKD` stays unchanged for all micro-batches, so recompute finds the same values. Each layer's backward
    pass adds its part of their gradient to `sink`, and the sum is sent to the tables once, after the last
    micro-batch. The token order of a micro-batch is not on the board: it travels through the block with the
    hidden state.
    """

    kernels: KernelChoice
    rows_UKD: Tensor | None = None
    sink: RowGradient | None = None
    """None if no gradient is wanted."""
    alpha_L: dict[int, list[Tensor]] | None = None
    """If a dictionary, each layer appends its router weights [S, B, J] of each micro-batch, the null bank last,
    under its index from 0."""
    silenced: frozenset[int] = frozenset()
    """Layers, from 0, that skip the memory (paper, appendix H)."""
    rows_of: Callable[[Tensor], Tensor] | None = None
    """If given, replaces the memory in forward passes: returns M [U, K, D] of distinct ids [U]."""

    @contextmanager
    def recording(self) -> Iterator[dict[int, list[Tensor]]]:
        """Collect the layers' router weights within; yields `alpha_L`."""
        before, self.alpha_L = self.alpha_L, {}
        try:
            yield self.alpha_L
        finally:
            self.alpha_L = before

    @contextmanager
    def silencing(self, layers: Iterable[int]) -> Iterator[None]:
        """Leave the memory out of these layers within."""
        before, self.silenced = self.silenced, frozenset(layers)
        try:
            yield
        finally:
            self.silenced = before

    @contextmanager
    def reading_from(self, rows_of: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """Let forward passes within read what `rows_of` gives."""
        before, self.rows_of = self.rows_of, rows_of
        try:
            yield
        finally:
            self.rows_of = before

    def record_alpha(self, layer: int, alpha_SBJ: Tensor) -> None:
        """Record a layer's router weights, if recording is on."""
        if self.alpha_L is not None:
            self.alpha_L.setdefault(layer, []).append(alpha_SBJ)


class TideLayer(TransformerLayer):
    """h_l = h̃_l + FFN(ñ_l) + m_l (paper 3.6); with K = 0 exactly megatron-core's layer.

    The micro-batch's token order arrives packed, as `order_to_model` sends it.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: TransformerLayerSubmodules,
        num_blocks: int,
        board: MemoryBoard,
        layer_number: int = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__(config, submodules, layer_number, **kwargs)
        self.board = board
        self.router_JD: nn.Parameter | None = None
        if num_blocks:
            self.router_JD = nn.Parameter(torch.empty(num_blocks + 1, config.hidden_size))
            self.router_JD.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """Apply attention, then feed-forward network and memory in parallel."""
        packed = take_order(kwargs)
        hidden_SBD, _ = self._forward_attention(*args, **kwargs)
        if self.router_JD is None:
            return leave_order(self._forward_mlp(hidden_SBD), packed)
        if self.layer_number - 1 in self.board.silenced:
            # The weights that a silenced layer amounts to, so that every layer has some on the board.
            all_null_SBJ = hidden_SBD.new_zeros(*hidden_SBD.shape[:2], self.router_JD.size(0))
            all_null_SBJ[..., -1] = 1
            self.board.record_alpha(self.layer_number - 1, all_null_SBJ)
            return leave_order(self._forward_mlp(hidden_SBD), packed)
        mixed_SBD = self._forward_feed_forward(hidden_SBD, self.router_JD, packed)
        return leave_order(mixed_SBD, packed)

    def _forward_feed_forward(self, hidden_SBD: Tensor, router_JD: Tensor, packed: Tensor | None) -> Tensor:
        rows_UKD = self.board.rows_UKD
        if rows_UKD is None or packed is None:
            raise RuntimeError(
                "the memory was not read for this step: a MemoryReading comes before the schedule"
            )
        normed_ND, logits_NJ = self.pre_mlp_layernorm(
            hidden_SBD.flatten(0, 1),
            lambda hidden_ND, gain_D, eps: norm_and_route(
                self.board.kernels.norm_router, hidden_ND, gain_D, router_JD, eps
            ),
        )
        ffn_SBD, _ = self._mlp(normed_ND.view_as(hidden_SBD))
        order = TokenOrder.unpack(packed, logits_NJ.size(0))
        sink = self.board.sink if torch.is_grad_enabled() else None
        out_SBD, alpha_NJ = mix(self.board.kernels.mix, logits_NJ, hidden_SBD, ffn_SBD, rows_UKD, order, sink)
        # Under full recompute the first pass runs without a graph, and this line runs again in the second.
        if torch.is_grad_enabled() or not self.training:
            self.board.record_alpha(self.layer_number - 1, alpha_NJ.view(*hidden_SBD.shape[:2], -1))
        return out_SBD

    def _mlp(self, normed_SBD: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.recompute_mlp and self.training:
            return checkpoint(self.mlp, False, normed_SBD)
        return self.mlp(normed_SBD)

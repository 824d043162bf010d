"""The TIDE layer: megatron-core's transformer layer with a router and an injection.

Shapes: S tokens of the sequence on this rank, B batch, D hidden size, K memory blocks, J = K + 1.
"""

from typing import Any

import torch
from megatron.core.tensor_parallel import checkpoint
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor, nn

from tide_mega.kernels.mix import mix
from tide_mega.kernels.norm_router import norm_and_route
from tide_mega.kernels.token_order import TokenOrder
from tide_mega.model import token_way
from tide_mega.model.memory import MemoryBoard


class TideLayer(TransformerLayer):
    """h_l = h̃_l + FFN(ñ_l) + m_l (paper 3.6); with K = 0 exactly megatron-core's layer.

    The order of the microbatch's tokens arrives, packed, by the way of `tide_mega.model.token_way`.
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
        """Attention, then feed-forward and memory side by side."""
        packed = token_way.taken_by_layer(kwargs)
        hidden_SBD, _ = self._forward_attention(*args, **kwargs)
        if self.router_JD is None:
            return token_way.left_by_layer(self._forward_mlp(hidden_SBD), packed)
        if self.layer_number - 1 in self.board.silenced:
            # What silence amounts to, so that every layer has weights on the board.
            all_null_SBJ = hidden_SBD.new_zeros(*hidden_SBD.shape[:2], self.router_JD.size(0))
            all_null_SBJ[..., -1] = 1
            self.board.record_alpha(self.layer_number - 1, all_null_SBJ)
            return token_way.left_by_layer(self._forward_mlp(hidden_SBD), packed)
        mixed_SBD = self._forward_feed_forward(hidden_SBD, self.router_JD, packed)
        return token_way.left_by_layer(mixed_SBD, packed)

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
        # Under full recompute the first pass runs without a graph, and this line is met again in the second.
        if torch.is_grad_enabled() or not self.training:
            self.board.record_alpha(self.layer_number - 1, alpha_NJ.view(*hidden_SBD.shape[:2], -1))
        return out_SBD

    def _mlp(self, normed_SBD: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.recompute_mlp and self.training:
            return checkpoint(self.mlp, False, normed_SBD)
        return self.mlp(normed_SBD)

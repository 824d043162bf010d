"""The TIDE layer: megatron-core's transformer layer with a router and an injection.

Shapes: S tokens of the sequence on this rank, B batch, D hidden size, K memory blocks, J = K + 1.
"""

from typing import Any

import torch
from megatron.core.tensor_parallel import checkpoint
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor, nn

from tide_mega.kernels.mix import mix_by_index
from tide_mega.model.memory import MemoryBoard


class TideLayer(TransformerLayer):
    """h_l = h̃_l + FFN(ñ_l) + m_l (paper 3.6); with K = 0 exactly megatron-core's layer.

    The token index of the microbatch arrives as megatron's `context` argument, which a decoder-only block
    carries to every layer, and through activation recompute, without using it.
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
        """Attention, then feed-forward and memory side by side; `context` is the index [S, B]."""
        index_SB = kwargs.pop("context", None)
        hidden_SBD, _ = self._forward_attention(*args, **kwargs)
        return self._forward_feed_forward(hidden_SBD, index_SB), index_SB

    def _forward_feed_forward(self, hidden_SBD: Tensor, index_SB: Tensor | None) -> Tensor:
        if self.router_JD is None:
            return self._forward_mlp(hidden_SBD)
        normed_SBD = self._forward_pre_mlp_layernorm(hidden_SBD)
        output_SBD, _ = self._mlp(normed_SBD)
        injected_SBD = self._injection(normed_SBD, self.router_JD, index_SB)
        return self._forward_post_mlp((output_SBD + injected_SBD, None), hidden_SBD)

    def _mlp(self, normed_SBD: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.recompute_mlp and self.training:
            return checkpoint(self.mlp, False, normed_SBD)
        return self.mlp(normed_SBD)

    def _injection(self, normed_SBD: Tensor, router_JD: Tensor, index_SB: Tensor | None) -> Tensor:
        rows_UKD = self.board.rows_UKD
        if rows_UKD is None or index_SB is None:
            raise RuntimeError(
                "the memory was not read for this step: put a MemoryStep on the board before the forward pass"
            )
        injected_ND, null_N = mix_by_index(normed_SBD.flatten(0, 1), router_JD, rows_UKD, index_SB.flatten())
        # Under full recompute the first pass runs without a graph, and this line is met again in the second.
        if torch.is_grad_enabled() or not self.training:
            self.board.record_null_weights(self.layer_number - 1, null_N.view_as(index_SB))
        return injected_ND.view_as(normed_SBD)

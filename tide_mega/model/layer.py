"""The TIDE layer: megatron-core's transformer layer with a router and an injection.

`order_to_model`, `take_order` and `leave_order` are the only code that knows how megatron-core carries a
micro-batch's token order to the layers. A decoder-only GPTModel hands `extra_block_kwargs` to its block, and the
block passes `context` to every layer and through activation recompute without using it; this holds for 0.16 to
0.19. Since 0.19 GPTModel is deprecated in favour of HybridModel, which takes no `extra_block_kwargs` and whose
block passes no `context`: there the order will need another route, which must bring each micro-batch's own order
to its recompute too.

Dimensions: U distinct token types of the step, K memory blocks, J = K + 1, D hidden size, S tokens of the sequence
on this rank, B sequences, N = S B.
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
from tide_mega.memory.memory import Memory


def order_to_model(packed: Tensor | None) -> dict[str, Any]:
    """Return the keyword arguments of the model's forward pass that carry a packed TokenOrder."""
    return {"extra_block_kwargs": {"context": packed}}


def take_order(arguments: dict[str, Any]) -> Tensor | None:
    """Pop the packed order from a layer's keyword arguments."""
    return arguments.pop("context", None)


def leave_order(hidden: Tensor, packed: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return a layer's outputs, including the order for the next layer."""
    return hidden, packed


class TideLayer(TransformerLayer):
    """h_l = h̃_l + FFN(ñ_l) + m_l (paper 3.6); with K = 0 exactly megatron-core's layer.

    The micro-batch's token order arrives packed, as `order_to_model` sends it.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: TransformerLayerSubmodules,
        memory: Memory,
        layer_number: int = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__(config, submodules, layer_number, **kwargs)
        self.memory = memory
        self.router_JD: nn.Parameter | None = None
        if memory.num_blocks:
            self.router_JD = nn.Parameter(torch.empty(memory.num_blocks + 1, config.hidden_size))
            self.router_JD.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """Apply attention, then feed-forward network and memory in parallel."""
        packed = take_order(kwargs)
        hidden_SBD, _ = self._forward_attention(*args, **kwargs)
        if self.router_JD is None:
            return leave_order(self._forward_mlp(hidden_SBD), packed)
        if self.layer_number - 1 in self.memory.silenced:
            # The weights that a silenced layer amounts to, so that every layer has recorded some.
            all_null_SBJ = hidden_SBD.new_zeros(*hidden_SBD.shape[:2], self.router_JD.size(0))
            all_null_SBJ[..., -1] = 1
            self.memory.record_alpha(self.layer_number - 1, all_null_SBJ)
            return leave_order(self._forward_mlp(hidden_SBD), packed)
        mixed_SBD = self._forward_feed_forward(hidden_SBD, self.router_JD, packed)
        return leave_order(mixed_SBD, packed)

    def _forward_feed_forward(self, hidden_SBD: Tensor, router_JD: Tensor, packed: Tensor | None) -> Tensor:
        rows_UKD = self.memory.rows_UKD
        if rows_UKD is None or packed is None:
            raise RuntimeError("the memory was not read for this step: Memory.read goes around the schedule")
        normed_ND, logits_NJ = self.pre_mlp_layernorm(
            hidden_SBD.flatten(0, 1),
            lambda hidden_ND, gain_D, eps: norm_and_route(
                self.memory.kernels.norm_router, hidden_ND, gain_D, router_JD, eps
            ),
        )
        ffn_SBD, _ = self._mlp(normed_ND.view_as(hidden_SBD))
        order = TokenOrder.unpack(packed, logits_NJ.size(0))
        sink = self.memory.sink if torch.is_grad_enabled() else None
        out_SBD, alpha_NJ = mix(
            self.memory.kernels.mix, logits_NJ, hidden_SBD, ffn_SBD, rows_UKD, order, sink
        )
        # Under full recompute the first pass runs without a graph, and this line runs again in the second.
        if torch.is_grad_enabled() or not self.training:
            self.memory.record_alpha(self.layer_number - 1, alpha_NJ.view(*hidden_SBD.shape[:2], -1))
        return out_SBD

    def _mlp(self, normed_SBD: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.recompute_mlp and self.training:
            return checkpoint(self.mlp, False, normed_SBD)
        return self.mlp(normed_SBD)

"""Translates this project's configuration to megatron-core's: TransformerConfig and the layer's ModuleSpec."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

from tide_mega.config.schema import ModelConfig, ParallelConfig
from tide_mega.memory.memory import Memory
from tide_mega.model.layer import TideLayer
from tide_mega.model.modules import CausalCoreAttention, RMSNorm
from tide_mega.parallel.device import DTYPES

RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "mlp"]},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}


def _leave(weight: torch.Tensor) -> torch.Tensor:
    return weight


def transformer_config(
    model: ModelConfig,
    parallel: ParallelConfig,
    precision: str,
    device: torch.device,
    compile_kernels: bool = False,
) -> TransformerConfig:
    """Return megatron-core's configuration: no dropout, no biases, no fusion that needs a GPU library.

    With `compile_kernels` megatron's SwiGLU is compiled on CUDA.
    """
    dtype = DTYPES[precision]
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        kv_channels=model.hidden_size // model.num_attention_heads,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=(
            parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None
        ),
        # With the defaults, megatron-core (0.16 to 0.19) is silently wrong when two stages interleave.
        overlap_p2p_comm=parallel.virtual_pipeline > 1,
        batch_p2p_comm=parallel.virtual_pipeline == 1,
        # Only torch before 1.13 needs a device synchronisation after a batched exchange.
        batch_p2p_sync=False,
        sequence_parallel=parallel.sequence_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=precision == "bf16",
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_activation_fusion=compile_kernels and device.type == "cuda",
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        apply_rope_fusion=False,
        # tide_mega.model.weights sets the weights, the same for every topology. Megatron's own initialisation
        # stays on because it also marks which parameters are sharded.
        init_method=_leave,
        output_layer_init_method=_leave,
        embedding_init_method=_leave,
        use_cpu_initialization=device.type == "cpu",
        **RECOMPUTE[parallel.recompute],
    )


def block_spec(
    config: TransformerConfig,
    memory: Memory,
    vp_stage: int | None = None,
    *,
    rope_theta: float,
    compile_kernels: bool = False,
) -> TransformerBlockSubmodules:
    """Return the stage's layers: TIDE layers of megatron's attention and MLP, our norm and core attention."""
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=ColumnParallelLinear,
            core_attention=partial(
                CausalCoreAttention, rope_theta=rope_theta, compile_kernels=compile_kernels
            ),
            linear_proj=RowParallelLinear,
            q_layernorm=IdentityOp,
            k_layernorm=IdentityOp,
        ),
    )
    mlp = ModuleSpec(
        module=MLP,
        submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
    )
    layer = ModuleSpec(
        module=TideLayer,
        params={"memory": memory},
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
        ),
    )
    return TransformerBlockSubmodules(
        layer_specs=[layer] * get_num_layers_to_build(config, vp_stage), layer_norm=RMSNorm
    )

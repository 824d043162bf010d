"""Maps weight names between ours (`tide_mega.model.canonical`) and those of transformers' Llama."""

import re

_OUTSIDE = {
    "embedding.weight": "model.embed_tokens.weight",
    "final_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_OF_LAYER = {
    "attention_norm.weight": "input_layernorm.weight",
    "attention.query.weight": "self_attn.q_proj.weight",
    "attention.key.weight": "self_attn.k_proj.weight",
    "attention.value.weight": "self_attn.v_proj.weight",
    "attention.output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn.gate.weight": "mlp.gate_proj.weight",
    "ffn.up.weight": "mlp.up_proj.weight",
    "ffn.down.weight": "mlp.down_proj.weight",
    "router.weight": "router.weight",
}
_OUTSIDE_BACK = {theirs: ours for ours, theirs in _OUTSIDE.items()}
_OF_LAYER_BACK = {theirs: ours for ours, theirs in _OF_LAYER.items()}


def llama_name(name: str) -> str:
    """Return transformers' name for a weight outside the memory.

    Raises:
        KeyError: there is no such weight.
    """
    if layer := re.fullmatch(r"layers\.(\d+)\.(.+)", name):
        return f"model.layers.{layer[1]}.{_OF_LAYER[layer[2]]}"
    return _OUTSIDE[name]


def canonical_name(name: str) -> str:
    """Return our name for a weight of transformers' Llama, or of a router.

    Raises:
        KeyError: there is no such weight.
    """
    if layer := re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name):
        return f"layers.{layer[1]}.{_OF_LAYER_BACK[layer[2]]}"
    return _OUTSIDE_BACK[name]

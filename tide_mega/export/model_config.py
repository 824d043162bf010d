"""Builds config.json and generation_config.json of an exported folder."""

from typing import Any

from tide_mega.config.schema import TideConfig
from tide_mega.export.options import Choice
from tide_mega.hf.rows_tide import RowFormat

NAMES = {"fp32": "float32", "bf16": "bfloat16"}
SIDECAR_FILE = "memory.tide"
_AUTO_MAP = {
    "AutoConfig": "configuration_tide.TideConfig",
    "AutoModel": "modeling_tide.TideModel",
    "AutoModelForCausalLM": "modeling_tide.TideForCausalLM",
}


def model_config(config: TideConfig, choice: Choice, eos_id: int) -> dict[str, Any]:
    """Return config.json without the memory: Llama's keys, enough for K = 0.

    Training puts the end-of-document token between documents, so each document follows one: it serves as BOS, EOS
    and padding token.
    """
    model = config.model
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": NAMES[choice.dtype],
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_query_groups,
        "head_dim": model.hidden_size // model.num_attention_heads,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "max_position_embeddings": config.data.seq_length,
        "rms_norm_eps": model.norm_eps,
        # transformers 5 reads the first, earlier versions the second.
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta},
        "rope_theta": model.rope_theta,
        "initializer_range": model.init_std,
        "tie_word_embeddings": model.tie_embeddings,
        "use_cache": True,
        "bos_token_id": eos_id,
        "eos_token_id": eos_id,
        "pad_token_id": eos_id,
    }


def memory_config(
    row_format: RowFormat, choice: Choice, part_rows: int, fingerprint: str | None, vocabulary: str
) -> dict[str, Any]:
    """Return the keys that K > 0 adds to config.json or replaces in it.

    Args:
        row_format: format of the stored rows.
        choice: whether they are among the weights.
        part_rows: rows of each tensor that the memory is split into.
        fingerprint: the sidecar's.
        vocabulary: fingerprint of the tokenizer's vocabulary, by which another tokenizer is detected.
    """
    return {
        "architectures": ["TideForCausalLM"],
        "model_type": "tide",
        "auto_map": _AUTO_MAP,
        "num_memory_blocks": row_format.num_blocks,
        "memory_format": choice.tables,
        "memory_rank": row_format.rank,
        "memory_part_rows": part_rows,
        "memory_file": SIDECAR_FILE if choice.memory == "sidecar" else None,
        "memory_fingerprint": fingerprint,
        "vocabulary_fingerprint": vocabulary,
    }


def generation_config(eos_id: int) -> dict[str, Any]:
    """Return generation_config.json: greedy by default."""
    return {"bos_token_id": eos_id, "eos_token_id": eos_id, "pad_token_id": eos_id}

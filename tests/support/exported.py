"""Exported folders with random weights, made without a run: a reference model and the files that hold it."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from tide_mega.hf.memory_tide import RowFormat, finished, write_sidecar
from tide_mega.model.reference import ReferenceShape, ReferenceTide
from tide_mega.parallel.device import DTYPES

PART_ROWS = 40


def random_reference(shape: ReferenceShape, seed: int = 0) -> ReferenceTide:
    """Return a model whose every part matters to its logits."""
    torch.manual_seed(seed)
    model = ReferenceTide(shape)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        else:
            torch.nn.init.normal_(parameter, 0, 0.1)
    return model.requires_grad_(False)


def config_of(shape: ReferenceShape, **more: object) -> dict[str, object]:
    """Return config.json of a model with inline tables in fp32, or of a stock Llama for K = 0."""
    config: dict[str, object] = {
        "model_type": "tide" if shape.num_blocks else "llama",
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.ffn_hidden_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_groups,
        "head_dim": shape.head_size,
        "max_position_embeddings": 64,
        "rms_norm_eps": shape.norm_eps,
        "tie_word_embeddings": shape.tie_embeddings,
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_theta},
        "rope_theta": shape.rope_theta,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "dtype": "float32",
    }
    if shape.num_blocks:
        config |= {
            "num_memory_blocks": shape.num_blocks,
            "memory_format": "fp32",
            "memory_part_rows": PART_ROWS,
        }
    return config | more


def base_weights(model: ReferenceTide) -> dict[str, Tensor]:
    """Return everything but the memory, by transformers' names."""
    found = {
        "model.embed_tokens.weight": model.embedding.weight,
        "model.norm.weight": model.final_norm.weight,
    }
    if not model.shape.tie_embeddings:
        found["lm_head.weight"] = model.output.weight
    for number, layer in enumerate(model.layers):
        prefix = f"model.layers.{number}."
        found |= {
            prefix + "input_layernorm.weight": layer.attention_norm.weight,
            prefix + "post_attention_layernorm.weight": layer.ffn_norm.weight,
            prefix + "self_attn.q_proj.weight": layer.attention.query.weight,
            prefix + "self_attn.k_proj.weight": layer.attention.key.weight,
            prefix + "self_attn.v_proj.weight": layer.attention.value.weight,
            prefix + "self_attn.o_proj.weight": layer.attention.output.weight,
            prefix + "mlp.gate_proj.weight": layer.ffn.gate.weight,
            prefix + "mlp.up_proj.weight": layer.ffn.up.weight,
            prefix + "mlp.down_proj.weight": layer.ffn.down.weight,
        }
        if model.shape.num_blocks:
            found[prefix + "router.weight"] = layer.router.weight
    return found


def finished_rows(model: ReferenceTide) -> Tensor:
    """Return M(v) of every id [V, K, D]."""
    gains_KD = torch.stack([norm.weight for norm in model.memory.norms])
    return finished(model.memory.tables_KVD.transpose(0, 1), gains_KD, model.shape.norm_eps, torch.float32)


def random_basis(row_format: RowFormat) -> Tensor | None:
    """Return orthonormal rows [r, K D] for the joint low rank; None for other formats."""
    if row_format.basis_shape is None:
        return None
    rank, columns = row_format.basis_shape
    return torch.linalg.qr(torch.randn(columns, rank))[0].T.contiguous()


def write_folder(
    folder: Path,
    model: ReferenceTide,
    *,
    kind: str | None = None,
    rank: int | None = None,
    sidecar: bool = False,
    shards: int = 1,
    dtype: str = "fp32",
    **config: object,
) -> Path:
    """Write an exported folder.

    Args:
        folder: made here.
        model: its weights.
        kind: of finished rows; None for tables as they were trained.
        rank: with kind=rank.
        sidecar: whether rows are in a file of their own.
        shards: files that the weights are dealt to.
        dtype: of the weights.
        config: more keys of config.json.
    """
    folder.mkdir(parents=True)
    weights = {name: x.to(DTYPES[dtype]) for name, x in base_weights(model).items()}
    V, K, D = model.shape.vocab_size, model.shape.num_blocks, model.shape.hidden_size
    if K and kind is None and not sidecar:
        for number, part in enumerate(model.memory.tables_KVD.transpose(0, 1).split(PART_ROWS)):
            weights[f"model.memory.tables.{number}"] = part
        weights["model.memory.gains"] = torch.stack([norm.weight for norm in model.memory.norms])
    elif K:
        row_format = RowFormat(kind or "fp32", K, D, rank)
        basis = random_basis(row_format)
        config |= {"memory_format": row_format.kind, "memory_rank": rank}
        if sidecar:
            fingerprint = write_sidecar(
                folder / "memory.tide", row_format, V, finished_rows(model).split(16), basis
            )
            config |= {"memory_file": "memory.tide", "memory_fingerprint": fingerprint}
        else:
            records_VR = row_format.encode(finished_rows(model), basis)
            for number, part in enumerate(records_VR.split(PART_ROWS)):
                weights[f"model.memory.records_{number}"] = part
            if basis is not None:
                weights["model.memory.basis"] = basis.bfloat16()
    (folder / "config.json").write_text(json.dumps(config_of(model.shape, **config)))
    _write_weights(folder, {name: x.detach().contiguous() for name, x in weights.items()}, shards)
    write_byte_tokenizer(folder)
    return folder


def _write_weights(folder: Path, weights: dict[str, Tensor], shards: int) -> None:
    if shards == 1:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return
    by_name = {}
    for number in range(shards):
        name = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        part = dict(list(weights.items())[number::shards])
        save_file(part, folder / name, metadata={"format": "pt"})
        by_name |= dict.fromkeys(part, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": by_name}))


def write_byte_tokenizer(folder: Path) -> None:
    """Write a tokenizer whose ids are 0 for the end of a document and 1 to 256 for the bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<|endoftext|>": 0, **{character: 1 + i for i, character in enumerate(alphabet)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"eos_token": "<|endoftext|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))

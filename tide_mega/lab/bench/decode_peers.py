"""Other implementations of Llama at the same base shape, for `tools/bench_decode.py`: transformers and llama.cpp.

Each is used if installed; llama.cpp by xllamacpp. Weights are random, since only time is measured.
"""

import importlib.util
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tide_mega.inference.model_config import ModelShape
from tide_mega.lab.bench.decode import DecodeCase
from tide_mega.parallel.device import DTYPES


def installed(*modules: str) -> bool:
    """Whether all of the modules can be imported."""
    return all(importlib.util.find_spec(module) for module in modules)


def transformers_step(case: DecodeCase, context: int) -> Callable[[Tensor], object]:
    """Return a decoding step of transformers' Llama, without memory, after `context` tokens."""
    from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

    shape = case.shape
    config = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.ffn_hidden_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_groups,
        head_dim=shape.head_size,
        max_position_embeddings=shape.max_positions,
        tie_word_embeddings=shape.tie_embeddings,
        dtype=DTYPES[case.dtype],
    )
    model = LlamaForCausalLM(config).to(case.device, DTYPES[case.dtype]).eval()
    cache = DynamicCache(config=config)

    @torch.inference_mode()
    def step(ids_B: Tensor) -> object:
        return model(input_ids=ids_B[:, None].to(case.device), past_key_values=cache, use_cache=True).logits

    with torch.inference_mode():
        model(
            input_ids=torch.zeros(case.batch, context, dtype=torch.int64),
            past_key_values=cache,
            use_cache=True,
        )
    return step


def llama_cpp(
    shape: ModelShape, kind: str, context: int, blocks: int, tokens: int
) -> list[tuple[float, float]]:
    """Return (CPU seconds, wall seconds) per token of llama.cpp with one thread, for each block of tokens.

    Args:
        shape: of the model.
        kind: f32 or q8_0.
        context: tokens of the prompt, kept from block to block.
        blocks: number of blocks.
        tokens: per block.

    Raises:
        RuntimeError: it did not answer.
    """
    import xllamacpp

    with tempfile.TemporaryDirectory() as folder, _silent():
        path = Path(folder) / "model.gguf"
        write_gguf(path, shape, kind)
        parameters = xllamacpp.CommonParams()
        parameters.model.path = str(path)
        parameters.n_ctx = shape.max_positions
        parameters.n_parallel = 1
        parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
        server = xllamacpp.Server(parameters)
        task = {"prompt": list(range(300, 300 + context)), "n_predict": tokens, "temperature": 0.0}
        task |= {"ignore_eos": True, "cache_prompt": True}
        found = []
        for block in range(blocks + 1):
            cpu = time.process_time()
            answer: Any = server.handle_completions(task)
            cpu = time.process_time() - cpu
            if "timings" not in answer:
                raise RuntimeError(f"llama.cpp answered {str(answer)[:200]}")
            timings = answer["timings"]
            # The prompt's last token is computed once more, and the last token of the answer is not.
            wall = (timings["prompt_ms"] + timings["predicted_ms"]) / 1e3
            if block:
                found.append((cpu / tokens, wall / tokens))
        del server
    return found


def write_gguf(path: Path, shape: ModelShape, kind: str) -> None:
    """Write a Llama with random weights, tied, f32 or q8_0."""
    import gguf
    from gguf.quants import quantize

    writer = gguf.GGUFWriter(str(path), "llama")
    D, F, V = shape.hidden_size, shape.ffn_hidden_size, shape.vocab_size
    queries, keys = shape.num_heads * shape.head_size, shape.num_groups * shape.head_size
    writer.add_block_count(shape.num_layers)
    writer.add_context_length(shape.max_positions)
    writer.add_embedding_length(D)
    writer.add_feed_forward_length(F)
    writer.add_head_count(shape.num_heads)
    writer.add_head_count_kv(shape.num_groups)
    writer.add_layer_norm_rms_eps(shape.norm_eps)
    writer.add_rope_freq_base(shape.rope_theta)
    writer.add_rope_dimension_count(shape.head_size)
    writer.add_vocab_size(V)
    writer.add_tokenizer_model("llama")
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    writer.add_token_list([*tokens, *(f"t{i}" for i in range(V - len(tokens)))])
    writer.add_token_scores([0.0] * V)
    writer.add_token_types([2, 3, 3, *[6] * 256, *[1] * (V - len(tokens))])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    rng = np.random.default_rng(0)

    def matrix(name: str, *size: int) -> None:
        values = rng.standard_normal(size, dtype=np.float32) * np.float32(0.02)
        if kind == "f32":
            writer.add_tensor(name, values)
            return
        q8 = gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(name, quantize(values, q8), raw_dtype=q8)

    matrix("token_embd.weight", V, D)
    writer.add_tensor("output_norm.weight", np.ones(D, dtype=np.float32))
    for layer in range(shape.num_layers):
        prefix = f"blk.{layer}."
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"{prefix}{name}.weight", np.ones(D, dtype=np.float32))
        matrix(f"{prefix}attn_q.weight", queries, D)
        matrix(f"{prefix}attn_k.weight", keys, D)
        matrix(f"{prefix}attn_v.weight", keys, D)
        matrix(f"{prefix}attn_output.weight", D, queries)
        matrix(f"{prefix}ffn_gate.weight", F, D)
        matrix(f"{prefix}ffn_up.weight", F, D)
        matrix(f"{prefix}ffn_down.weight", D, F)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@contextmanager
def _silent() -> Iterator[None]:
    """Silence output that a library writes directly to the process's stdout and stderr."""
    sys.stdout.flush()
    kept = os.dup(1), os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        yield
    finally:
        for number, copy in zip((1, 2), kept, strict=True):
            os.dup2(copy, number)
            os.close(copy)
        os.close(nowhere)

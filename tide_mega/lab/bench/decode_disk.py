"""Memory on disk: a file of random rows, the time to read them uncached, and what a process keeps resident."""

import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from tide_mega.hf.memory_tide import MemoryStore, open_store
from tide_mega.hf.rows_tide import RowFormat
from tide_mega.hf.sidecar_tide import write_sidecar
from tide_mega.inference.decoder import Decoder
from tide_mega.inference.folder import expected_tensors
from tide_mega.inference.model_config import ModelConfig, ModelShape, read_config
from tide_mega.lab.bench.measure import in_fresh_process, resident
from tide_mega.parallel.device import DTYPES

_CHUNK_ROWS = 1024
_BASE_FILE, _ROUTER_FILE = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
_TYPES = {"fp32": "float32", "bf16": "bfloat16"}


def write_random_sidecar(path: Path, row_format: RowFormat, rows: int) -> str:
    """Write a file of random rows, a thousand distinct ones repeated; return its fingerprint."""
    rows_NKD = torch.randn(min(rows, _CHUNK_ROWS), row_format.num_blocks, row_format.width)

    def chunks() -> Iterator[Tensor]:
        for first in range(0, rows, _CHUNK_ROWS):
            yield rows_NKD[: rows - first]

    return write_sidecar(path, row_format, rows, chunks())


def forget(path: Path) -> None:
    """Ask the system to drop a file from the page cache."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def cold_prompt_seconds(
    path: Path, row_format: RowFormat, rows: int, tokens: int, repeats: int
) -> list[float]:
    """Return the seconds to fetch the rows of a prompt of distinct tokens, each time from an uncached file."""
    seconds = []
    for repeat in range(repeats):
        forget(path)
        ids_N = torch.randperm(rows, generator=torch.Generator().manual_seed(repeat))[:tokens]
        store = open_store(path, row_format, rows=rows, fingerprint=None, place="disk")
        begin = time.perf_counter()
        store.prefetch(ids_N)
        store.rows(ids_N, torch.float32)
        seconds.append(time.perf_counter() - begin)
        store.close()
    return seconds


def write_folders(root: Path, shape: ModelShape, num_blocks: int, kind: str, dtype: str) -> tuple[Path, Path]:
    """Write folders of a random base model, without and with a memory on disk; they share the base's file."""
    base, tide = root / "k0", root / f"k{num_blocks}"
    for folder in (base, tide):
        folder.mkdir()
    config = {
        "model_type": "llama",
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.ffn_hidden_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_groups,
        "head_dim": shape.head_size,
        "max_position_embeddings": shape.max_positions,
        "rms_norm_eps": shape.norm_eps,
        "rope_theta": shape.rope_theta,
        "tie_word_embeddings": shape.tie_embeddings,
        "dtype": _TYPES[dtype],
    }
    (base / "config.json").write_text(json.dumps(config))
    weights = _random_weights(read_config(base), dtype)
    save_file(weights, base / _BASE_FILE, metadata={"format": "pt"})
    _write_index(base, dict.fromkeys(weights, _BASE_FILE))
    row_format = RowFormat(kind, num_blocks, shape.hidden_size)
    fingerprint = write_random_sidecar(tide / "memory.tide", row_format, shape.vocab_size)
    config |= {"model_type": "tide", "num_memory_blocks": num_blocks, "memory_format": kind}
    config |= {"memory_file": "memory.tide", "memory_fingerprint": fingerprint}
    (tide / "config.json").write_text(json.dumps(config))
    routers = {
        name: tensor
        for name, tensor in _random_weights(read_config(tide), dtype, "router").items()
        if "router" in name
    }
    (tide / _BASE_FILE).hardlink_to(base / _BASE_FILE)
    save_file(routers, tide / _ROUTER_FILE, metadata={"format": "pt"})
    _write_index(tide, {**dict.fromkeys(weights, _BASE_FILE), **dict.fromkeys(routers, _ROUTER_FILE)})
    return base, tide


def _random_weights(config: ModelConfig, dtype: str, having: str = "") -> dict[str, Tensor]:
    return {
        name: torch.empty(expected.shape).normal_(0, 0.02).to(DTYPES[dtype])
        for name, expected in expected_tensors(config).items()
        if having in name
    }


def _write_index(folder: Path, files: dict[str, str]) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))


def resident_bytes(folder: Path, dtype: str, cache: float, tokens: int) -> dict[str, int]:
    """Return the resident bytes of a fresh process after decoding `tokens` tokens of one text; Linux.

    Raises:
        RuntimeError: the process failed.
    """
    task = {"folder": str(folder), "dtype": dtype, "cache": cache, "tokens": tokens}
    return in_fresh_process("tide_mega.lab.bench.decode_disk", task, threads=1)


def _decode_here(folder: str, dtype: str, cache: float, tokens: int) -> dict[str, int]:
    torch.set_num_threads(1)
    decoder = Decoder.open(folder, dtype=dtype, memory="disk", cache=cache, max_length=tokens + 1)
    generator = torch.Generator().manual_seed(0)
    decoder.prefill([[0]])
    for _ in range(tokens):
        decoder.step(torch.randint(decoder.weights.shape.vocab_size, (1,), generator=generator))
    return {"resident": resident("VmRSS"), "cache": _cache_bytes(decoder.weights.memory)}


def _cache_bytes(store: MemoryStore | None) -> int:
    """Return the capacity in bytes of a disk store's cache."""
    return 0 if store is None else store.capacity * store.format.record_bytes  # type: ignore[attr-defined]


if __name__ == "__main__":
    print(json.dumps(_decode_here(**json.loads(sys.argv[1]))))

"""A run folder with a checkpoint of random weights: models of any size to measure with, without training.

The checkpoint has weights only, without the optimizer's moments: it can be exported, generated from and inspected,
but not trained on. Writing it takes less than a few hundred megabytes of memory whatever the model.
"""

import hashlib
import json
import secrets
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tide_mega.checkpoint.folder import CheckpointFolder
from tide_mega.checkpoint.state import Identity, SavedState, TrainingState
from tide_mega.checkpoint.storage import INDEX_FILE, FileRecord
from tide_mega.config.hydra_door import to_yaml
from tide_mega.config.schema import TideConfig
from tide_mega.data.frequency import UNSEEN, DecileTable
from tide_mega.data.index import DatasetIndex
from tide_mega.export.shards import Entry, plan_shards, write_file
from tide_mega.model.canonical import GAINS, TABLES
from tide_mega.model.reference import ReferenceShape, ReferenceTide

CHUNK_ELEMENTS = 2**22


def write_random_run(folder: Path, config: TideConfig, *, step: int = 1, seed: int = 0) -> Path:
    """Write a run of `config` that claims to be trained for `step` steps; return `folder`.

    Matrices are drawn with `model.init_std`, rows of the tables with `memory.table_init_std`, routers with their
    `router_init_std` or 0.5, gains around 1. The dataset of `data.path` must exist.
    """
    data = Path(config.data.path)
    bins = DecileTable.load(data).bin_of_type
    bins = np.pad(bins, (0, config.model.vocab_size - len(bins)), constant_values=UNSEEN)
    identity = Identity.of(config, DatasetIndex.load(data).fingerprint, bins.tobytes(), 1)
    progress = TrainingState()
    for _ in range(step):
        progress.take(config.trainer.global_batch_size, config.data.seq_length)
    state = SavedState(secrets.token_hex(8), progress, step, identity)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    checkpoints = CheckpointFolder(folder / "checkpoints")
    checkpoints.prepare(step)
    files = _write_weights(checkpoints.partial(step), config, state.save_id, seed)
    checkpoints.commit(step, state.save_id, state.dump(), files)
    return folder


def _write_weights(folder: Path, config: TideConfig, save_id: str, seed: int) -> dict[str, FileRecord]:
    entries = [_entry(config, name, shape, seed) for name, shape in canonical_shapes(config).items()]
    files, index = {}, {}
    for number, shard in enumerate(plan_shards(entries)):
        path = folder / f"rank-{number:05d}.safetensors"
        write_file(path, shard)
        files[path.name] = FileRecord.of(path)
        for entry in shard:
            name, origin = entry.name.partition("@")[0], [0] * len(entry.shape)
            index[name] = {"shape": entry.shape, "boxes": [[origin, entry.shape, path.name]]}
    path = folder / INDEX_FILE
    path.write_text(json.dumps({"save_id": save_id, "tensors": index}), encoding="utf-8")
    return {**files, path.name: FileRecord.of(path)}


def canonical_shapes(config: TideConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of every weight of a model, by the names of `tide_mega.model.canonical`."""
    model, K = config.model, config.memory.num_blocks
    with torch.device("meta"):
        reference = ReferenceTide(ReferenceShape.of(model, K))
    named = reference.named_parameters()
    shapes = {name: tuple(p.shape) for name, p in named if not name.startswith("memory.")}
    memory = {TABLES: (model.vocab_size, K, model.hidden_size), GAINS: (K, model.hidden_size)}
    return {**shapes, **memory} if K else shapes


def _entry(config: TideConfig, name: str, shape: tuple[int, ...], seed: int) -> Entry:
    key = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    mean, std = _distribution(config, name)

    def pieces() -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(int.from_bytes(key, "little", signed=True))
        step = max(1, CHUNK_ELEMENTS // max(1, int(np.prod(shape[1:]))))
        for first in range(0, shape[0], step):
            size = (min(step, shape[0] - first), *shape[1:])
            yield torch.randn(size, generator=generator).mul_(std).add_(mean)

    at = ",".join("0" for _ in shape)
    return Entry(f"master/{name}@{at}", torch.float32, shape, pieces)


def _distribution(config: TideConfig, name: str) -> tuple[float, float]:
    """Return mean and standard deviation of a weight's distribution."""
    if "norm" in name or name == GAINS:
        return 1.0, 0.1
    if name == TABLES:
        return 0.0, config.memory.table_init_std
    if name.endswith("router.weight"):
        return 0.0, config.memory.router_init_std or 0.5
    return 0.0, config.model.init_std

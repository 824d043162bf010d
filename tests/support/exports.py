"""Exported folders of random runs, and the plain reference with the same weights."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from tests.support.runs import tiny
from tests.support.trained import reference_of
from tide_mega.export.export import export
from tide_mega.export.options import ExportOptions
from tide_mega.lab.bench.random_run import write_random_run
from tide_mega.trained.run import TrainedRun

WITHOUT_MEMORY = ("memory=none",)
UNTIED = ("model.tie_embeddings=false", "model.num_query_groups=4")


@dataclass(frozen=True)
class RandomRun:
    """A run of random weights."""

    folder: Path

    @cached_property
    def run(self) -> TrainedRun:
        """Opened."""
        return TrainedRun.open(self.folder)

    @torch.no_grad()
    def logits(self, ids_BT: Tensor) -> Tensor:
        """Return the reference's [B, T, V]."""
        return reference_of(self.run).logits(ids_BT)[0]

    def export(self, out: Path, **options: object) -> Path:
        """Export it in fp32 unless told otherwise; return the folder."""
        chosen = {"dtype": "fp32", **options}
        return export(ExportOptions(run=str(self.folder), out=str(out), **chosen), progress=False).folder


def random_run(
    data: Path, root: Path, *overrides: str, name: str = "random", step: int = 1, seed: int = 0
) -> RandomRun:
    """Write a run with K = 2, two layers and grouped queries, unless the overrides say otherwise."""
    words = ("model.init_std=0.2", "memory.router_init_std=0.5", "memory.table_init_std=0.5")
    words = words if "memory=none" not in overrides else words[:1]
    config = tiny(data, root, *words, *overrides, f"run.name={name}")
    return RandomRun(write_random_run(root / name, config, step=step, seed=seed))


def load(folder: Path, **kwargs: object):
    """Load an exported folder by transformers."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **kwargs).eval()

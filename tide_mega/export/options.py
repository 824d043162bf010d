"""Options of `python -m tide_mega.export`."""

import math
import re
from dataclasses import dataclass

from omegaconf import MISSING

from tide_mega.errors import refuse

DTYPES = ("fp32", "bf16")
FORMATS = ("fp32", "bf16", "int8", "int4", "nf4")
_RANK = re.compile(r"rank:(\d*\.?\d+)")


@dataclass
class ExportOptions:
    """Arguments of an export."""

    run: str = MISSING
    """A run folder, or a checkpoint in one (runs/x/checkpoints/step-00000500)."""
    out: str = MISSING
    """The folder to make."""
    step: int | None = None
    """Which checkpoint of the run folder, by its step; null takes the newest whole one."""
    dtype: str = "bf16"
    """bf16 or fp32, of the weights outside the memory, and of the computation where they are loaded."""
    tables: str | None = None
    """How the memory's rows are stored: bf16 or fp32; int8 (a scale a row), int4 (a scale for 32 elements), nf4
    (for 64), or rank:p, the share p of the joint rank of all tables. null means `dtype`."""
    memory: str = "inline"
    """inline: the memory is among the weights, and tables in bf16 or fp32 can be trained on. sidecar: it is a file
    of its own with all rows of a token side by side, which can stay in host memory or on disk."""
    overwrite: bool = False
    """Whether an export that `out` holds is replaced, once the new one is whole. Nothing else is ever removed."""
    data: str | None = None
    """Where the prepared dataset, which has the tokenizer, lies now (its index, deciles and tokenizer are enough);
    null means where the run's configuration says."""
    license: str | None = None
    """For the model card, as the hub spells it (apache-2.0, llama3.1, other); null leaves it to be filled in."""
    name: str | None = None
    """The model's name in its card; null means the run's."""


@dataclass(frozen=True)
class Choice:
    """How weights are stored: the options that determine a folder's bytes."""

    dtype: str = "bf16"
    tables: str = "bf16"
    """fp32, bf16, int8, int4, nf4 or rank."""
    rank: float | None = None
    """With tables=rank, the share of K d kept."""
    memory: str = "inline"

    @property
    def is_trained(self) -> bool:
        """Whether tables are stored as trained, with the gains of their norms, rather than as finished rows."""
        return self.memory == "inline" and self.tables in DTYPES

    def columns(self, num_blocks: int, width: int) -> int | None:
        """Return r, the number of columns of the joint basis; None unless tables=rank."""
        return None if self.rank is None else math.ceil(self.rank * num_blocks * width)


def choose(options: ExportOptions) -> Choice:
    """Return the storage choice that the options make.

    Raises:
        ConfigError: an unknown value, or two that exclude each other.
    """
    for name, allowed in (("dtype", DTYPES), ("memory", ("inline", "sidecar"))):
        if (value := getattr(options, name)) not in allowed:
            refuse(name, value, "is not known", f"use {' or '.join(allowed)}")
    if options.step is not None and options.step < 1:
        refuse("step", options.step, "is no step of a checkpoint", "use 1 or more, or null for the newest")
    for name in ("license", "name"):
        if (text := getattr(options, name)) is not None and not text.strip():
            refuse(name, repr(text), "is blank", "leave it out")
    tables, rank = options.tables or options.dtype, None
    if found := _RANK.fullmatch(tables):
        tables, rank = "rank", float(found[1])
        if not 0 < rank <= 1:
            refuse("tables", options.tables, "is not a part of the rank", "use rank:p with 0 < p <= 1")
    elif tables not in FORMATS:
        refuse("tables", options.tables, "is not known", f"use {', '.join(FORMATS)} or rank:0.5, say")
    if tables == "fp32" and options.dtype == "bf16" and options.memory == "inline":
        why = "would be cast to dtype=bf16 whenever the weights are loaded"
        refuse("tables", tables, why, "use tables=bf16, dtype=fp32, or memory=sidecar")
    return Choice(options.dtype, tables, rank, options.memory)

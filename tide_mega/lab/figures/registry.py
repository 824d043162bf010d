"""Lists every figure, in the order of the report, and defines the options of an analysis."""

import difflib
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from omegaconf import MISSING

from tide_mega.data.prepare.compressed import MAX_DOCUMENT_BYTES
from tide_mega.errors import ConfigError

if TYPE_CHECKING:  # at run time `--help` would wait for torch and megatron-core
    from tide_mega.lab.figures.analysis import Analysis
    from tide_mega.lab.figures.section import Section


@dataclass
class AnalyzeOptions:
    """Arguments of an analysis."""

    run: list[str] = MISSING
    """Run folders, or checkpoints in them (runs/x/checkpoints/step-00000500), each as `path` or `label=path`. The
    baseline and TIDE together give the comparisons."""
    which: list[str] = field(default_factory=lambda: ["all"])
    """Diagnostics to make; all of them, or names that --help lists."""
    out: str | None = None
    """Folder for data, figures and report.html; null means `analysis` in the folder of the run given last."""
    data: str | None = None
    """Where the prepared dataset lies now; null means where the runs' configuration says."""
    texts: list[str] = field(default_factory=list)
    """Text files on which perplexity is measured, besides the held-out split."""
    sequences: int = 64
    """Held-out sequences that models are run on."""
    text_tokens: int = 65_536
    """Most tokens read of each text file; 0 reads all."""
    max_document_bytes: int = MAX_DOCUMENT_BYTES
    """Most bytes of one document of them (a plain text is one, and so is a JSON line), decompressed."""
    batch: int = 8
    """Sequences in one forward pass."""
    templates: int = 150
    """Template sentences for the distances of token pairs, at most 150."""
    decode_tokens: int = 256
    """Tokens that each run decodes to time one; the paper averages over 5,120."""
    precision: str = "fp32"
    """fp32 or bf16, of models while they are run."""
    device: str = "auto"
    """auto, cpu or cuda."""
    seed: int = 0
    """Of everything that is sampled."""
    fresh: bool = False
    """Whether to remake sections that an earlier analysis of the same checkpoints left in `out`."""


@dataclass(frozen=True)
class Diagnostic:
    """A module of this package whose `run` makes one section."""

    name: str
    shows: str
    """The paper's figure, table or equation."""
    title: str
    """Of its section in the report."""
    about: str
    module: str
    options: tuple[str, ...] = ()
    """Options that its result depends on, besides `precision` and `seed`."""
    reads: str = "metrics.jsonl"
    """File of the run folder that it reads in addition to checkpoints."""

    def load(self) -> "Callable[[Analysis], Section]":
        """Import the function that makes the section."""
        return importlib.import_module(f"tide_mega.lab.figures.{self.module}").run


DIAGNOSTICS = (
    Diagnostic(
        "updates",
        "Equation 2.2, Table 1",
        "Gradients that a token is expected to get",
        "expected gradient updates of a token",
        "updates",
    ),
    Diagnostic(
        "norms",
        "Figure 1",
        "Norms of embedding rows by frequency",
        "norms of embedding rows by decile, and their growth",
        "norms",
    ),
    Diagnostic(
        "separation",
        "Figures 2 and 6",
        "Distance between the hidden states of token pairs in the same context",
        "distance of token pairs in every layer",
        "separation",
        options=("templates",),
    ),
    Diagnostic(
        "storage",
        "Figure 4",
        "Bytes in memory and on disk",
        "bytes in memory and on disk by K and format",
        "storage",
    ),
    Diagnostic(
        "deciles", "Figure 5", "Held-out loss by frequency decile", "held-out loss by decile", "deciles"
    ),
    Diagnostic(
        "blocks",
        "Figure 7",
        "Rare, mid and common tokens against the number of memory blocks",
        "loss of rare, mid and common tokens against K",
        "blocks",
    ),
    Diagnostic(
        "perplexity",
        "Figure 8",
        "Perplexity of texts against training tokens",
        "perplexity of texts against training tokens",
        "perplexity",
        options=("sequences", "texts", "text_tokens"),
    ),
    Diagnostic(
        "distances",
        "Figure 9",
        "Cosine distances between the input embedding and the memory's tables",
        "cosine distance between the embedding and the tables",
        "distances",
    ),
    Diagnostic(
        "routing",
        "Figure 10",
        "Router weights of the memory blocks and of the null bank",
        "router weights and null bank, by layer and decile",
        "routing",
        options=("sequences",),
    ),
    Diagnostic(
        "silencing",
        "Figure 11",
        "Perplexity with the memory of one layer left out",
        "perplexity with one layer's memory left out",
        "silencing",
        options=("sequences", "texts", "text_tokens"),
    ),
    Diagnostic(
        "zero_shot",
        "Table 2",
        "Zero-shot tasks",
        "zero-shot tasks, as python -m tide_mega.evaluate left them",
        "zero_shot",
        reads="evaluation/zero_shot.json",
    ),
    Diagnostic(
        "decoding",
        "Table 4",
        "Time of a decoded token",
        "time of a decoded token by K, on this machine",
        "decoding",
        options=("sequences", "decode_tokens", "device"),
    ),
    Diagnostic(
        "precision",
        "Table 5",
        "Perplexity by the precision of the tables",
        "perplexity by the precision of the tables",
        "precision",
        options=("sequences", "texts", "text_tokens"),
    ),
    Diagnostic(
        "rank",
        "Figure 12",
        "Perplexity with tables of a lower rank",
        "perplexity with tables of a lower rank",
        "rank",
        options=("sequences", "texts", "text_tokens"),
    ),
    Diagnostic(
        "neighbours",
        "Table 6, Figure 13",
        "Nearest neighbours in the input embedding and in the memory's tables",
        "nearest neighbours under every table",
        "neighbours",
    ),
    Diagnostic(
        "curves", "Figure 14", "Training loss against tokens", "training loss against tokens", "curves"
    ),
    Diagnostic(
        "null_bound",
        "Proposition 3.1",
        "The null bank can silence the memory",
        "the null bank can switch the memory off",
        "null_bound",
        options=("sequences",),
    ),
    Diagnostic(
        "pathways",
        "Proposition 3.2",
        "Squared gradients of the tables' rows",
        "squared gradients over the K tables",
        "pathways",
        options=("sequences", "batch"),
    ),
    Diagnostic(
        "identity",
        "Proposition 3.3",
        "The memory separates tokens whose hidden states are close",
        "the memory separates any pair of tokens",
        "identity",
        options=("sequences",),
    ),
)


def chosen(which: Sequence[str]) -> list[Diagnostic]:
    """Return the diagnostics that `which` names, in the report's order.

    Raises:
        ConfigError: a name is not one of them.
    """
    by_name = {diagnostic.name: diagnostic for diagnostic in DIAGNOSTICS}
    for name in which:
        if name not in by_name and name != "all":
            near = difflib.get_close_matches(name, by_name, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are all, {', '.join(by_name)}."
            raise ConfigError(f"which={name} is no diagnostic: {hint}")
    return [diagnostic for diagnostic in DIAGNOSTICS if "all" in which or diagnostic.name in which]


def listing() -> str:
    """Return one line per diagnostic, for --help."""
    width = max(len(diagnostic.name) for diagnostic in DIAGNOSTICS)
    shows = max(len(diagnostic.shows) for diagnostic in DIAGNOSTICS)
    return "\n".join(f"  {d.name:{width}}  {d.shows:{shows}}  {d.about}" for d in DIAGNOSTICS)

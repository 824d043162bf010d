"""Every diagnostic, in the order of the report."""

import difflib
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tide_mega.config.errors import ConfigError

if TYPE_CHECKING:  # `--help` should not wait for torch and megatron-core
    from tide_mega.diagnostics.analysis import Analysis
    from tide_mega.diagnostics.section import Section


@dataclass(frozen=True)
class Diagnostic:
    """A module of this package whose `run` makes one section."""

    name: str
    shows: str
    """In the paper."""
    about: str
    module: str
    options: tuple[str, ...] = ()
    """Options that what it shows depends on, besides `precision` and `seed`."""
    reads: str = "metrics.jsonl"
    """File of the run folder that it reads besides checkpoints."""

    def load(self) -> "Callable[[Analysis], Section]":
        """Import what makes the section."""
        return importlib.import_module(f"tide_mega.diagnostics.{self.module}").run


DIAGNOSTICS = (
    Diagnostic("updates", "Equation 2.2, Table 1", "expected gradient updates of a token", "updates"),
    Diagnostic("norms", "Figure 1", "norms of embedding rows by decile, and their growth", "norms"),
    Diagnostic(
        "separation",
        "Figures 2 and 6",
        "distance of token pairs in every layer",
        "separation",
        options=("templates",),
    ),
    Diagnostic("deciles", "Figure 5", "held-out loss by decile", "deciles"),
    Diagnostic("blocks", "Figure 7", "loss of rare, mid and common tokens against K", "blocks"),
    Diagnostic(
        "perplexity",
        "Figure 8",
        "perplexity of texts against training tokens",
        "perplexity",
        options=("sequences", "texts", "text_tokens"),
    ),
    Diagnostic("distances", "Figure 9", "cosine distance between the embedding and the tables", "distances"),
    Diagnostic(
        "routing",
        "Figure 10",
        "router weights and null bank, by layer and decile",
        "routing",
        options=("sequences",),
    ),
    Diagnostic(
        "silencing",
        "Figure 11",
        "perplexity with one layer's memory left out",
        "silencing",
        options=("sequences", "texts", "text_tokens"),
    ),
    Diagnostic(
        "zero_shot",
        "Table 2",
        "zero-shot tasks, as python -m tide_mega.evaluate left them",
        "zero_shot",
        reads="evaluation/zero_shot.json",
    ),
    Diagnostic("neighbours", "Table 6, Figure 13", "nearest neighbours under every table", "neighbours"),
    Diagnostic("curves", "Figure 14", "training loss against tokens", "curves"),
    Diagnostic(
        "null_bound",
        "Proposition 3.1",
        "the null bank can switch the memory off",
        "propositions.null_bound",
        options=("sequences",),
    ),
    Diagnostic(
        "pathways",
        "Proposition 3.2",
        "squared gradients over the K tables",
        "propositions.pathways",
        options=("sequences", "batch"),
    ),
    Diagnostic(
        "identity",
        "Proposition 3.3",
        "the memory separates any pair of tokens",
        "propositions.identity",
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
    """Return one line a diagnostic, for --help."""
    width = max(len(diagnostic.name) for diagnostic in DIAGNOSTICS)
    shows = max(len(diagnostic.shows) for diagnostic in DIAGNOSTICS)
    return "\n".join(f"  {d.name:{width}}  {d.shows:{shows}}  {d.about}" for d in DIAGNOSTICS)

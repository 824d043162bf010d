"""Table 5: perplexity by the precision of the tables."""

from tide_mega.diagnostics.precision.report import run

__all__ = ["run"]

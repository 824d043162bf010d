"""Figure 8: perplexity of texts against training tokens."""

from tide_mega.diagnostics.perplexity.report import run

__all__ = ["run"]

"""Figure 1: norms of rows by frequency, and their growth."""

from tide_mega.diagnostics.norms.report import run

__all__ = ["run"]

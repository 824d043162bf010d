"""Figure 14: training loss against tokens."""

from tide_mega.diagnostics.curves.report import run

__all__ = ["run"]

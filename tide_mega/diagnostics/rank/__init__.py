"""Figure 12: tables cut to a lower rank."""

from tide_mega.diagnostics.rank.report import run

__all__ = ["run"]

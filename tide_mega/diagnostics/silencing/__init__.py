"""Figure 11: what each layer's memory is worth."""

from tide_mega.diagnostics.silencing.report import run

__all__ = ["run"]

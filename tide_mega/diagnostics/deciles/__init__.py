"""Figure 5: held-out loss by frequency decile."""

from tide_mega.diagnostics.deciles.report import run

__all__ = ["run"]

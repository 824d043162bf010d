"""Table 6 and Figure 13: nearest neighbours under every table."""

from tide_mega.diagnostics.neighbours.report import run

__all__ = ["run"]

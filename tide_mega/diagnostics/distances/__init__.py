"""Figure 9: cosine distances between the embedding and the tables."""

from tide_mega.diagnostics.distances.report import run

__all__ = ["run"]

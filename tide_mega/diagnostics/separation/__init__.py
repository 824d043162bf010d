"""Contextual collapse: how far apart hidden states of similar tokens are, layer by layer (Figures 2 and 6)."""

from tide_mega.diagnostics.separation.report import run

__all__ = ["run"]

"""Equation 2.2 and Table 1: how many gradient updates a token can expect."""

from tide_mega.diagnostics.updates.report import run

__all__ = ["run"]

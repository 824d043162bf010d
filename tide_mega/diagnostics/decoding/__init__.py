"""Table 4: milliseconds a decoded token."""

from tide_mega.diagnostics.decoding.report import run

__all__ = ["run"]

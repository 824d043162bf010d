"""Figure 4: bytes on the device and on disk."""

from tide_mega.diagnostics.storage.report import run

__all__ = ["run"]

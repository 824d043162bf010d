"""Figure 10: where routers send which tokens."""

from tide_mega.diagnostics.routing.report import run

__all__ = ["run"]

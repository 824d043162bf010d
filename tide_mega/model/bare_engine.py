"""The engine's interface over plain autograd, to see a model's gradients before any optimizer."""

import contextlib
from collections.abc import Iterator
from typing import Any

from tide_mega.model.stage import TideStage
from tide_mega.parallel.gradients import GradientAccumulator


class BareEngine:
    """Calls the model and leaves its whole local gradients on the parameters."""

    def __init__(self, module: TideStage) -> None:
        self.module = module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model's forward pass."""
        return self.module(*args, **kwargs)

    @contextlib.contextmanager
    def accumulate(self) -> Iterator[None]:
        """Every backward pass of one step goes inside."""
        yield
        GradientAccumulator(self.module.parameters(), self.module.groups).finish()

"""The command-line tools as modules: they lie outside the package."""

import contextlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

TOOLS = Path(__file__).parents[2] / "tools"


@contextlib.contextmanager
def tool_module(name: str) -> Iterator[ModuleType]:
    """Give tools/`name`.py, imported."""
    spec = importlib.util.spec_from_file_location(f"tool_{name}", TOOLS / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # the options' help is read from their source
    spec.loader.exec_module(module)
    try:
        yield module
    finally:
        del sys.modules[spec.name]

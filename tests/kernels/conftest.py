"""The fixture of the interpreted kernels."""

from collections.abc import Iterator

import pytest

from tests.support.interpreter import Interpreter


@pytest.fixture(scope="session")
def interpreted() -> Iterator[Interpreter]:
    """Return what calls a function where triton's kernels are interpreted."""
    pytest.importorskip("triton", reason="triton is not installed")
    interpreter = Interpreter()
    yield interpreter
    interpreter.close()

"""The values that fake tensors carry: integers and booleans always, floats where they are few and known.

A value is a real CPU tensor of the same shape, computed beside the fake one. Views of a fake tensor hold views of
its value, so what is written in place is seen by all. A float whose value is not known counts as 1.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map_only

MOST_FLOATS = 64
"""Maximum elements of a float tensor that keeps its value: counters, learning rates, sums."""
MOST_ONES = 2**26
"""Maximum elements of an unknown float tensor from which integers are actually computed; beyond it they are 0."""


def known(tensor: Tensor) -> Tensor | None:
    """Return the value; None if it is not known."""
    return getattr(tensor, "_value", None) if isinstance(tensor, FakeTensor) else tensor


def attach(tensor: Tensor, value: Tensor) -> None:
    """Give a fake tensor its value, unless it has too many floats to keep."""
    if isinstance(tensor, FakeTensor) and (not value.dtype.is_floating_point or value.numel() <= MOST_FLOATS):
        tensor._value = value  # type: ignore[attr-defined]


def assumed(tensor: Tensor) -> Tensor:
    """Return the value, or ones if it is not known."""
    value = known(tensor)
    if value is not None:
        return value
    with _disable_current_modes():
        return torch.ones((), dtype=tensor.dtype).expand(tensor.shape)


def follow(
    func: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    inputs: list[Tensor],
    outputs: list[Tensor],
    result: Any,
) -> None:
    """Compute the values of an operation's results, and of the tensors that it wrote to.

    `inputs` and `outputs` are the tensors among its arguments and in its result.
    """
    if all(known(tensor) is not None for tensor in inputs):
        if inputs or (all(_is_kept(o) for o in outputs) and not _is_random(func)):
            _attach_all(result, _really(func, args, kwargs, known))
        return
    if func._schema.is_mutable:
        _forget_written(func, args, kwargs)
    elif func is not torch.ops.aten.view.dtype and any(not o.dtype.is_floating_point for o in outputs):
        real = _of_assumed(func, args, kwargs, inputs)
        _attach_all(result, _zeros(result) if real is None else real)


def _of_assumed(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], inputs: list[Tensor]) -> Any:
    """Return integers computed from unknown floats; None if there are too many, or a CPU cannot do it."""
    if sum(tensor.numel() for tensor in inputs) > MOST_ONES:
        return None
    try:
        return _really(func, args, kwargs, assumed)
    except NotImplementedError:
        return None


def _zeros(result: Any) -> Any:
    with _disable_current_modes():
        return tree_map_only(Tensor, lambda o: torch.zeros(o.shape, dtype=o.dtype), result)


def _really(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], value: Callable[[Tensor], Tensor | None]
) -> Any:
    """Run an operation on values, on the CPU."""
    args, kwargs = tree_map_only(Tensor, value, (args, kwargs))
    args, kwargs = tree_map_only(torch.device, lambda _: torch.device("cpu"), (args, kwargs))
    with _disable_current_modes(), torch.no_grad():
        result = func(*args, **kwargs)
        if "empty" in func._opname:
            result.zero_()
    return result


def _attach_all(result: Any, real: Any) -> None:
    for output, value in zip(tree_flatten(result)[0], tree_flatten(real)[0], strict=True):
        if isinstance(output, FakeTensor) and known(output) is not value:
            attach(output, value)


def _is_random(func: Any) -> bool:
    return torch.Tag.nondeterministic_seeded in func.tags and func._opname not in ("randint", "randperm")


def _is_kept(tensor: Tensor) -> bool:
    return not tensor.dtype.is_floating_point or tensor.numel() <= MOST_FLOATS


def _forget_written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Mark what was written with unknown numbers: from here on it counts as 1, in every view."""
    by_name = {a.name: v for a, v in zip(func._schema.arguments, args, strict=False)} | kwargs
    for argument in func._schema.arguments:
        if argument.alias_info is not None and argument.alias_info.is_write:
            for tensor in tree_flatten(by_name.get(argument.name))[0]:
                if isinstance(tensor, Tensor) and (value := known(tensor)) is not None:
                    with _disable_current_modes(), torch.no_grad():
                        value.fill_(1)

"""Redirects what megatron-core (0.16 to 0.19) hard-codes for CUDA to the CPU; megatron itself stays unedited.

megatron-core computes on whatever device its tensors are on, but allocates a few of them, and keeps its random
state, through `torch.cuda` by name. Each line below says which call it serves.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core.tensor_parallel import random as megatron_random
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")
_CUDA: Any = torch.cuda

_REDIRECTIONS: list[tuple[Any, str, Callable[..., Any]]] = [
    # `device=torch.cuda.current_device()`: sequence-parallel buffers (layers.py, mappings.py, utils.py),
    # rotary frequencies (rotary_pos_embedding.py), pipeline receive buffers (p2p_communication.py).
    (_CUDA, "current_device", lambda: _CPU),
    # Pipeline receives and checkpoint writers synchronise with the stream; the CPU has none.
    (_CUDA, "synchronize", lambda *_: None),
    # The random tracker of tensor parallelism and activation recompute save and restore "the CUDA
    # generator"; the generator that every op on the CPU draws from is the CPU's.
    (_CUDA, "get_rng_state", lambda *_: torch.get_rng_state()),
    (_CUDA, "manual_seed", torch.manual_seed),
    (megatron_random, "_get_cuda_rng_state", lambda *_, **__: torch.get_rng_state()),
    (megatron_random, "_set_cuda_rng_state", lambda state, *_, **__: torch.set_rng_state(state)),
]

_replaced: list[Callable[..., Any]] = []
"""The original functions, in the order of the redirections, while these are active."""


def redirect(to_cpu: bool) -> None:
    """Redirect megatron's hard-coded `torch.cuda` calls to the CPU, or restore them, depending on the device."""
    if to_cpu == is_redirected():
        return
    if to_cpu:
        _replaced.extend(getattr(owner, name) for owner, name, _ in _REDIRECTIONS)
        for owner, name, replacement in _REDIRECTIONS:
            setattr(owner, name, replacement)
        return
    for (owner, name, _), original in zip(_REDIRECTIONS, _replaced, strict=True):
        setattr(owner, name, original)
    _replaced.clear()


def is_redirected() -> bool:
    """Return whether megatron's calls are redirected to the CPU in this process."""
    return bool(_replaced)


class _CudaMeansCpu(TorchFunctionMode):
    """Turns `device="cuda"` into the CPU and `.cuda()` into the tensor itself."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.cuda:
            return args[0]
        if kwargs.get("device") == "cuda":
            kwargs = {**kwargs, "device": "cpu"}
        return func(*args, **kwargs)


@contextlib.contextmanager
def cuda_means_cpu() -> Iterator[None]:
    """Context for megatron's pipeline schedules, which allocate their token counter on "cuda" by name."""
    if not is_redirected():
        yield
        return
    with _CudaMeansCpu():
        yield

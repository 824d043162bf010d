"""What megatron-core 0.16 needs on a machine without CUDA. Active only there; megatron is not edited.

megatron-core computes on whatever device its tensors are on, but allocates a few of them, and keeps its
random state, through `torch.cuda` by name. Each line below says which call it serves.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core.tensor_parallel import random as megatron_random
from torch.overrides import TorchFunctionMode


def install() -> None:
    """Redirect megatron's hard-coded `torch.cuda` calls to the CPU; does nothing where CUDA exists."""
    if torch.cuda.is_available() or getattr(torch.cuda, "_tide_redirected", False):
        return
    cpu = torch.device("cpu")
    cuda: Any = torch.cuda
    # `device=torch.cuda.current_device()`: sequence-parallel buffers (layers.py, mappings.py, utils.py),
    # rotary frequencies (rotary_pos_embedding.py), pipeline receive buffers (p2p_communication.py).
    cuda.current_device = lambda: cpu
    # Pipeline receives and checkpoint writers wait for the stream; the CPU has none.
    cuda.synchronize = lambda *_: None
    # The random tracker of tensor parallelism and activation recompute save and restore "the CUDA
    # generator"; without CUDA the generator that every op draws from is the CPU's.
    cuda.get_rng_state = lambda *_: torch.get_rng_state()
    cuda.manual_seed = torch.manual_seed
    cpu_random: Any = megatron_random
    cpu_random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    cpu_random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    cuda._tide_redirected = True


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
    """Around megatron's pipeline schedules, which allocate their token counter on "cuda" by name."""
    if torch.cuda.is_available():
        yield
        return
    with _CudaMeansCpu():
        yield

"""Answers for `torch.cuda` on a machine without it: a single card, whose every synchronisation is recorded.

torch itself is patched for the lifetime of the process where fake tensors need it:

- C++ code (autograd's queues, composite operations) asks a fake tensor for its device and would look for a driver
  behind "cuda": it is told "meta", while Python is told the truth.
- `nn.Module._apply` and `.data =` carry a fake tensor's device along.
- `data_ptr` returns an invented address, different for every storage; `tolist` and `numpy` return the values.
- `torch.compile` returns the function unchanged.
- A Triton launch is checked and recorded, not executed.
"""

import contextlib
import functools
import importlib
import importlib.util
import itertools
import os
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch._dynamo  # inspects torch.cuda on import, so it must precede the changes
import torch.utils._foreach_utils
from numpy.typing import NDArray
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_flatten

from tide_mega.dryrun import groups
from tide_mega.dryrun.recorder import DryRunError, active, note_wait, place, place_and_line
from tide_mega.dryrun.values import assumed

# torch is patched here in ways that its type annotations do not allow.
_TORCH: Any = torch
_TENSOR: Any = FakeTensor
_MODE: Any = FakeTensorMode
_MODULE: Any = torch.nn.Module

CARD = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    total_memory=85_017_624_576,
    major=9,
    minor=0,
    multi_processor_count=132,
    shared_memory_per_block=49_152,
    shared_memory_per_block_optin=232_448,
    shared_memory_per_multiprocessor=233_472,
    regs_per_multiprocessor=65_536,
    max_threads_per_multi_processor=2_048,
    warp_size=32,
    L2_cache_size=50 * 2**20,
    gcnArchName="",
)
CARDS = 8


def is_installed() -> bool:
    """Return whether the simulated card is installed in this process."""
    return getattr(torch.cuda, "_is_dry", False)


def install() -> None:
    """Install the simulated card; call before importing megatron-core and DeepSpeed, which look for one on import.

    Raises:
        RuntimeError: one of them is imported already.
    """
    if is_installed():
        return
    if too_early := {"megatron.core", "deepspeed"} & sys.modules.keys():
        raise RuntimeError(f"{' and '.join(sorted(too_early))} was imported before CUDA could be faked")
    os.environ.setdefault("LOCAL_RANK", "0")
    _answer()
    _tell_devices()
    _move_devices()
    _invent_addresses()
    _TENSOR.record_stream = lambda *_: None
    _TENSOR.tolist = _tolist
    _TENSOR.numpy = _numpy
    groups.install()
    _TORCH.compile = _as_it_is
    if importlib.util.find_spec("triton") is not None:
        importlib.import_module("triton.runtime.jit").JITFunction.run = _launch
    _TORCH.cuda._is_dry = True


class Event:
    """A CUDA event, which is reached immediately."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def record(self, *_: Any) -> None:
        """Mark the present."""

    def wait(self, *_: Any) -> None:
        """Make a stream wait: not the host."""

    def query(self) -> bool:
        """Return whether the event is reached: always."""
        return True

    def elapsed_time(self, _: "Event") -> float:
        """Return the milliseconds between two events."""
        return 1.0

    def synchronize(self) -> None:
        """Make the host wait."""
        note_wait("synchronize")


class Stream:
    """The only stream."""

    cuda_stream = 0
    device_index = 0

    def __init__(self, *_: Any, **__: Any) -> None:
        self.device = torch.device("cuda", 0)

    def wait_stream(self, *_: Any) -> None:
        """Wait for another stream: not the host."""

    def wait_event(self, *_: Any) -> None:
        """Wait for an event: not the host."""

    def record_event(self, event: Event | None = None) -> Event:
        """Record the current point."""
        return event or Event()

    def query(self) -> bool:
        """Return whether all work is done: always."""
        return True

    def synchronize(self) -> None:
        """Make the host wait."""
        note_wait("synchronize")

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_: object) -> None:
        pass


def _answer() -> None:
    """Replace the functions of `torch.cuda` that the stack calls."""
    stream = Stream()
    nothing: Callable[..., None] = lambda *_, **__: None  # noqa: E731
    get_state: Callable[..., Tensor] = lambda *_, **__: torch.get_rng_state()  # noqa: E731
    set_state: Callable[..., None] = lambda state, *_, **__: torch.set_rng_state(state)  # noqa: E731
    seed: Callable[..., Any] = lambda number, *_: torch.default_generator.manual_seed(int(number))  # noqa: E731
    answers: dict[str, Any] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "init": nothing,
        "_lazy_init": nothing,
        "device_count": lambda: CARDS,
        "current_device": lambda: 0,
        "set_device": nothing,
        "get_device_name": lambda *_: CARD.name,
        "get_device_capability": lambda *_: (CARD.major, CARD.minor),
        "get_device_properties": lambda *_: CARD,
        "get_arch_list": lambda: ["sm_90"],
        "is_bf16_supported": lambda *_, **__: True,
        "synchronize": lambda *_: note_wait("synchronize"),
        "empty_cache": nothing,
        "Stream": Stream,
        "Event": Event,
        "current_stream": lambda *_: stream,
        "default_stream": lambda *_: stream,
        "set_stream": nothing,
        "stream": lambda *_: contextlib.nullcontext(),
        "device": lambda *_: contextlib.nullcontext(),
        "is_current_stream_capturing": lambda: False,
        "get_rng_state": get_state,
        "set_rng_state": set_state,
        "manual_seed": seed,
        "manual_seed_all": seed,
        "default_generators": (torch.default_generator,) * CARDS,
        "mem_get_info": lambda *_: (CARD.total_memory, CARD.total_memory),
        "memory_stats": lambda *_: {},
    }
    answers |= {
        f"{most}memory_{kind}": lambda *_: 0
        for most in ("", "max_")
        for kind in ("allocated", "reserved", "cached")
    }
    answers |= {f"reset_{kind}": nothing for kind in ("peak_memory_stats", "max_memory_allocated")}
    for name, value in answers.items():
        setattr(torch.cuda, name, value)
    for name in ("get_rng_state", "set_rng_state"):
        setattr(torch.cuda.random, name, answers[name])
    for name in ("range_push", "range_pop", "mark"):
        setattr(torch.cuda.nvtx, name, nothing)


def _tell_devices() -> None:
    meta = torch.device("meta")
    asks = torch.ops.prim.device.default
    of_mode, of_class = _MODE.__torch_dispatch__, _TENSOR.__torch_dispatch__.__func__

    def device(tensor: Any) -> torch.device:
        return meta if tensor.fake_mode.in_kernel_invocation or tensor.is_cuda else tensor.fake_device

    def dispatch_mode(self: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return device(args[0]) if func is asks else of_mode(self, func, types, args, kwargs)

    def dispatch_class(cls: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return device(args[0]) if func is asks else of_class(cls, func, types, args, kwargs)

    def by_device_and_dtype(lists: Any, with_indices: bool = False) -> Any:
        found: dict[Any, Any] = {}
        for number, row in enumerate(zip(*lists, strict=True)):
            first = row[0]
            columns, indices = found.setdefault((first.device, first.dtype), ([[] for _ in lists], []))
            for column, tensor in zip(columns, row, strict=True):
                column.append(tensor)
            indices.append(number)
        return {key: (columns, indices if with_indices else []) for key, (columns, indices) in found.items()}

    _TORCH._subclasses.fake_tensor.init_gpu_context = lambda _: None
    _MODE.avoid_device_init = property(lambda _: True)
    _MODE.__torch_dispatch__ = dispatch_mode
    _TENSOR.__torch_dispatch__ = classmethod(dispatch_class)
    _TENSOR.is_cuda = property(lambda self: self.fake_device.type == "cuda")
    _TENSOR.is_cpu = property(lambda self: self.fake_device.type == "cpu")
    _TORCH.utils._foreach_utils._group_tensors_by_device_and_dtype = by_device_and_dtype
    _TORCH.nn.utils.clip_grad._group_tensors_by_device_and_dtype = by_device_and_dtype


def _move_devices() -> None:
    data: Any = torch.Tensor.data

    def set_data(self: Any, new: Tensor) -> None:
        data.__set__(self, new)
        if isinstance(new, FakeTensor):
            self.fake_device = new.fake_device
            self._value = getattr(new, "_value", None)

    def apply(self: Any, function: Callable[[Any], Any], recurse: bool = True) -> Any:
        for module in self.children() if recurse else ():
            module._apply(function)
        for parameter in self._parameters.values():
            if parameter is not None:
                with torch.no_grad():
                    parameter.data = function(parameter.data)
                    if parameter.grad is not None:
                        parameter.grad.data = function(parameter.grad.data)
        for key, buffer in self._buffers.items():
            if buffer is not None:
                self._buffers[key] = function(buffer)
        return self

    _TENSOR.data = property(lambda self: data.__get__(self), set_data)
    _MODULE._apply = apply


def _invent_addresses() -> None:
    numbers = itertools.count(1)

    def data_ptr(self: Any) -> int:
        storage = self.untyped_storage()
        if not storage.nbytes():
            return 0
        if not hasattr(storage, "_address"):
            storage._address = next(numbers) << 44
        return storage._address + self.storage_offset() * self.element_size()

    _TENSOR.data_ptr = data_ptr


def _tolist(tensor: Tensor) -> Any:
    if tensor.is_cuda:
        note_wait("tolist")
    with _disable_current_modes():
        return assumed(tensor).tolist()


def _numpy(tensor: Tensor, *, force: bool = False) -> NDArray[Any]:
    if tensor.is_cuda and not force:
        raise TypeError("can't convert a CUDA tensor to numpy: copy it to host memory first")
    if tensor.is_cuda:
        note_wait("copy to host")
    with _disable_current_modes():
        return assumed(tensor).detach().numpy()


def _as_it_is(function: Any = None, **_: Any) -> Any:
    """Replacement of torch.compile: the function runs as it is, and a ledger counts it as one kernel."""
    if function is None:
        return _as_it_is

    @functools.wraps(function)
    def one_kernel(*args: Any, **kwargs: Any) -> Any:
        recorder = active()
        if recorder is None or recorder.ledger is None:
            return function(*args, **kwargs)
        inputs = tree_flatten((args, kwargs))[0]
        with recorder.ledger.fused(function.__name__, inputs, *place_and_line()) as outputs:
            result = function(*args, **kwargs)
            outputs += tree_flatten(result)[0]
        return result

    return one_kernel


def _launch(self: Any, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> None:
    """Check a Triton launch and record it.

    Raises:
        DryRunError: the kernel lacks an argument that is passed, or could not read a tensor.
    """
    options = {"num_warps", "num_stages", "num_ctas", "enable_fp_fusion", "maxnreg"}
    bound = self.signature.bind(*args, **{k: v for k, v in kwargs.items() if k not in options})
    for name, value in bound.arguments.items():
        if isinstance(value, Tensor) and not (value.is_cuda and value.is_contiguous()):
            raise DryRunError(
                f"{place()} launches {self.__name__} with {name} {list(value.shape)} on {value.device}, strides "
                f"{value.stride()}: kernels take contiguous CUDA tensors"
            )
    sizes = grid(bound.arguments) if callable(grid) else grid
    if not all(size > 0 for size in sizes):
        raise DryRunError(f"{place()} launches {self.__name__} on a grid {tuple(sizes)}")
    if (recorder := active()) is not None:
        name = f"{self.fn.__module__.removeprefix('tide_mega.kernels.')}.{self.__name__}"
        recorder.launches[name] += 1
        if recorder.ledger is not None:
            recorder.ledger.launch(name, bound.arguments.values(), place())

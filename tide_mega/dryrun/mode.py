"""Runs the program on fake tensors: every operation is checked and recorded, and done without its numbers.

What torch itself would refuse on a GPU is refused, naming the place; what it would silently accept at a cost, a
host synchronisation or computation in float64, is counted.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map_only

from tide_mega.dryrun.groups import Mirror, among, communicate
from tide_mega.dryrun.recorder import DryRunError, Recorder, active, place, place_and_line, recording
from tide_mega.dryrun.values import assumed, attach, follow

aten = torch.ops.aten
CUDA = torch.device("cuda", 0)
SIZED_BY_DATA = frozenset(
    {"nonzero", "unique_dim", "_unique", "_unique2", "unique_consecutive", "masked_select", "bincount"}
)
"""Operations that synchronise the host with CUDA, since the size of their result must be known."""
COPIES = frozenset({"copy_", "_to_copy", "_foreach_copy_", "set_"})
INDEXING = frozenset({"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"})
PRODUCTS = frozenset({"mm", "bmm", "addmm", "baddbmm", "_scaled_dot_product_flash_attention"})


_meta_calls: list[Any] = []
"""Running calls that asked in Python for tensors without memory, which are no fakes of a card."""


@contextmanager
def dry_run(recorder: Recorder | None = None, peers: Mirror | None = None) -> Iterator[Recorder]:
    """Context that runs its body on fake tensors, including those of this process's CUDA device.

    Call `cuda.install` first.

    Args:
        recorder: records what happens; None creates one.
        peers: gives what the other ranks send; None assumes that they equal this one.
    """
    recorder, peers = recorder or Recorder(), peers or Mirror()
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    operations = _Operations(fake, recorder, peers)
    with recording(recorder), among(peers), _seen_in_backward(), _PythonCalls(), fake, operations:
        yield recorder


@contextmanager
def _seen_in_backward() -> Iterator[None]:
    """Keep the function mode active in backward passes: torch disables it while handling the `backward` call."""
    run_backward = torch.autograd._engine_run_backward

    def run_seen(*args: Any, **kwargs: Any) -> Any:
        with _PythonCalls():
            return run_backward(*args, **kwargs)

    torch.autograd._engine_run_backward = run_seen
    try:
        yield
    finally:
        torch.autograd._engine_run_backward = run_backward


class _Operations(TorchDispatchMode):
    """Intercepts every operation that reaches a device."""

    def __init__(self, fake: FakeTensorMode, recorder: Recorder, peers: Mirror) -> None:
        super().__init__()
        self._fake, self._recorder, self._peers = fake, recorder, peers

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        inputs = _tensors((args, kwargs))
        if not all(isinstance(tensor, FakeTensor) for tensor in inputs):
            args, kwargs = tree_map_only(Tensor, self._fake_of, (args, kwargs))
            inputs = _tensors((args, kwargs))
        if func.namespace == "c10d":
            return communicate(func, args, kwargs, self._recorder, self._peers)
        name = func._opname
        if name == "_local_scalar_dense":
            return self._scalar(args[0])
        if name == "equal":
            return self._scalar((args[0] == args[1]).all()) if args[0].shape == args[1].shape else False
        if name in INDEXING:
            args = self._with_integer_indices(func, args)
        _one_device(func, inputs)
        if _meta_calls:
            return self._run(func, args, kwargs)
        kwargs = _without_meta(name, kwargs)
        result = self._run(func, args, kwargs)
        for made in _tensors(result):
            # Made by a kernel that takes the device from what C++ heard.
            if isinstance(made, FakeTensor) and made.fake_device.type == "meta":
                made.fake_device = CUDA
        follow(func, args, kwargs, inputs, _tensors(result), result)
        if (ledger := self._recorder.ledger) is not None:
            here, line = place_and_line()
            ledger.hold((*inputs, *_tensors(result)), here, line)
            ledger.operation(func, args, kwargs, inputs, result, here)
        self._note(func, name, args, kwargs, inputs, result)
        return result

    def _fake_of(self, tensor: Tensor) -> Tensor:
        if isinstance(tensor, FakeTensor):
            return tensor
        fake = self._fake.from_tensor(tensor)
        attach(fake, tensor)
        return fake

    def _run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func._opname not in SIZED_BY_DATA:
            return func(*args, **kwargs)
        device = args[0].device
        with _disable_current_modes():
            real = func(*tree_map_only(Tensor, assumed, args), **tree_map_only(Tensor, assumed, kwargs))
        return tree_map_only(
            Tensor, lambda r: torch.empty_strided(r.size(), r.stride(), dtype=r.dtype, device=device), real
        )

    def _scalar(self, tensor: Tensor) -> Any:
        if tensor.is_cuda:
            self._recorder.wait("item")
        with _disable_current_modes():
            return assumed(tensor).item()

    def _with_integer_indices(self, func: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Turn masks into integer indices, as CUDA does; waits for their number unless it can fill in place."""
        indices: list[Tensor | None] = []
        value = args[2] if "put" in func._opname else None
        fills = value is not None and value.numel() == 1 and not value.is_cuda
        for index in args[1]:
            if index is None or index.dtype != torch.bool:
                indices.append(index)
                continue
            if index.is_cuda and not fills:
                self._recorder.wait("sized by data")
            with _disable_current_modes():
                columns = assumed(index).nonzero().unbind(1)
            for column in columns:
                integer = torch.empty(column.shape, dtype=torch.int64, device=index.device)
                attach(integer, column)
                indices.append(integer)
        return (args[0], indices, *args[2:])

    def _note(
        self,
        func: Any,
        name: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        inputs: list[Tensor],
        result: Any,
    ) -> None:
        recorder = self._recorder
        if name in SIZED_BY_DATA and inputs[0].is_cuda:
            recorder.wait("sized by data")
        if name == "_to_copy":
            self._note_copy(result, args[0], kwargs.get("non_blocking", False), is_new=True)
        elif name == "copy_":
            self._note_copy(args[0], args[1], kwargs.get("non_blocking", args[2] if len(args) > 2 else False))
        elif name == "_foreach_copy_":
            for target, source in zip(*args[:2], strict=True):
                self._note_copy(
                    target, source, kwargs.get("non_blocking", args[2] if len(args) > 2 else False)
                )
        outputs = [o for o in _tensors(result) if o.is_cuda]
        if not func.is_view and any(o.dtype == torch.float64 for o in outputs):
            recorder.doubles[place(), name] += 1
        if name in PRODUCTS and outputs:
            recorder.products[place(), str(inputs[1].dtype).removeprefix("torch.")] += 1

    def _note_copy(self, target: Tensor, source: Tensor, non_blocking: bool, is_new: bool = False) -> None:
        """Record a copy between host and device: it blocks, unless it is non-blocking and host memory is pinned.

        With `is_new` the target was created for the copy, in pinned memory if the copy is non-blocking.
        """
        if target.is_cuda == source.is_cuda:
            return
        host = source if target.is_cuda else target
        is_pinned = getattr(host, "_is_pinned", False) or (is_new and not target.is_cuda)
        if not (non_blocking and is_pinned):
            self._recorder.wait("copy to device" if target.is_cuda else "copy to host")


def _one_device(func: Any, inputs: list[Tensor]) -> None:
    """Refuse CPU tensors beside CUDA tensors; scalars are passed as kernel arguments.

    Raises:
        DryRunError: naming operation and place; also for an index on the CPU, which torch would copy
        synchronously.
    """
    if func._opname in COPIES or not any(tensor.is_cuda for tensor in inputs):
        return
    for tensor in inputs:
        if not tensor.is_cuda and tensor.ndim:
            raise DryRunError(
                f"{place()} gives {func} a CPU tensor {list(tensor.shape)} beside CUDA tensors: make it there"
            )


def _without_meta(name: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Redirect tensors that C++ creates on "meta" to CUDA: it takes CUDA fakes for meta tensors (see `cuda`).

    The scalar of `x[mask] = 0` is excepted: beside a CUDA tensor C++ leaves it on the CPU, and fills without
    waiting.
    """
    device = kwargs.get("device")
    if device is None or device.type != "meta":
        return kwargs
    return {**kwargs, "device": torch.device("cpu") if name == "scalar_tensor" else CUDA}


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor)]


class _PythonCalls(TorchFunctionMode):
    """Intercepts calls that bypass the dispatcher, or need a driver that does not exist."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not torch.device:
            args = tuple(_with_index(a) for a in args)
            kwargs = {key: _with_index(value) for key, value in kwargs.items()}
            if isinstance(kwargs.get("device"), int):
                kwargs["device"] = CUDA
        is_pinned = kwargs.pop("pin_memory", False)  # C++ would look for an allocator of pinned memory
        if str(kwargs.get("device")) == "meta":
            return _made_on_meta(func, args, kwargs)
        result = _REPLACED.get(func, func)(*args, **kwargs)
        if is_pinned:
            result._is_pinned = True
        return result


def _made_on_meta(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    _meta_calls.append(func)
    try:
        return _REPLACED.get(func, func)(*args, **kwargs)
    finally:
        _meta_calls.pop()


def _with_index(value: Any) -> Any:
    """Return a device with an index: for plain `cuda` torch would ask the driver for it."""
    if isinstance(value, str) and value == "cuda":
        return CUDA
    return CUDA if isinstance(value, torch.device) and value.type == "cuda" and value.index is None else value


def _to(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Return a tensor already on the device unchanged: C++ is told another device name and would copy it."""
    copy = kwargs.pop("copy", False)
    if args and isinstance(args[0], Tensor):
        args = (args[0].device, args[0].dtype, *args[1:])
    device, dtype, non_blocking, memory_format = torch._C._nn._parse_to(*args, **kwargs)
    options: dict[str, Any] = {"non_blocking": non_blocking, "copy": copy, "memory_format": memory_format}
    if device is not None and device != tensor.device:
        return torch.Tensor.to(tensor, device, dtype or tensor.dtype, **options)
    if dtype in (None, tensor.dtype) and memory_format is None and not copy:
        return tensor
    return torch.Tensor.to(tensor, dtype or tensor.dtype, **options)


def _pin_memory(tensor: Tensor, *_: Any) -> Tensor:
    pinned = tensor.clone()
    pinned._is_pinned = True  # type: ignore[attr-defined]
    return pinned


def _type(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
    if args or kwargs:
        return torch.Tensor.type(tensor, *args, **kwargs)
    name = torch.empty((), dtype=tensor.dtype, device="cpu")
    word = torch.Tensor.type(name).removeprefix("torch.")
    return f"torch.cuda.{word}" if tensor.is_cuda else f"torch.{word}"


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Use the flash kernel in 16 bits, else plain math: C++ would choose by a device that it does not know."""
    if attn_mask is not None:
        raise DryRunError("a dry run knows attention without a mask alone")
    if query.is_cuda and query.dtype.itemsize == 2:  # its kernel takes groups of queries as they are
        return aten._scaled_dot_product_flash_attention(
            query, key, value, dropout_p, is_causal, False, scale=scale
        )[0]
    if enable_gqa:
        times = query.size(1) // key.size(1)
        key, value = key.repeat_interleave(times, 1), value.repeat_interleave(times, 1)
    return aten._scaled_dot_product_attention_math(
        query, key, value, None, dropout_p, is_causal, scale=scale
    )[0]


class _FusedNorm(torch.autograd.Function):
    """CUDA's fused RMSNorm, which keeps its input and a scale a row; C++ would compose it for other devices."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, weight: Tensor, rows: int) -> Tensor:
        out, scale = torch.empty_like(tensor), tensor.new_empty(rows, dtype=torch.float32)
        _note_kernel("rms_norm", tensor, weight, out, scale)
        ctx.save_for_backward(tensor, weight, scale)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        tensor, weight, scale = ctx.saved_tensors
        incoming, weighted = torch.empty_like(tensor), torch.empty_like(weight)
        _note_kernel("rms_norm_backward", *gradients, tensor, scale, incoming)
        _note_kernel("rms_norm_backward_weight", *gradients, tensor, scale, weighted)
        return incoming, weighted, None


def _note_kernel(name: str, *tensors: Tensor) -> None:
    recorder = active()
    if recorder is not None and recorder.ledger is not None:
        recorder.ledger.launch(name, tensors, place())


def _rms_norm(
    tensor: Tensor, shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    if not tensor.is_cuda or weight is None:
        return torch.rms_norm(tensor, shape, weight, eps)
    return _FusedNorm.apply(tensor, weight, tensor.numel() // weight.numel())


_REPLACED: dict[Any, Callable[..., Any]] = {
    torch.Tensor.to: _to,
    torch.Tensor.cuda: lambda tensor, *_, **__: _to(tensor, CUDA),
    torch.Tensor.type: _type,
    torch.Tensor.pin_memory: _pin_memory,
    torch.Tensor.is_pinned: lambda tensor, *_: getattr(tensor, "_is_pinned", False),
    F.scaled_dot_product_attention: _attention,
    F.rms_norm: _rms_norm,
}

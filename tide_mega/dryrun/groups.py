"""The other ranks: process groups that move nothing, and the values that this rank is assumed to receive.

As on a cluster, a group created for NCCL takes only CUDA tensors, one created for gloo only CPU tensors.
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import FakeWork, ProcessGroup
from torch.distributed import distributed_c10d
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_flatten

from tide_mega.dryrun.recorder import Collective, DryRunError, Recorder, place
from tide_mega.dryrun.values import known

NCCL, GLOO = "cuda:fake", "cpu:fake"
SENT_BY_NCCL = frozenset(
    {torch.int8, torch.uint8, torch.bool, torch.int32, torch.int64}
    | {torch.float16, torch.bfloat16, torch.float32, torch.float64}
)
_new_group = dist.new_group
_all_gather_object = dist.all_gather_object


class Mirror:
    """Assumes that every other rank holds what this one holds: received values are made from those sent."""

    def broadcast(self, value: Tensor, source: int, rank: int) -> None:
        """Fill `value` with what the group's member `source` sends to member `rank`."""

    def all_gather(self, sent: Tensor, size: int) -> list[Tensor]:
        """Return what each of the `size` members contributes if this one contributes `sent`."""
        return [sent] * size

    def all_to_all(self, received: Tensor, sent: Tensor, pieces: list[int], rank: int) -> None:
        """Assemble what each member sends to member `rank`; `sent` is cut into `pieces`, one per member."""
        mine = sent.split(pieces)[rank]
        if received.numel() != mine.numel() * len(pieces):
            raise DryRunError(
                f"an all-to-all gives {mine.numel()} values to each of {len(pieces)} members and has room for "
                f"{received.numel()}: its sizes are not what the other members, alike to this one, would send"
            )
        received.copy_(torch.cat([mine] * len(pieces)))

    def objects(self, mine: Any, ranks: list[int]) -> list[Any]:
        """Return what each of `ranks` contributes if this one contributes `mine`."""
        return [mine] * len(ranks)


_peers: list[Mirror] = []


@contextmanager
def among(peers: Mirror) -> Iterator[None]:
    """Context in which object collectives receive what `peers` return."""
    _peers.append(peers)
    try:
        yield
    finally:
        _peers.pop()


def join(rank: int, world_size: int) -> None:
    """Make this process rank `rank` of a job of `world_size` processes, with NCCL as backend."""
    dist.init_process_group(NCCL, rank=rank, world_size=world_size, store=FakeStore())


def new_group(
    ranks: Any = None, timeout: Any = None, backend: str | None = None, pg_options: Any = None, **kwargs: Any
) -> Any:
    """Replacement of `torch.distributed.new_group`: gloo stays gloo, anything else is NCCL."""
    kwargs.pop("device_id", None)
    return _new_group(ranks, timeout, GLOO if backend == "gloo" else NCCL, None, **kwargs)


def _object_to_tensor(obj: Any, device: Any, group: Any, weights_only: bool = False) -> tuple[Tensor, Tensor]:
    """Replacement of torch's function, which bypasses the dispatcher; torch 2.14 adds the last argument."""
    written = io.BytesIO()
    distributed_c10d._pickler(written).dump(obj)  # as many bytes as torch would send
    data = list(written.getvalue())
    return torch.tensor(data, dtype=torch.uint8, device=device), torch.tensor([len(data)], device=device)


def all_gather_object(object_list: list[Any], obj: Any, group: Any = None, **kwargs: Any) -> None:
    """Replacement of `torch.distributed.all_gather_object`: sends the same, receives what the peers return."""
    _all_gather_object(object_list, obj, group, **kwargs)
    if _peers:
        object_list[:] = _peers[-1].objects(obj, dist.get_process_group_ranks(group or dist.group.WORLD))


def install() -> None:
    """Make `torch.distributed` create these groups."""
    distributed_c10d._object_to_tensor = _object_to_tensor
    for owner in (dist, distributed_c10d):
        owner.all_gather_object = all_gather_object  # type: ignore[attr-defined]
    for module in (dist, distributed_c10d):
        module.new_group = new_group  # type: ignore[attr-defined]


def communicate(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], recorder: Recorder, peers: Mirror
) -> Any:
    """Check one of c10d's operations, record it, and return what it would return.

    Raises:
        DryRunError: the group's backend does not take a tensor.
    """
    by_name = {a.name: v for a, v in zip(func._schema.arguments, args, strict=False)} | kwargs
    group = ProcessGroup.unbox(by_name["process_group"])
    tensors = [t for t in tree_flatten(args)[0] if isinstance(t, Tensor)]
    if func._opname == "barrier":
        tensors = []  # torch's own, a sign of the device
        recorder.wait("barrier")
    on = group._device_types[0].type
    for tensor in tensors:
        if (problem := _problem(tensor, on)) is not None:
            backend = "NCCL" if on == "cuda" else "gloo"
            raise DryRunError(
                f"{place()} gives {backend}'s {func._opname} {problem}: {list(tensor.shape)} {tensor.dtype}"
            )
    dtype = str(tensors[0].dtype).removeprefix("torch.") if tensors else "none"
    here = place()
    recorder.collectives[Collective(here, func._opname, group.size(), on, dtype)] += 1
    if (ledger := recorder.ledger) is not None:
        ranks = tuple(sorted(dist.get_process_group_ranks(group)))
        ledger.message(func._opname, _whole(func._opname, by_name, tensors), ranks, here)
    with _disable_current_modes(), torch.no_grad():
        _receive(func._opname, by_name, group, peers)
    work = FakeWork().boxed()
    return (args[0], work) if len(func._schema.returns) == 2 else work


def _whole(name: str, by_name: dict[str, Any], tensors: list[Tensor]) -> list[Tensor]:
    """Return of a collective's tensors those that make up the whole."""
    of = {
        "_allgather_base_": "output_tensor",
        "allgather_": "output_tensors",
        "_reduce_scatter_base_": "input_tensor",
        "reduce_scatter_": "input_tensors",
        "alltoall_base_": "input",
    }.get(name)
    return tensors if of is None else [t for t in tree_flatten(by_name[of])[0] if isinstance(t, Tensor)]


def _problem(tensor: Tensor, on: str) -> str | None:
    if tensor.device.type != on:
        return f"a tensor on {tensor.device.type}"
    if on == "cuda" and tensor.dtype not in SENT_BY_NCCL:
        return "numbers that it cannot send"
    if not tensor.is_contiguous():
        return "a tensor that is not contiguous"
    return None


def _receive(name: str, by_name: dict[str, Any], group: ProcessGroup, peers: Mirror) -> None:
    """Fill in the received values; an all-reduce keeps what this rank holds."""
    if name == "broadcast_":
        for tensor in by_name["tensors"]:
            if (value := known(tensor)) is not None and by_name["root_rank"] != group.rank():
                peers.broadcast(value, by_name["root_rank"], group.rank())
    elif name == "_allgather_base_":
        received, sent = known(by_name["output_tensor"]), known(by_name["input_tensor"])
        if received is not None and sent is not None:
            given = peers.all_gather(sent.reshape(-1), group.size())
            received.copy_(torch.cat(given).view_as(received))
    elif name == "allgather_":
        for outputs, tensor in zip(by_name["output_tensors"], by_name["input_tensors"], strict=True):
            for output in outputs:
                if (received := known(output)) is not None and (sent := known(tensor)) is not None:
                    received.copy_(sent)
    elif name == "alltoall_base_":
        received, sent = known(by_name["output"]), known(by_name["input"])
        if received is not None and sent is not None:
            even = [len(sent) // group.size()] * group.size()
            peers.all_to_all(received, sent, by_name["input_split_sizes"] or even, group.rank())

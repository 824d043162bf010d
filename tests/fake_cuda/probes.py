"""Small programs for a dry run, and what came of them; each is run in a process of its own."""

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from tide_mega.dryrun import groups
from tide_mega.dryrun.mode import dry_run
from tide_mega.dryrun.recorder import DryRunError

CUDA = torch.device("cuda", 0)


def waits_of(program: Callable[[], Any]) -> list[str]:
    """Return how the host waited, in order of the kinds' names."""
    with dry_run() as recorder:
        program()
    return sorted(wait.kind for wait in recorder.waits.elements())


def refusal_of(program: Callable[[], Any], world: int = 1) -> str:
    """Return what a program was refused with."""
    groups.join(0, world)
    try:
        with dry_run():
            program()
    except (DryRunError, TypeError) as error:
        return str(error)
    return ""


def value_of(program: Callable[[], Any], world: int = 1, rank: int = 0) -> Any:
    """Return what a program returns, which is no tensor."""
    groups.join(rank, world)
    with dry_run():
        return program()


def numbers(*values: int) -> torch.Tensor:
    return torch.tensor(values or (3, 1, 3, 2), device=CUDA)


def activations() -> torch.Tensor:
    return torch.randn(8, 4, device=CUDA)


# Programs that wait.
def item() -> None:
    activations().sum().item()


def branch() -> None:
    if (activations() > 0).any():
        pass


def to_list() -> None:
    activations().tolist()


def to_host() -> None:
    activations().cpu()


def to_pageable_host() -> None:
    torch.empty(8, 4).copy_(activations(), non_blocking=True)


def to_device() -> None:
    torch.randn(8, 4).to(CUDA)


def many_to_device() -> None:
    torch._foreach_copy_([activations()], [torch.randn(8, 4)])


def to_device_from_pageable() -> None:
    torch.randn(8, 4).to(CUDA, non_blocking=True)


def made_of_a_list() -> None:
    torch.tensor([1.0, 2.0], device=CUDA)


def nonzero() -> None:
    (activations() > 0).nonzero()


def distinct() -> None:
    torch.unique(torch.randint(5, (8,), device=CUDA))


def by_mask() -> None:
    x = activations()
    _ = x[x > 0]


def put_by_mask() -> None:
    x = activations()
    x[x > 0] = torch.zeros(32, device=CUDA)


def synchronize() -> None:
    torch.cuda.synchronize()


def synchronize_event() -> None:
    torch.cuda.Event().synchronize()


# Programs that do not.
def fill_by_mask() -> None:
    x = activations()
    x[x[:, 0] > 0] = 0.0
    x[x > 0] = 1


def pinned_both_ways() -> None:
    host = torch.empty(8, 4, pin_memory=True)
    host.copy_(activations(), non_blocking=True)
    torch.randn(8, 4).pin_memory().to(CUDA, non_blocking=True)
    activations().to("cpu", non_blocking=True)


def on_the_device() -> None:
    x = activations().requires_grad_()
    order = torch.argsort(x.detach()[:, 0])
    torch.where(x > 0, x[order], 0.0).square().mean().backward()
    torch.searchsorted(torch.arange(9, device=CUDA), order)
    x.to(CUDA).to("cuda", torch.bfloat16)


def on_the_host() -> None:
    torch.randn(4).sum().item()
    torch.unique(torch.tensor([1, 1])).tolist()


# Programs that are refused.
def cpu_beside_cuda() -> None:
    activations() + torch.ones(4)


def cpu_index() -> None:
    _ = activations()[torch.tensor([1, 2])]


def cpu_to_nccl() -> None:
    dist.all_reduce(torch.ones(4))


def cuda_to_gloo() -> None:
    dist.all_reduce(activations(), group=dist.new_group(backend="gloo"))


def strided_to_nccl() -> None:
    dist.all_reduce(activations().t())


def uneven_all_to_all() -> None:
    sent, received = numbers(0, 1, 2), torch.empty(3, dtype=torch.int64, device=CUDA)
    dist.all_to_all_single(received, sent, [1, 2], [2, 1])


def numpy_of_cuda() -> None:
    numbers().numpy()


# Programs whose values are looked at.
def values_are_kept() -> dict[str, Any]:
    tokens = numbers()
    ids, inverse = torch.unique(tokens, return_inverse=True)
    written = torch.zeros(4, dtype=torch.int64, device=CUDA)
    written[1:3].copy_(ids[1:])
    written[0] += 5
    picked = tokens[tokens == 3]
    module = torch.nn.Linear(2, 2).to(CUDA)
    steps = torch.zeros((), device=CUDA)
    steps += 1
    return {
        "ids": ids.tolist(),
        "inverse": inverse.cpu().numpy().tolist(),
        "in place": written.tolist(),
        "picked": picked.tolist(),
        "unknown": float(activations().sum()),
        "finite": bool(torch.isfinite(activations()).all()),
        "count": float(steps),
        "devices": [str(tensor.device) for tensor in (module.weight, torch.ones(1), tokens)],
        "type": module.weight.type(),
        "addresses": len({t.data_ptr() for t in (tokens, ids, tokens[:2], tokens[1:])}),
    }


def values_received() -> dict[str, Any]:
    """Counts, then ids: as many from each member as this rank sends to itself."""
    sent = numbers(0, 2, 4, 1, 3)
    asked = torch.empty(2, dtype=torch.int64, device=CUDA)
    dist.all_to_all_single(asked, numbers(3, 2))
    counts = asked.tolist()
    received = torch.empty(sum(counts), dtype=torch.int64, device=CUDA)
    dist.all_to_all_single(received, sent, counts, [3, 2])
    gathered = torch.empty(4, dtype=torch.int64, device=CUDA)
    dist.all_gather_into_tensor(gathered, numbers(7, 8))
    objects: list[Any] = [None, None]
    dist.all_gather_object(objects, {"a": 1})
    return {"counts": counts, "ids": received.tolist(), "gathered": gathered.tolist(), "objects": objects}


# For the worker.
def add(a: int, b: int) -> int:
    return a + b


def fail() -> None:
    raise ValueError("on purpose")


def die() -> None:
    os._exit(3)

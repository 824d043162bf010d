"""Programs of a few lines whose accounts are known by hand."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from tide_mega.dryrun import groups
from tide_mega.dryrun.ledger import FORWARD, READ, Ledger
from tide_mega.dryrun.mode import dry_run
from tide_mega.dryrun.recorder import Recorder

CUDA = torch.device("cuda", 0)


def account(program: Callable[[Ledger], Any], world_size: int = 1) -> tuple[Any, Ledger]:
    """Run a program on fake tensors; return its result and its accounts, without what it still holds."""
    ledger = Ledger("cuda")
    with dry_run(Recorder(ledger=ledger)):
        if world_size > 1:
            groups.join(0, world_size)
        result = program(ledger)
    ledger._held.clear(), ledger._alive.clear()
    return result, ledger


def of(program: Callable[[Ledger], Any], world_size: int = 1) -> dict[str, Any]:
    """Return the accounts of a program in plain values."""
    result, ledger = account(program, world_size)
    return {
        "result": result,
        "work": [(w.phase, w.name, w.flops, w.bytes, w.smallest, n) for w, n in ledger.work.items()],
        "peaks": {phase: peak.bytes for phase, peak in ledger.peaks.items()},
        "launches": dict(ledger.launches),
        "messages": [(m.name, m.group, moved.count, moved.bytes) for m, moved in ledger.messages.items()],
    }


def two_at_a_time(ledger: Ledger) -> list[int]:
    """Three tensors of 1,000 bytes, of which two live at a time: 1,024 bytes each."""
    held = []
    first = torch.empty(250, device=CUDA)
    second = torch.empty(250, device=CUDA)
    held.append(sum(ledger.by_kind().values()))
    del first
    view = second[10:20]
    held.append(sum(ledger.by_kind().values()))
    del second
    held.append(sum(ledger.by_kind().values()))
    del view
    third = torch.empty(250, device=CUDA)
    held.append(sum(ledger.by_kind().values()))
    del third
    return [*held, sum(ledger.by_kind().values())]


def named(ledger: Ledger) -> list[dict[str, int]]:
    """A tensor that becomes a weight."""
    tensor = torch.empty(128, device=CUDA)
    before = ledger.by_kind()
    ledger.name("weights", [tensor])
    return [before, ledger.by_kind()]


def product(ledger: Ledger) -> None:
    """[8, 32] times [32, 4], differentiated by both factors."""
    a = torch.empty(8, 32, device=CUDA, requires_grad=True)
    b = torch.empty(32, 4, device=CUDA, requires_grad=True)
    with ledger.phase(FORWARD):
        (a @ b).backward(torch.empty(8, 4, device=CUDA))


def rows_of_a_table(ledger: Ledger) -> None:
    """Three rows of 64 fp32 out of 1,000."""
    table, ids = torch.empty(1000, 64, device=CUDA), torch.empty(3, dtype=torch.int64, device=CUDA)
    ledger.clear()
    with ledger.phase(READ):
        table[ids]


def one_kernel(ledger: Ledger) -> None:
    """A compiled function of four operations: 400 bytes read, 400 written, nothing between."""
    function = torch.compile(lambda x: (x.exp() * 2 + 1).sqrt())
    tensor = torch.empty(100, device=CUDA)
    ledger.clear()
    function(tensor)


def collectives(ledger: Ledger) -> None:
    """Of four ranks: 400 bytes summed, 1,600 gathered from 400 each, 800 dealt out."""
    tensor, whole = torch.empty(100, device=CUDA), torch.empty(400, device=CUDA)
    dist.all_reduce(tensor)
    dist.all_reduce(tensor)
    dist.all_gather_into_tensor(whole, tensor)
    dist.all_to_all_single(torch.empty(200, device=CUDA), torch.empty(200, device=CUDA))

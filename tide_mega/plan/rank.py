"""One optimizer step of one rank of a job, on fake tensors: what it holds, computes, sends and waits for.

The rank is built and stepped by the training run's own code on a card that is not there (`tide_mega.dryrun`).
Tokens are drawn by Zipf's law; every other rank is assumed to ask for rows as this one does, which cyclic
ownership makes true but for a few per cent. Left out of the step: reading and broadcasting its tokens, the log.
"""

import resource
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from tide_mega.config.schema import TideConfig
from tide_mega.data.loader import TokenBatch
from tide_mega.dryrun.groups import Mirror
from tide_mega.dryrun.ledger import FORWARD, READ, RETURN, UPDATE, Instant, Ledger, Message, Moved, Peak, Work
from tide_mega.dryrun.mode import dry_run
from tide_mega.dryrun.rank import DryRank, build
from tide_mega.dryrun.recorder import Recorder, Wait
from tide_mega.dryrun.values import attach
from tide_mega.lab.bench.text import draw_ids
from tide_mega.model.steps import compute_gradients
from tide_mega.training.faults.guard import StepGuard
from tide_mega.training.step_traffic import count_step

WARM = 2
"""Steps before the one that is accounted: in the first the moments are made."""
VOTE, TOKENS_OF_VOTE = 5, 3
"""Columns of `tide_mega.training.faults.policy`'s vote, and that of the tokens that a rank has losses of."""


@dataclass
class RankStep:
    """What one step of a rank came to."""

    rank: int
    stage: int
    tensor_rank: int
    microbatches: int
    elements: int
    """Parameters under DeepSpeed on this rank."""
    built: dict[str, int]
    """Bytes held before the step, by kind."""
    peaks: dict[str, Peak]
    instants: list[Instant]
    work: Counter[Work]
    launches: Counter[str]
    messages: dict[Message, Moved]
    waits: Counter[Wait]
    traffic: dict[str, dict[str, int]]
    """The run's own meter, for the same step."""
    seconds: float
    """That the dry run took."""
    resident: int = field(default=0)
    """Largest resident size of its process, in bytes."""

    @property
    def peak(self) -> Peak:
        """The fullest instant of the step."""
        return max(self.peaks.values(), key=lambda peak: peak.bytes)


class Alike(Mirror):
    """The other ranks are like this one; the last stage has labelled tokens."""

    def all_gather(self, sent: Tensor, size: int) -> list[Tensor]:
        """Return the votes of ranks that all have tokens, or copies of what is sent."""
        if sent.dtype != torch.float64 or sent.numel() != VOTE:
            return super().all_gather(sent, size)
        others = sent.clone()
        others[TOKENS_OF_VOTE] = 1.0
        return [others] * size


def run_rank(config: TideConfig, world_size: int, rank: int) -> RankStep:
    """Make `WARM` steps and account the next; call in a worker of `tide_mega.dryrun`."""
    begun = time.process_time()
    ledger = Ledger("cuda")
    with dry_run(Recorder(ledger=ledger), Alike()) as recorder:
        built = build(config, world_size, rank)
        _name_state(ledger, built)
        microbatches = _batches(built)
        with tempfile.TemporaryDirectory() as folder:
            guard = StepGuard(
                config.faults,
                built.device,
                rank=rank,
                replica=built.groups.data_rank,
                run_folder=Path(folder),
                state={},
            )
            for number in range(WARM):
                _step(built, guard, microbatches, ledger, number + 1)
            _name_state(ledger, built)
            recorder.clear()
            ledger.clear()
            built.stage.meter.read()
            before = ledger.by_kind()
            _step(built, guard, microbatches, ledger, WARM + 1)
        return RankStep(
            rank=rank,
            stage=built.groups.pipeline.rank(),
            tensor_rank=built.groups.tensor_rank,
            microbatches=built.accumulation,
            elements=sum(p.numel() for p in built.stage.parameters()),
            built=before,
            peaks=ledger.peaks,
            instants=_thinned(ledger.instants),
            work=ledger.work,
            launches=ledger.launches,
            messages=ledger.messages,
            waits=Counter(recorder.waits),
            traffic=built.stage.meter.read(),
            seconds=time.process_time() - begun,
            resident=1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        )


class _Schedule:
    """Entered around what a replica computes by itself: before it the memory was read, after it goes back."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def __enter__(self) -> None:
        self._ledger.enter(FORWARD)

    def __exit__(self, *_: object) -> None:
        self._ledger.enter(RETURN)


def _step(built: DryRank, guard: StepGuard, batches: list[TokenBatch], ledger: Ledger, number: int) -> None:
    config = built.config
    guard.begin(number)
    with ledger.phase(READ):
        result = compute_gradients(
            built.engine,
            batches,
            config.trainer.z_loss,
            window=config.memory.window,
            own_time=_Schedule(ledger),
        )
    count_step(built.stage.meter, built.stage, config, built.accumulation)
    with ledger.phase(UPDATE):
        verdict = guard.update(built.engine, result, 1e-3, batch=number, can_roll_back=False)
    assert verdict.is_applied


def _batches(built: DryRank) -> list[TokenBatch]:
    trainer, length = built.config.trainer, built.config.data.seq_length
    sequences, vocab = trainer.micro_batch_size, built.config.model.vocab_size
    made = []
    for number in range(built.accumulation):
        with _disable_current_modes():
            seed = built.groups.data_rank * built.accumulation + number
            ids_BS = draw_ids("zipf", sequences * (length + 1), vocab, seed).view(sequences, length + 1)
            both = ids_BS[:, :-1].contiguous(), ids_BS[:, 1:].contiguous()
        made.append(TokenBatch(*(_on_device(value, built) for value in both)))
    return made


def _on_device(value: Tensor, built: DryRank) -> Tensor:
    fake = torch.empty(value.shape, dtype=value.dtype, device=built.device.torch_device)
    attach(fake, value)
    return fake


def _name_state(ledger: Ledger, built: DryRank) -> None:
    """Say which storages are weights, masters and moments, and have gradients named when they come."""
    stage, state = built.stage, built.engine.state
    for parameter in stage.parameters():
        ledger.name("weights", [parameter.data])
        if not hasattr(parameter, "_is_watched"):
            parameter._is_watched = True  # type: ignore[attr-defined]
            parameter.register_post_accumulate_grad_hook(
                lambda p: ledger.name("gradients", [p.grad] if p.grad is not None else [])
            )
        if (kept := state.kept(parameter)) is not None:
            ledger.name("masters", [kept.master])
            ledger.name("moments", [kept.exp_avg, kept.exp_avg_sq])
    if (owned := stage.memory.owned) is not None:
        kept_rows: dict[str, Any] = owned.kept()
        ledger.name("masters", [kept_rows.pop("master")])
        ledger.name("moments", kept_rows.values())
        ledger.name("gradients", [owned.gradient_WKD])


def _thinned(instants: list[Instant], most: int = 600) -> list[Instant]:
    """Keep of each run of instants the fullest, so that no peak is lost."""
    if len(instants) <= most:
        return instants
    each = -(-len(instants) // most)
    return [
        max(instants[first : first + each], key=lambda instant: instant.bytes)
        for first in range(0, len(instants), each)
    ]

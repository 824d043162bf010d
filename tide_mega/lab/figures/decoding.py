"""Milliseconds per decoded token against the number of memory blocks, on this machine (paper, Table 4).

Several models take turns decoding; each time is shown beside its ratio to the baseline's, with a description of
the machine.

Shapes: V vocabulary.
"""

import itertools
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from tide_mega.export.export import export
from tide_mega.export.options import ExportOptions
from tide_mega.inference.decoder import Decoder
from tide_mega.lab import plotting
from tide_mega.lab.figures.analysis import Analysis, SkippedError
from tide_mega.lab.figures.kit import caution
from tide_mega.lab.figures.section import Cell, DataTable, Section
from tide_mega.lab.plotting import BASELINE, line
from tide_mega.parallel.device import Device
from tide_mega.trained.run import TrainedRun

_CPU_INFO = Path("/proc/cpuinfo")


def machine_of(device: Device) -> str:
    """Name the device, and for a CPU its threads and cores."""
    if device.is_cuda:
        return f"one {device.name} (torch {torch.__version__})"
    number = torch.get_num_threads()
    threads = "1 thread" if number == 1 else f"{number} threads"
    return f"{_cpu()}, {threads} of {os.cpu_count()} cores (torch {torch.__version__})"


@contextmanager
def one_thread(device: Device) -> Iterator[None]:
    """Context in which a CPU uses one thread: with several, a step at batch 1 waits for the slowest."""
    before = torch.get_num_threads()
    if not device.is_cuda:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _cpu() -> str:
    lines = _CPU_INFO.read_text(errors="replace").splitlines() if _CPU_INFO.is_file() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


BURST = 8
"""Tokens decoded per turn: short turns spread a machine's slow phases over all models."""


LEAST_LENGTH = 4
"""Tokens of a text: its second half must hold two bursts."""


class Decodes(Protocol):
    """What is timed of a decoder (`tide_mega.inference.decoder.Decoder`)."""

    def prefill(self, ids: Sequence[Sequence[int]], /) -> Tensor:
        """Start over with prompts; return logits [1, V]."""

    def step(self, ids_B: Tensor, /) -> Tensor:
        """Add a token; return logits [1, V]."""

    def close(self) -> None:
        """Close files."""


@dataclass(frozen=True)
class Contestant:
    """A model that is timed."""

    label: str
    num_blocks: int
    """K."""
    place: str
    """Where its rows are stored; "" at K = 0."""
    open: Callable[[], Decodes]

    @property
    def name(self) -> str:
        """Label and place."""
        return f"{self.label}, {self.place}" if self.place else self.label


@dataclass(frozen=True)
class Times:
    """Milliseconds of single steps, by burst."""

    label: str
    num_blocks: int
    place: str
    by_burst: tuple[tuple[float, ...], ...]

    @property
    def name(self) -> str:
        """Label and place."""
        return f"{self.label}, {self.place}" if self.place else self.label

    @property
    def all(self) -> list[float]:
        """Times of every burst."""
        return [ms for burst in self.by_burst for ms in burst]

    @property
    def median(self) -> float:
        """Over all steps."""
        return statistics.median(self.all)

    def percentile(self, percent: float) -> float:
        """Return a percentile over the steps."""
        return float(np.percentile(self.all, percent))

    def ratios(self, base: "Times") -> "Ratios":
        """Compare with the baseline, over bursts of the same tokens at about the same time."""
        each = [
            statistics.median(mine) / statistics.median(theirs)
            for mine, theirs in zip(self.by_burst, base.by_burst, strict=True)
        ]
        return Ratios(*(float(np.percentile(each, percent)) for percent in (25, 50, 75)))


@dataclass(frozen=True)
class Ratios:
    """Ratios of burst medians to the baseline's."""

    quarter: float
    """First quartile."""
    median: float
    three_quarters: float


def take_turns(
    contestants: Sequence[Contestant],
    texts: Sequence[Sequence[int]],
    tokens: int,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Times]:
    """Let every model decode at least `tokens` tokens of the texts, in bursts, in an order that rotates.

    All models are open together. Each prefills the first half of a text and then takes its tokens one by one, as
    in generation, including the choice of the likeliest token. The first burst of a text is not counted: it fills
    caches.

    Args:
        contestants: the models.
        texts: token ids, all of one length, at least `LEAST_LENGTH`; cycled in order.
        tokens: timed steps of each.
        clock: seconds.
    """
    half = len(texts[0]) // 2
    burst = min(BURST, half // 2)
    bursts = -(-tokens // burst)
    found: list[list[tuple[float, ...]]] = [[] for _ in contestants]
    with ExitStack() as opened:
        decoders = [opened.enter_context(closing(contestant.open())) for contestant in contestants]
        for text in itertools.cycle(texts):
            for decoder in decoders:
                decoder.prefill([text[:half]])
            for number, first in enumerate(range(half, len(text) - burst + 1, burst)):
                for turn in range(len(decoders)):
                    which = (number + turn) % len(decoders)
                    taken = _timed(decoders[which], text[first : first + burst], clock)
                    if number:
                        found[which].append(taken)
                if len(found[0]) == bursts:
                    return [
                        Times(one.label, one.num_blocks, one.place, tuple(by_burst))
                        for one, by_burst in zip(contestants, found, strict=True)
                    ]
    raise AssertionError("texts are taken again until there are enough tokens")


def _timed(decoder: Decodes, ids: Sequence[int], clock: Callable[[], float]) -> tuple[float, ...]:
    taken = []
    for token in ids:
        ids_1 = torch.tensor([token])
        start = clock()
        int(decoder.step(ids_1).argmax())  # waits for the device
        taken.append(1e3 * (clock() - start))
    return tuple(taken)


def draw(times: Sequence[Times], base: Times | None, paper: Mapping[int, float]) -> Figure:
    """Draw medians with quartiles; with a baseline also the ratio to it, beside the paper's, by K."""
    figure, (axes,) = plotting.panels(1 if base is None else 2, width=6, height=4.4)
    most = max(one.num_blocks for one in times)
    places = list(dict.fromkeys(one.place for one in times))
    with_memory = [place for place in places if place]
    for place in places:
        number = with_memory.index(place) if place else 0
        look = line(number) if place else BASELINE
        drawn = {
            "color": look.colour,
            "marker": look.marker,
            "linestyle": "",
            "label": place or "no memory",
        }
        of_place = sorted((one for one in times if one.place == place), key=lambda one: one.num_blocks)
        blocks = [one.num_blocks for one in of_place]
        beside = 0.015 * number  # of an axis, so that bars at one K stand side by side
        medians = [one.median for one in of_place]
        below = [one.median - one.percentile(25) for one in of_place]
        above = [one.percentile(75) - one.median for one in of_place]
        axes[0].errorbar(
            [k + beside * most for k in blocks], medians, yerr=(below, above), capsize=3, **drawn
        )
        if base is not None and place:
            ratios = [one.ratios(base) for one in of_place]
            low = [ratio.median - ratio.quarter for ratio in ratios]
            high = [ratio.three_quarters - ratio.median for ratio in ratios]
            axes[1].errorbar(
                [k + beside * max(paper) for k in blocks],
                [ratio.median for ratio in ratios],
                yerr=(low, high),
                capsize=3,
                **drawn,
            )
    plotting.label(axes[0], "Decoding, batch 1 (bars: middle half)", "memory blocks K", "time a token (ms)")
    axes[0].set_ylim(bottom=0)
    if base is not None:
        of_paper = [ms / paper[0] for ms in paper.values()]
        axes[1].plot(list(paper), of_paper, "--x", color="black", linewidth=1, label="paper, 1B on a B200")
        axes[1].axhline(1, color=plotting.GREY, linestyle=":", linewidth=1)
        plotting.label(
            axes[1], f"Relative to {base.label} (bars: middle half of turns)", "memory blocks K", "ratio"
        )
    for axis in axes:
        axis.set_xticks(
            sorted({one.num_blocks for one in times} | (set(paper) if axis is not axes[0] else set()))
        )
        axis.legend(frameon=False, fontsize=9, loc="best")
    return figure


PAPER_MS = {0: 11.085, 2: 11.236, 4: 11.854, 8: 12.688, 16: 12.901, 24: 13.422}
"""By K."""
PAPER = (
    "On one B200, averaged over 5,120 tokens, a token takes LLaMA-Base-1B 11.085 ms and TIDE-1B 11.236, 11.854, "
    "12.688, 12.901 and 13.422 ms at K = 2, 4, 8, 16 and 24: 1.4 to 21 % more."
)
_TEXTS = 8
"""Most texts read, one after the other."""
IN_MEMORY, ON_DISK = "rows in memory", "int4 rows on disk"


def run(analysis: Analysis) -> Section:
    """Export every run to a temporary folder and let them decode held-out text in turns, all in memory at once.

    Raises:
        SkippedError: the held-out split has no whole sequence, or sequences are shorter than 4 tokens.
        ExportError: a folder cannot be written.
    """
    texts = [tokens_T.tolist() for tokens_T in analysis.held_out_rows(analysis.runs[0], _TEXTS)]
    # The number of positions that all runs' models support.
    length = min(one.config.data.seq_length for one in analysis.runs)
    if length < LEAST_LENGTH:
        raise SkippedError(f"it needs sequences of {LEAST_LENGTH} tokens or more")
    analysis.forget_model()
    with one_thread(analysis.device), _exported(analysis) as contestants:
        machine = machine_of(analysis.device)
        times = take_turns(contestants, [text[:length] for text in texts], analysis.options.decode_tokens)
    base = next((one for one in times if one.num_blocks == 0), None)
    return Section(
        paper=PAPER,
        findings=tuple(describe(times, base, machine)),
        tables={"by_run": by_run(times, base), "paper": _paper()},
        figures={"decoding": draw(times, base, PAPER_MS)},
        notes=(
            f"Measured on {machine}, in {analysis.options.precision}, batch 1, whatever else the machine did: "
            f"{len(times[0].by_burst)} turns of {len(times[0].by_burst[0])} tokens for each model, in an order "
            "that rotates, all models in memory together. The tokens are held-out text behind a prompt of it, and "
            "each step finds the token that the model would choose. No step is compiled. A cache of rows on disk "
            "holds what came before in the text; the file was just written, so the system may hold it too. Ratios "
            "are of the medians of turns over the same tokens.",
            *caution(analysis.runs),
        ),
    )


@contextmanager
def _exported(analysis: Analysis) -> Iterator[list[Contestant]]:
    """Export the runs beside the results, with rows in memory and in a file; removed at the end."""
    analysis.out.mkdir(parents=True, exist_ok=True)
    precision = analysis.options.precision
    with tempfile.TemporaryDirectory(dir=analysis.out, prefix=".decoding-") as folder:
        contestants = []
        for number, one in enumerate(analysis.runs):
            inline = _export(one, Path(folder) / f"{number}-inline", precision)
            contestants.append(_contestant(analysis, one, IN_MEMORY if one.num_blocks else "", inline))
            if one.num_blocks:
                beside = _export(
                    one, Path(folder) / f"{number}-file", precision, tables="int4", memory="sidecar"
                )
                contestants.append(_contestant(analysis, one, ON_DISK, beside))
        yield contestants


def _export(
    one: TrainedRun, out: Path, dtype: str, *, tables: str | None = None, memory: str = "inline"
) -> Path:
    path, data = str(one.weights.path), str(one.data)
    export(
        ExportOptions(path, str(out), dtype=dtype, tables=tables, memory=memory, data=data, name=one.label),
        progress=False,
    )
    return out


def _contestant(analysis: Analysis, one: TrainedRun, place: str, folder: Path) -> Contestant:
    open_it = partial(
        Decoder.open,
        folder,
        device=analysis.device.torch_device,
        dtype=analysis.options.precision,
        memory="disk" if place == ON_DISK else "device",
    )
    return Contestant(one.label, one.num_blocks, place, open_it)


def describe(times: Sequence[Times], base: Times | None, machine: str) -> list[str]:
    """Say how long a token takes, also relative to the baseline."""
    found = [
        f"On {machine}, batch 1: "
        + "; ".join(f"{one.name} {one.median:.3f} ms" for one in times)
        + " a token."
    ]
    if base is None:
        return [*found, "There is no run without memory to compare with."]
    for one in times:
        if one.num_blocks:
            ratios = one.ratios(base)
            sentence = (
                f"{one.name} (K = {one.num_blocks}): {ratios.median:.3f} times {base.label}, half of the turns "
                f"{ratios.quarter:.3f} to {ratios.three_quarters:.3f}"
            )
            if one.num_blocks in PAPER_MS:
                sentence += f"; the paper's 1B {PAPER_MS[one.num_blocks] / PAPER_MS[0]:.3f} times"
            found.append(f"{sentence}.")
    return found


def by_run(times: Sequence[Times], base: Times | None) -> DataTable:
    """One row for each model and place of its rows."""
    columns = (
        *("run", "K", "rows", "steps", "median (ms)", "10 % (ms)", "90 % (ms)", "mean (ms)"),
        *("ratio to K = 0", "a quarter is below", "a quarter is above", "paper's ratio at this K"),
    )
    rows: list[tuple[Cell, ...]] = []
    for one in times:
        ratios = None if base is None else one.ratios(base)
        paper = PAPER_MS.get(one.num_blocks)
        rows.append(
            (
                *(one.label, one.num_blocks, one.place or "none", len(one.all), one.median),
                *(one.percentile(10), one.percentile(90), sum(one.all) / len(one.all)),
                *((None,) * 3 if ratios is None else (ratios.median, ratios.quarter, ratios.three_quarters)),
                None if paper is None else paper / PAPER_MS[0],
            )
        )
    return DataTable.of(columns, rows)


def _paper() -> DataTable:
    return DataTable.of(
        ("K", "time a token (ms)", "ratio to K = 0"),
        [(k, ms, ms / PAPER_MS[0]) for k, ms in PAPER_MS.items()],
    )

"""Milliseconds a decoded token by the number of memory blocks, on this machine (paper, Table 4)."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from tide_mega.diagnostics.analysis import Analysis, SkippedError
from tide_mega.diagnostics.base_models import caution
from tide_mega.diagnostics.decoding.machine import machine_of, one_thread
from tide_mega.diagnostics.decoding.plot import draw
from tide_mega.diagnostics.decoding.times import LEAST_LENGTH, Contestant, Times, take_turns
from tide_mega.diagnostics.section import Cell, DataTable, Section
from tide_mega.export.export import export
from tide_mega.export.options import ExportOptions
from tide_mega.inference.decoder import Decoder
from tide_mega.trained.run import TrainedRun

PAPER_MS = {0: 11.085, 2: 11.236, 4: 11.854, 8: 12.688, 16: 12.901, 24: 13.422}
"""By K."""
PAPER = (
    "On one B200, averaged over 5,120 tokens, a token takes LLaMA-Base-1B 11.085 ms and TIDE-1B 11.236, 11.854, "
    "12.688, 12.901 and 13.422 ms at K = 2, 4, 8, 16 and 24: 1.4 to 21 % more."
)
_TEXTS = 8
"""Most that are read, one after the other."""
IN_MEMORY, ON_DISK = "rows in memory", "int4 rows on disk"


def run(analysis: Analysis) -> Section:
    """Export every run into a temporary folder and decode held-out text with them by turns, all in memory at once.

    Raises:
        SkippedError: the held-out split has no whole sequence, or sequences are shorter than 4 tokens.
        ExportError: a folder cannot be written.
    """
    texts = [tokens_T.tolist() for tokens_T in analysis.held_out_rows(analysis.runs[0], _TEXTS)]
    # As many positions as every run's model takes.
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
    """Export the runs beside the results, with rows in memory and in a file; gone when it ends."""
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
    """Say what a token takes, and beside the baseline."""
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

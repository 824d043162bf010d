"""Runs one export, from a checkpoint to a folder that is complete or absent."""

import json
import logging
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

import tide_mega
from tide_mega.checkpoint.folder import CheckpointFolder, step_of
from tide_mega.errors import CheckpointError, ExportError, refuse
from tide_mega.export.card import Card
from tide_mega.export.folder import NOTE_FILE, new_folder, require_room
from tide_mega.export.model_config import SIDECAR_FILE, generation_config, memory_config, model_config
from tide_mega.export.options import Choice, ExportOptions, choose
from tide_mega.export.shards import plan_shards, write_shards
from tide_mega.export.tokenizer_files import write_tokenizer
from tide_mega.export.weights import MemoryRows, base_entries
from tide_mega.files import to_disk
from tide_mega.hf.rows_tide import RowError
from tide_mega.hf.sidecar_tide import Layout, SidecarError, write_sidecar
from tide_mega.hf.tokens_tide import TOKENIZER_FILE, vocabulary_fingerprint
from tide_mega.metrics.jsonl import read_metrics
from tide_mega.parallel.device import DTYPES
from tide_mega.trained.run import TrainedRun

log = logging.getLogger(__name__)

CODE = Path(tide_mega.__file__).parent / "hf"
FORMAT = 1


@dataclass(frozen=True)
class Exported:
    """The result of an export."""

    folder: Path
    size: int
    """Bytes of all files."""


def export(options: ExportOptions, *, progress: bool = True) -> Exported:
    """Export a run's checkpoint; a progress bar on standard error shows bytes and remaining time.

    Raises:
        ConfigError: an option cannot be satisfied, or the run cannot be opened.
        CheckpointError: the checkpoint cannot be read.
        ExportError: the folder could not be written to its end; nothing of it is left.
        FolderTakenError: another process makes the same export.
    """
    choice = choose(options)
    run = open_run(options)
    if not run.num_blocks:
        choice = _without_memory(options, choice)
    log.info(
        "%s: K = %d, step %d, %s training tokens", run.label, run.num_blocks, run.step, f"{run.tokens:,}"
    )
    with new_folder(Path(options.out), overwrite=options.overwrite) as folder:
        _write(run, options, choice, folder, progress)
    out = Path(options.out).resolve()
    return Exported(out, sum(path.stat().st_size for path in out.iterdir()))


def open_run(options: ExportOptions) -> TrainedRun:
    """Open the run at the requested step.

    The dataset must exist; its index, deciles and tokenizer are read. They identify the run's own dataset: ids of
    another tokenizer would stand for other text.

    Raises:
        ConfigError: it is not a run, or has no intact checkpoint of the step.
    """
    run = TrainedRun.open(options.run, data=options.data)
    if options.step is None or run.step == options.step:
        return run
    folder = CheckpointFolder(run.folder / "checkpoints")
    found = {step_of(path): path for path in folder.complete()}
    if options.step not in found:
        there = ", ".join(f"{step}" for step in found)
        refuse("step", options.step, f"has no checkpoint in {run.folder}", f"those there are of step {there}")
    return TrainedRun.open(found[options.step], label=run.label, data=options.data)


def _without_memory(options: ExportOptions, choice: Choice) -> Choice:
    """Return the storage choice of a model without memory.

    Raises:
        ConfigError: the options specify how to store a memory.
    """
    if options.tables is not None:
        refuse("tables", options.tables, "is for a memory, and the run has K = 0", "leave it out")
    if options.memory != "inline":
        refuse("memory", options.memory, "is for a memory, and the run has K = 0", "leave it out")
    return replace(choice, tables=choice.dtype)


def _write(run: TrainedRun, options: ExportOptions, choice: Choice, folder: Path, progress: bool) -> None:
    config = run.config
    entries = base_entries(run.weights, DTYPES[choice.dtype])
    memory = MemoryRows(run.weights, config, choice) if run.num_blocks else None
    if memory is not None:
        entries += memory.entries()
    inside = sum(entry.size for entry in entries)
    is_sidecar = memory is not None and choice.memory == "sidecar"
    beside = 0 if memory is None or not is_sidecar else Layout(memory.format, memory.num_rows).file_bytes
    require_room(folder, inside + beside)
    eos_id = write_tokenizer(run.data, folder, config.data.seq_length)
    described = model_config(config, choice, eos_id)
    with _bar(inside + beside, progress) as wrote, _of_the_training(run.weights.path):
        if memory is not None:
            memory.prepare()
        write_shards(folder, plan_shards(entries), wrote)
        if memory is not None:
            fingerprint = None
            if is_sidecar:
                fingerprint = _write_sidecar(memory, folder / SIDECAR_FILE, wrote)
            vocabulary = vocabulary_fingerprint(folder / TOKENIZER_FILE)
            described |= memory_config(memory.format, choice, memory.part_rows, fingerprint, vocabulary)
            for path in sorted(CODE.glob("*_tide.py")):
                shutil.copyfile(path, folder / path.name)
    _write_json(folder / "config.json", described)
    _write_json(folder / "generation_config.json", generation_config(eos_id))
    card = Card(
        name=options.name or run.label,
        license=options.license,
        config=config,
        choice=choice,
        step=run.step,
        tokens=run.tokens,
        evaluation=last_evaluation(run),
        row_format=None if memory is None else memory.format,
    )
    (folder / "README.md").write_text(card.text(), encoding="utf-8")
    _write_json(folder / NOTE_FILE, _note(run, choice, eos_id))


def last_evaluation(run: TrainedRun) -> dict[str, Any] | None:
    """Return the newest record of held-out losses up to the run's step; None if there is none."""
    if not run.metrics.is_file():
        return None
    records = [r for r in read_metrics(run.metrics) if r.get("kind") == "eval" and r["step"] <= run.step]
    return records[-1] if records else None


def _note(run: TrainedRun, choice: Choice, eos_id: int) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "tide_mega": tide_mega.__version__,
        "run": run.label,
        "save_id": run.weights.state.save_id,
        "step": run.step,
        "tokens": run.tokens,
        "num_blocks": run.num_blocks,
        "eos_id": eos_id,
        **asdict(choice),
    }


def _write_sidecar(memory: MemoryRows, path: Path, wrote: Callable[[int], object]) -> str:
    def counted() -> Iterator[Any]:
        for rows_NKD in memory.finished_rows():
            yield rows_NKD
            wrote(len(rows_NKD) * memory.row_bytes)

    try:
        return write_sidecar(path, memory.format, memory.num_rows, counted(), basis=memory.basis)
    except SidecarError as error:
        raise ExportError(f"{error}: nothing of the export is left; make room, and start again.") from error


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    to_disk(path)


@contextmanager
def _bar(total: int, progress: bool) -> Iterator[Callable[[int], object]]:
    seconds = 0.1 if sys.stderr.isatty() else 30.0  # a log need not grow by ten lines a second
    shown = {"total": total, "unit": "B", "unit_scale": True, "desc": "exporting", "disable": not progress}
    with tqdm(**shown, mininterval=seconds, maxinterval=seconds) as bar:
        yield bar.update


@contextmanager
def _of_the_training(checkpoint: Path) -> Iterator[None]:
    """Context that names the checkpoint in errors about rows that are not finite."""
    try:
        yield
    except RowError as error:
        raise CheckpointError(f"{checkpoint}: {error}.") from error

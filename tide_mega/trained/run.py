"""A run folder, or one of its checkpoints, opened for reading."""

import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from torch import Tensor

from tide_mega.checkpoint import weights as stored_weights
from tide_mega.checkpoint.folder import CheckpointFolder, step_of
from tide_mega.checkpoint.state import SavedState, deciles_checksum
from tide_mega.checkpoint.storage import Manifest
from tide_mega.config.hydra_door import from_yaml
from tide_mega.config.schema import TideConfig
from tide_mega.data.frequency import UNSEEN, DecileTable, load_counts
from tide_mega.data.prepare.vocabulary import dataset_tokenizer
from tide_mega.data.stream import TokenStream
from tide_mega.data.tokenizer import Tokenizer
from tide_mega.errors import CheckpointError, ConfigError

log = logging.getLogger(__name__)

CHUNK_ELEMENTS = 2**25
"""Elements of stored rows read at a time: 128 MB."""


@dataclass(frozen=True)
class StoredWeights:
    """The weights of one checkpoint, read row by row whatever the topology that saved them.

    Names are those of `tide_mega.model.canonical`: `embedding.weight` [V, D], `memory.tables` [V, K, D],
    `memory.gains` [K, D], `layers.0.router.weight` [K + 1, D], ...
    """

    path: Path

    @cached_property
    def state(self) -> SavedState:
        """The content of the checkpoint's state.json."""
        return SavedState.read(self.path)

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.state.progress.step

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every weight, by name."""
        stored = stored_weights.shapes(self.path).items()
        return {name.removeprefix("master/"): shape for name, shape in stored if name.startswith("master/")}

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a weight's shape.

        Raises:
            CheckpointError: there is no such weight.
        """
        if name not in self.shapes:
            raise CheckpointError(f"{self.path} has no {name}: it has {', '.join(sorted(self.shapes))}")
        return self.shapes[name]

    def rows(self, name: str, first: int, last: int) -> Tensor:
        """Read rows [first, last) of a weight, fp32.

        Raises:
            CheckpointError: there is no such weight, or a file cannot be read.
        """
        return stored_weights.rows(self.path, f"master/{name}", self.shape(name), first, last)

    def tensor(self, name: str) -> Tensor:
        """Read a whole weight, fp32; see `rows`."""
        return self.rows(name, 0, self.shape(name)[0])

    def chunks(self, name: str) -> Iterator[tuple[int, Tensor]]:
        """Yield (first row, rows) of a weight, about 128 MB at a time."""
        total, *columns = self.shape(name)
        rows = max(1, CHUNK_ELEMENTS // max(1, int(np.prod(columns))))
        for first in range(0, total, rows):
            yield first, self.rows(name, first, min(first + rows, total))


@dataclass(frozen=True)
class TrainedRun:
    """A run folder, and the checkpoint of it that is inspected."""

    label: str
    folder: Path
    config: TideConfig
    weights: StoredWeights
    data: Path
    """Folder of the prepared dataset on which it was trained."""

    @classmethod
    def open(cls, path: Path | str, label: str | None = None, data: Path | str | None = None) -> "TrainedRun":
        """Open a run folder (its newest whole checkpoint) or one checkpoint, `runs/x/checkpoints/step-00000500`.

        The label is the run's name unless one is given, possibly as `label=path`. `data` is the present location
        of the dataset, if it differs from the configuration's.

        Raises:
            ConfigError: the path is neither, has no whole checkpoint, or the dataset is missing or another one.
            CheckpointError: the checkpoint's state cannot be read.
        """
        text = str(path)
        if label is None and (named := re.fullmatch(r"([^/=]+)=(.+)", text)):
            label, text = named.groups()
        where = Path(text).resolve()
        is_checkpoint = (where / "manifest.json").is_file()
        folder = where.parent.parent if is_checkpoint else where
        if not (folder / "config.yaml").is_file():
            raise ConfigError(
                f"{text} is not a run folder: it has no config.yaml. Give run.root/run.name of a training."
            )
        chosen = where if is_checkpoint else _newest(folder, text)
        if problems := _problems(chosen):
            raise ConfigError(f"{chosen} is damaged: {'; '.join(problems)}. Choose another checkpoint.")
        config = _config_of(folder)
        dataset = Path(data or config.data.path)
        if not (dataset / "index.json").is_file():
            raise ConfigError(
                f"the dataset of {text}, {dataset}, is not there: say where it lies with data=<folder>."
            )
        run = cls(label or folder.name, folder, config, StoredWeights(chosen), dataset)
        if not run._is_its_dataset():
            raise ConfigError(
                f"{dataset} is not the dataset that {text} was trained on, or was prepared anew since: its "
                "frequency deciles are others. Say where the right one lies with data=<folder>."
            )
        return run

    def _is_its_dataset(self) -> bool:
        if len(self.deciles.bin_of_type) > self.config.model.vocab_size:
            return False
        return deciles_checksum(self.bins.tobytes()) == self.weights.state.identity.deciles

    @property
    def num_blocks(self) -> int:
        """K."""
        return self.config.memory.num_blocks

    @property
    def step(self) -> int:
        """Optimizer steps done at the checkpoint."""
        return self.weights.step

    @property
    def tokens(self) -> int:
        """Training tokens consumed at the checkpoint."""
        return self.tokens_at(self.weights)

    @property
    def tokens_per_step(self) -> float:
        """Mean over the optimizer steps up to the checkpoint, as the batch size may have changed."""
        progress = self.weights.state.progress.count_tokens(self.config.data.seq_length)
        return progress.tokens / progress.step

    @property
    def metrics(self) -> Path:
        """The run's metrics.jsonl (`tide_mega.metrics.jsonl`)."""
        return self.folder / "metrics.jsonl"

    def tokens_at(self, weights: StoredWeights) -> int:
        """Return the training tokens consumed at one of the checkpoints of `history`."""
        return weights.state.progress.count_tokens(self.config.data.seq_length).consumed_tokens

    @cached_property
    def history(self) -> list[StoredWeights]:
        """Return every whole checkpoint of the run up to the inspected one, by step; one per step."""
        complete = CheckpointFolder(self.folder / "checkpoints").complete()
        by_step = {step_of(path): StoredWeights(path) for path in complete if not _problems(path)}
        return [weights for weights in by_step.values() if weights.step <= self.step]

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The dataset's tokenizer."""
        return dataset_tokenizer(self.data)

    def open_text(self, split: str) -> TokenStream:
        """Open a split of the dataset as the run's training did, skipped shards and all.

        Raises:
            DataError: the data is damaged.
        """
        return TokenStream.of_run(self.config.data, split, folder=self.data, logger=log)

    @cached_property
    def deciles(self) -> DecileTable:
        """Frequency deciles of the training text."""
        return DecileTable.load(self.data)

    @cached_property
    def counts(self) -> np.ndarray:
        """Counts of each type of the model's vocabulary in the prepared training text [V]."""
        counts = load_counts(self.data)
        return np.pad(counts, (0, self.config.model.vocab_size - len(counts)))

    @cached_property
    def bins(self) -> np.ndarray:
        """The decile of each type of the model's vocabulary [V], int8; `DROPPED` or `UNSEEN` if it has none."""
        known = self.deciles.bin_of_type
        return np.pad(known, (0, self.config.model.vocab_size - len(known)), constant_values=UNSEEN)


def open_runs(paths: Sequence[str], data: str | None = None) -> list[TrainedRun]:
    """Open several runs, distinguished by their labels.

    Raises:
        ConfigError: a run cannot be opened, or two have the same label.
    """
    runs = [TrainedRun.open(path, data=data) for path in paths]
    labels = [run.label for run in runs]
    if twice := sorted({label for label in labels if labels.count(label) > 1}):
        raise ConfigError(f"two runs are called {twice[0]}: name them, run=first=<path>,second=<path>.")
    return runs


def _config_of(folder: Path) -> TideConfig:
    path = folder / "config.yaml"
    try:
        return from_yaml(path.read_text(encoding="utf-8"))
    except (ConfigError, OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not a configuration of this version: {error}") from error


def _newest(folder: Path, given: str) -> Path:
    found = CheckpointFolder(folder / "checkpoints").complete()
    whole_ones = [path for path in sorted(found, key=step_of, reverse=True) if not _problems(path)]
    if not whole_ones:
        raise ConfigError(
            f"{given} has no whole checkpoint: train it (checkpoint.at_end=true), or give another run."
        )
    return whole_ones[0]


def _problems(path: Path) -> list[str]:
    try:
        return Manifest.read(path).problems_outside(path)
    except (CheckpointError, OSError) as error:
        return [str(error)]

"""The input of every figure: runs, options, and the models of their checkpoints, loaded one at a time."""

from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from tide_mega.data.loader import TokenBatch, validation_batches
from tide_mega.data.texts import TextSet
from tide_mega.errors import ConfigError
from tide_mega.lab.figures.registry import AnalyzeOptions
from tide_mega.lab.plotting import Line, lines
from tide_mega.parallel.device import Device
from tide_mega.trained.model import TrainedModel
from tide_mega.trained.run import StoredWeights, TrainedRun, open_runs

HELD_OUT = "held-out"
"""Name of the held-out split among the texts."""


class SkippedError(Exception):
    """A diagnostic has nothing to show for these runs; the message says what it needs."""


@dataclass
class Analysis:
    """Runs side by side, the smallest K first. They share tokenizer and held-out text."""

    runs: list[TrainedRun]
    options: AnalyzeOptions
    device: Device
    out: Path
    """The output folder."""
    _open: tuple[TrainedRun, StoredWeights, TrainedModel] | None = field(default=None, repr=False)

    @classmethod
    def open(cls, options: AnalyzeOptions, device: Device) -> "Analysis":
        """Open the runs.

        Raises:
            ConfigError: one cannot be opened, two have one label, or their tokenizers differ.
        """
        given = open_runs(options.run, options.data)
        out = Path(options.out) if options.out else given[-1].folder / "analysis"
        runs = sorted(given, key=lambda run: run.num_blocks)
        if len({run.tokenizer.fingerprint for run in runs}) > 1:
            raise ConfigError("the runs were trained with different tokenizers: analyse them one by one.")
        return cls(runs, options, device, out)

    @property
    def base(self) -> TrainedRun | None:
        """The baseline: the run with K = 0, if there is one."""
        return next((run for run in self.runs if run.num_blocks == 0), None)

    @property
    def with_memory(self) -> list[TrainedRun]:
        """The runs with K > 0.

        Raises:
            SkippedError: there is none.
        """
        found = [run for run in self.runs if run.num_blocks > 0]
        if not found:
            raise SkippedError("it needs a run with memory (K > 0)")
        return found

    @property
    def looks(self) -> dict[str, Line]:
        """Colour and marker of each run, by label: the same in every figure, whichever runs are left out."""
        looks = lines([run.num_blocks for run in self.runs])
        return {run.label: look for run, look in zip(self.runs, looks, strict=True)}

    def model(self, run: TrainedRun, weights: StoredWeights | None = None) -> TrainedModel:
        """Return a checkpoint's model; releases the previous one, so that only one is in memory."""
        weights = weights or run.weights
        if self._open is None or self._open[:2] != (run, weights):
            self.forget_model()
            model = TrainedModel(run, self.device, weights=weights, precision=self.options.precision)
            self._open = (run, weights, model)
        return self._open[2]

    def forget_model(self) -> None:
        """Release the model that `model` returned last."""
        self._open = None
        self.device.free_memory()

    def held_out(self, run: TrainedRun) -> list[TokenBatch]:
        """Return `options.sequences` held-out sequences of the run's dataset, the same for every run of it."""
        batches = validation_batches(
            run.open_text("validation"),
            seed=self.options.seed,
            sequences=self.options.sequences,
            micro_batch_size=self.options.batch,
            dp_rank=0,
            dp_size=1,
        )
        return list(batches)

    def texts(self, run: TrainedRun) -> dict[str, list[TokenBatch]]:
        """Return the held-out split and each of `options.texts` by name, with files of equal name kept apart.

        Raises:
            ConfigError: a file does not exist.
            DataError: one cannot be read.
        """
        options, config = self.options, run.config
        texts = {HELD_OUT: self.held_out(run)}
        for path in options.texts:
            text = TextSet.load(
                path,
                run.tokenizer,
                max_tokens=options.text_tokens,
                max_document_bytes=options.max_document_bytes,
                vocab_size=config.model.vocab_size,
            )
            name, number = text.name, 2
            while name in texts:
                name, number = f"{text.name} ({number})", number + 1
            texts[name] = list(text.batches(config.data.seq_length, options.batch))
        return texts

    def held_out_rows(self, run: TrainedRun, number: int) -> list[Tensor]:
        """Return the tokens [T] of the first `number` sequences of `held_out` without padding, or of all.

        Raises:
            SkippedError: there is none.
        """
        rows = [
            tokens_T
            for batch in self.held_out(run)
            for tokens_T in batch.tokens_BT[(batch.labels_BT >= 0).all(1)]
        ]
        if not rows:
            raise SkippedError(
                f"it needs held-out text of a whole sequence, {run.config.data.seq_length + 1:,} tokens"
            )
        return rows[:number]

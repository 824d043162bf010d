"""The length of a run, the size of its next step, and what is due after it.

A run has a fixed number of optimizer steps (`trainer.max_steps`) or of training tokens (`trainer.max_tokens`), and
everything on its way is counted in that unit: schedule, evaluations, log lines and checkpoints. So a run of fixed
tokens gets these tokens and its schedule whatever batch sizes it was resumed with, and a run of fixed steps
makes these steps on more or fewer tokens. Configuration values in steps mean steps of the current batch size.
"""

from dataclasses import dataclass
from typing import Protocol

from tide_mega.config.schema import TideConfig

STEPS, TOKENS = "steps", "tokens"


class Position(Protocol):
    """A position in a run, such as a `TrainingState`."""

    @property
    def step(self) -> int:
        """Optimizer steps done."""

    @property
    def tokens(self) -> int:
        """Training tokens of these steps."""


def position_in(unit: str, at: Position) -> int:
    """Return a position in the given unit."""
    return at.step if unit == STEPS else at.tokens


@dataclass(frozen=True)
class Stride:
    """The next optimizer step."""

    sequences: int
    """Sequences that it takes over all ranks: a batch, or what is left of the run's tokens."""
    is_full: bool
    """Whether that is a full batch."""
    before: int
    """Position of the run before the step, in its unit."""
    after: int
    """Position after it."""
    whole: int
    """A full batch, in the unit."""
    is_last: bool

    def is_due(self, every: int, *, at_end: bool = True) -> bool:
        """Return whether something made every `every` batches (0: never) is due after the step, or at the end."""
        mark = every * self.whole
        return (at_end and self.is_last) or (every > 0 and self.before // mark < self.after // mark)


@dataclass(frozen=True)
class Course:
    """The length of a run, in optimizer steps or training tokens."""

    unit: str
    """`STEPS` or `TOKENS`."""
    total: int
    """Length of the run, in the unit."""
    batch: int
    """Sequences of an optimizer step over all ranks."""
    seq_length: int

    @classmethod
    def of(cls, config: TideConfig) -> "Course":
        """Return the length that a valid configuration gives."""
        trainer, seq_length = config.trainer, config.data.seq_length
        if trainer.max_steps is not None:
            return cls(STEPS, trainer.max_steps, trainer.global_batch_size, seq_length)
        assert trainer.max_tokens is not None
        return cls(TOKENS, trainer.max_tokens, trainer.global_batch_size, seq_length)

    @property
    def key(self) -> str:
        """The configuration key that gives the length."""
        return f"trainer.max_{self.unit}"

    @property
    def whole(self) -> int:
        """A full batch, in the unit."""
        return 1 if self.unit == STEPS else self.batch * self.seq_length

    def done(self, at: Position) -> int:
        """Return a position in the run's unit."""
        return position_in(self.unit, at)

    def is_complete(self, at: Position) -> bool:
        """Return whether the run is complete."""
        return self.done(at) >= self.total

    def next(self, at: Position) -> Stride:
        """Return the next step of an incomplete run.

        A run of fixed tokens ends with the sequence that completes them, so its last batch may be smaller.
        """
        before = self.done(at)
        sequences = self.batch
        if self.unit == TOKENS:
            sequences = min(sequences, -(-(self.total - before) // self.seq_length))
        after = before + (1 if self.unit == STEPS else sequences * self.seq_length)
        return Stride(
            sequences, sequences == self.batch, before, after, self.whole, is_last=after >= self.total
        )

    def total_steps(self, at: Position) -> int:
        """Return the total steps of the run, including those done, if the batch size does not change."""
        return at.step + max(0, -(-(self.total - self.done(at)) // self.whole))

    def describe(self) -> str:
        """Return the length as text for the log."""
        return f"{self.total:,} {self.unit}"

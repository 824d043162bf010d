"""How far a run goes, how much its next step takes, and what is due after it.

A run is promised optimizer steps (`trainer.max_steps`) or training tokens (`trainer.max_tokens`), and
everything on its way is counted in the unit of the promise: the schedule, evaluations, log lines and
checkpoints. So a run that is promised tokens has them, and its schedule, whatever batch sizes it was resumed
with; one that is promised steps makes them, and reads more tokens or fewer. What the configuration gives in
steps is steps of the batch it has now.
"""

from dataclasses import dataclass
from typing import Protocol

from tide_mega.config.schema import TideConfig

STEPS, TOKENS = "steps", "tokens"


class Position(Protocol):
    """Where a run stands, or stood: a `TrainingState`, for one."""

    @property
    def step(self) -> int:
        """Optimizer steps done."""

    @property
    def tokens(self) -> int:
        """Training tokens of these steps."""


def position_in(unit: str, at: Position) -> int:
    """Return where a run stands in a unit."""
    return at.step if unit == STEPS else at.tokens


@dataclass(frozen=True)
class Stride:
    """An optimizer step that is next."""

    sequences: int
    """What it takes of the data, over all ranks: a batch, or what is left of the promised tokens."""
    is_full: bool
    """Whether that is a batch."""
    before: int
    """Where the run stands, in its unit."""
    after: int
    """Where it will."""
    whole: int
    """What a whole batch is, in the unit."""
    is_last: bool

    def is_due(self, every: int, *, at_end: bool = True) -> bool:
        """Whether what comes every so many batches (0: never) is due after it, or at the end."""
        mark = every * self.whole
        return (at_end and self.is_last) or (every > 0 and self.before // mark < self.after // mark)


@dataclass(frozen=True)
class Course:
    """From where a run stands to the end it was promised."""

    unit: str
    """`STEPS` or `TOKENS`."""
    total: int
    """The promise."""
    batch: int
    """Sequences of an optimizer step over all ranks."""
    seq_length: int

    @classmethod
    def of(cls, config: TideConfig) -> "Course":
        """Take the promise of a valid configuration."""
        trainer, seq_length = config.trainer, config.data.seq_length
        if trainer.max_steps is not None:
            return cls(STEPS, trainer.max_steps, trainer.global_batch_size, seq_length)
        assert trainer.max_tokens is not None
        return cls(TOKENS, trainer.max_tokens, trainer.global_batch_size, seq_length)

    @property
    def key(self) -> str:
        """The key that gave the promise."""
        return f"trainer.max_{self.unit}"

    @property
    def whole(self) -> int:
        """What a whole batch is in the unit."""
        return 1 if self.unit == STEPS else self.batch * self.seq_length

    def done(self, at: Position) -> int:
        """Return where a run stands, in the unit."""
        return position_in(self.unit, at)

    def is_complete(self, at: Position) -> bool:
        """Whether the promise is kept."""
        return self.done(at) >= self.total

    def next(self, at: Position) -> Stride:
        """Return the next step of a run that is not complete.

        A run that is promised tokens ends with the sequence in which it has them: its last batch has no more.
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
        """Return the steps of the whole run, those done included, if its batch stays as it is."""
        return at.step + max(0, -(-(self.total - self.done(at)) // self.whole))

    def describe(self) -> str:
        """Say what is promised."""
        return f"{self.total:,} {self.unit}"

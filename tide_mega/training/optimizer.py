"""Parameter groups of the optimizer, and the learning-rate schedule: linear warm-up, then cosine decay or WSD.

WSD is warm-up, a stable phase, and a decay at the end. A schedule belongs to a run: it is made when the run
starts, kept in its checkpoints, and followed to the end. It counts tokens in a run of a fixed number of tokens,
else steps (`tide_mega.run.course`).
"""

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import nn

from tide_mega.config.schema import OptimConfig
from tide_mega.errors import refuse
from tide_mega.parallel.engine_settings import ParameterGroup
from tide_mega.run.course import STEPS, Course, Position, position_in

TABLES = "tables"

COSINE, WSD = "cosine", "wsd"


def parameter_groups(model: nn.Module, optim: OptimConfig) -> list[ParameterGroup]:
    """Split parameters into matrices (decayed), norm gains (never decayed) and memory tables (own settings)."""
    matrices, gains, tables = [], [], []
    for name, parameter in model.named_parameters():
        if name.endswith(("tables_WKD", "absent_tables")):
            tables.append(parameter)
        elif parameter.ndim == 1 or name.endswith("gains_KD"):
            gains.append(parameter)
        else:
            matrices.append(parameter)
    table_decay = optim.weight_decay if optim.table_weight_decay is None else optim.table_weight_decay
    return [
        ParameterGroup("matrices", matrices, optim.weight_decay),
        ParameterGroup("gains", gains, 0.0),
        ParameterGroup(TABLES, tables, table_decay, optim.table_lr_multiplier, every_microbatch=False),
    ]


@dataclass(frozen=True)
class Schedule:
    """The learning rate as a function of the position p in a run.

    With B = begin, W = begin + warmup, E = end and C = end - cooldown::

        p < W              first_lr + (lr - first_lr) * (p - B) / warmup
        cosine, W <= p < E  min_lr + (lr - min_lr) * (1 + cos(pi * (p - W) / (E - W))) / 2
        wsd, W <= p < C     lr
        wsd, C <= p < E     min_lr + (lr - min_lr) * (1 - sqrt((p - C) / cooldown))
        p >= E             min_lr; for wsd without a cooldown lr

    So the update at W uses the peak rate, and `min_lr` is reached at E. Cosine is the paper's schedule
    (appendix L). Warm-up, stable, decay is from Hu et al. 2024 (MiniCPM, arXiv 2404.06395); the 1 - sqrt decay,
    which ends at a lower loss than a linear one, from Haegele et al. 2024 (arXiv 2405.18392).
    """

    shape: str
    """`COSINE` or `WSD`."""
    unit: str
    """Unit of positions: `STEPS` or `TOKENS`."""
    begin: int
    """Where the schedule starts: 0, or the position at which a branch warms up again."""
    warmup: int
    first_lr: float
    lr: float
    min_lr: float
    end: int
    """0 if the rate stays constant after warm-up."""
    cooldown: int

    @classmethod
    def of(cls, optim: OptimConfig, course: Course) -> "Schedule":
        """Return the schedule of a run from its beginning.

        Raises:
            ConfigError: warm-up and cooldown do not fit into the run.
        """
        return cls._fitting(optim, course, 0, optim.warmup_steps, optim.init_lr)

    @classmethod
    def rewarmed(cls, optim: OptimConfig, course: Course, at: Position, rate: float) -> "Schedule":
        """Return a schedule that restarts at a position, rising from `rate` over `optim.rewarmup_steps`.

        Raises:
            ConfigError: warm-up and cooldown do not fit into the rest of the run.
        """
        return cls._fitting(optim, course, course.done(at), optim.rewarmup_steps, rate)

    @classmethod
    def _fitting(
        cls, optim: OptimConfig, course: Course, begin: int, warmup_steps: int, first_lr: float
    ) -> "Schedule":
        whole = course.whole
        end = course.total if optim.decay_steps is None else optim.decay_steps * whole
        schedule = cls(
            shape=optim.schedule,
            unit=course.unit,
            begin=begin,
            warmup=warmup_steps * whole,
            first_lr=first_lr,
            lr=optim.lr,
            min_lr=optim.min_lr,
            end=end,
            cooldown=optim.cooldown_steps * whole,
        )
        key = "optim.rewarmup_steps" if begin else "optim.warmup_steps"
        length = max(0, end - begin) // whole
        if begin + schedule.warmup >= end:
            what = "the branch's" if begin else "the run's"
            refuse(
                key,
                warmup_steps,
                f"is not below {what} {length} steps",
                f"use at most {length - 1}, or train longer",
            )
        if begin + schedule.warmup + schedule.cooldown > end:
            most = length - warmup_steps
            why = f"does not fit between {key}={warmup_steps} and the end, {length} steps on"
            refuse("optim.cooldown_steps", optim.cooldown_steps, why, f"use at most {most}, or train longer")
        return replace(schedule, end=0) if schedule.shape == WSD and not schedule.cooldown else schedule

    def rate(self, at: Position) -> float:
        """Return the learning rate of the next update of a run at a position.

        Raises:
            ValueError: the position is negative.
        """
        p = position_in(self.unit, at)
        if p < 0:
            raise ValueError(f"{self.unit} is {p}: updates are numbered from 0")
        warm = self.begin + self.warmup
        if p < warm:
            return self.first_lr + (self.lr - self.first_lr) * (p - self.begin) / self.warmup
        if self.shape == WSD:
            cool = self.end - self.cooldown
            if self.cooldown == 0 or p < cool:
                return self.lr
            part = 1.0 - math.sqrt(min(1.0, (p - cool) / self.cooldown))
        elif p >= self.end:
            return self.min_lr
        else:
            part = (1.0 + math.cos(math.pi * (p - warm) / (self.end - warm))) / 2.0
        return self.min_lr + (self.lr - self.min_lr) * part

    def describe(self) -> str:
        """Return a short description for the log."""
        unit = "" if self.unit == STEPS else " tokens"
        warm = self.begin + self.warmup
        parts = [f"{self.shape}, {self.lr:.2e} from {warm:,}{unit} on"]
        if self.shape == COSINE:
            parts = [f"{self.shape}, {self.lr:.2e} at {warm:,}{unit}", f"{self.min_lr:.2e} at {self.end:,}"]
        elif self.cooldown:
            parts += [f"falling from {self.end - self.cooldown:,}", f"{self.min_lr:.2e} at {self.end:,}"]
        return ", ".join(parts)

    def to_json(self) -> dict[str, Any]:
        """Return the form that checkpoints keep."""
        return asdict(self)

    @classmethod
    def from_json(cls, kept: dict[str, Any]) -> "Schedule":
        """Inverse of `to_json`."""
        return cls(**kept)

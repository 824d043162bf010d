"""The learning rate of each step: linear warm-up, then cosine decay, or stable and a decay at the end (WSD).

A schedule is part of a run: it is made when the run starts, kept in its checkpoints, and followed to the end. In a
run that is promised tokens it counts tokens, else steps (`tide_mega.training.course`).
"""

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from tide_mega.config.errors import refuse
from tide_mega.config.schema import OptimConfig
from tide_mega.training.course import STEPS, Course, Position, position_in

COSINE, WSD = "cosine", "wsd"


@dataclass(frozen=True)
class Schedule:
    """A learning rate over positions in a run.

    With B = begin, W = begin + warmup, E = end and C = end - cooldown::

        p < W              first_lr + (lr - first_lr) * (p - B) / warmup
        cosine, W <= p < E  min_lr + (lr - min_lr) * (1 + cos(pi * (p - W) / (E - W))) / 2
        wsd, W <= p < C     lr
        wsd, C <= p < E     min_lr + (lr - min_lr) * (1 - sqrt((p - C) / cooldown))
        p >= E             min_lr; for wsd without a cooldown lr

    So an update at W uses the peak, and `min_lr` is met at E. Cosine is the paper's (SPEC section 2). Warm-up,
    stable, decay is of Hu et al. 2024 (MiniCPM, arXiv 2404.06395); the decay by 1 - sqrt, which ends lower than
    a linear one, of Haegele et al. 2024 (arXiv 2405.18392).
    """

    shape: str
    """`COSINE` or `WSD`."""
    unit: str
    """What positions count: `STEPS` or `TOKENS`."""
    begin: int
    """Where it starts: 0, or where a branch warms up again."""
    warmup: int
    first_lr: float
    lr: float
    min_lr: float
    end: int
    """0 where the rate stays for ever."""
    cooldown: int

    @classmethod
    def of(cls, optim: OptimConfig, course: Course) -> "Schedule":
        """Make the schedule of a run from its beginning.

        Raises:
            ConfigError: its parts do not fit into the run.
        """
        return cls._fitting(optim, course, 0, optim.warmup_steps, optim.init_lr)

    @classmethod
    def rewarmed(cls, optim: OptimConfig, course: Course, at: Position, rate: float) -> "Schedule":
        """Make the schedule that begins anew at a position, rising from `rate` in `optim.rewarmup_steps`.

        Raises:
            ConfigError: its parts do not fit into what is left of the run.
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
        """Return the learning rate of the update that a run makes next, standing at a position.

        Raises:
            ValueError: if the position is negative.
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
        """Say it in a few words."""
        unit = "" if self.unit == STEPS else " tokens"
        warm = self.begin + self.warmup
        parts = [f"{self.shape}, {self.lr:.2e} from {warm:,}{unit} on"]
        if self.shape == COSINE:
            parts = [f"{self.shape}, {self.lr:.2e} at {warm:,}{unit}", f"{self.min_lr:.2e} at {self.end:,}"]
        elif self.cooldown:
            parts += [f"falling from {self.end - self.cooldown:,}", f"{self.min_lr:.2e} at {self.end:,}"]
        return ", ".join(parts)

    def to_json(self) -> dict[str, Any]:
        """Return it as checkpoints keep it."""
        return asdict(self)

    @classmethod
    def from_json(cls, kept: dict[str, Any]) -> "Schedule":
        """Read what `to_json` gave."""
        return cls(**kept)

"""The learning rate of each step: linear warm-up, then cosine decay, then constant."""

import math

from tide_mega.config.schema import OptimConfig


def learning_rate(step: int, optim: OptimConfig, total_steps: int) -> float:
    """Learning rate of the update with 0-based number `step` (SPEC section 2).

    With W = warmup_steps and D = decay_steps (total_steps where that is null)::

        step < W        init_lr + (lr - init_lr) * step / W
        W <= step < D   min_lr + (lr - min_lr) * (1 + cos(pi * (step - W) / (D - W))) / 2
        step >= D       min_lr

    So update 0 uses `init_lr`, update W the peak, and `min_lr` is met at D.

    Raises:
        ValueError: if `step` is negative.
    """
    if step < 0:
        raise ValueError(f"step is {step}: updates are numbered from 0")
    warmup = optim.warmup_steps
    decay = total_steps if optim.decay_steps is None else optim.decay_steps
    if step < warmup:
        return optim.init_lr + (optim.lr - optim.init_lr) * step / warmup
    if step >= decay:
        return optim.min_lr
    cosine = math.cos(math.pi * (step - warmup) / (decay - warmup))
    return optim.min_lr + (optim.lr - optim.min_lr) * (1.0 + cosine) / 2.0

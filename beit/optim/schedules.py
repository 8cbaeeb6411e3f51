"""Learning rates as closed forms of the step: nothing to store, nothing to resume wrongly."""

import math
from collections.abc import Callable

WARMUP_RATIO = 1e-6  # of the linear schedule's first step (BEiT's configs of ADE20K)


def warmup_cosine(
    step: int, *, total_steps: int, warmup_steps: int, lr: float, min_lr: float
) -> float:
    """Learning rate of a step: linear from 0 to `lr`, then half a cosine down towards `min_lr`.

    The arrays of the released code: step 0 has rate 0, the last warm-up step and the first after
    it have `lr`, and `min_lr` itself is only reached at `total_steps`, one past the end.
    """
    if step < warmup_steps:
        return lr * step / (warmup_steps - 1) if warmup_steps > 1 else 0.0
    cosine_steps = total_steps - warmup_steps
    progress = min(step - warmup_steps, cosine_steps) / max(cosine_steps, 1)
    return min_lr + 0.5 * (lr - min_lr) * (1 + math.cos(math.pi * progress))


def warmup_linear(
    step: int, *, total_steps: int, warmup_steps: int, lr: float, min_lr: float
) -> float:
    """Learning rate of a step: a line from `lr` at step 0 to `min_lr` at `total_steps`.

    mmsegmentation's "poly" policy of power 1, with its linear warm-up: during the first
    `warmup_steps` the line is multiplied by a factor that grows from 1e-6 to 1. Like mmseg's it is
    a factor on the line, which falls already, so that the peak lies a little below `lr`.
    """
    rate = min_lr + (lr - min_lr) * (1 - min(step, total_steps) / total_steps)
    if step < warmup_steps:
        rate *= 1 - (1 - step / warmup_steps) * (1 - WARMUP_RATIO)
    return rate


SCHEDULES: dict[str, Callable[..., float]] = {"cosine": warmup_cosine, "linear": warmup_linear}

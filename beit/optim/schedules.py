"""Learning rates as closed forms of the step: nothing to store, nothing to resume wrongly."""

import math


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

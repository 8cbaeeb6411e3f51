"""Batch and learning rate against those that belong together."""

import math
from dataclasses import dataclass

from beit.preflight.findings import Finding

_ROUNDING = 0.01  # a rate that somebody scaled by hand is a rounded one


@dataclass(frozen=True)
class Reference:
    """A learning rate and the global batch that it was found at."""

    batch: int
    lr: float
    source: str  # where they stand


def compare(*, batch: int, lr: float, reference: Reference) -> Finding:
    """A warning where one of the two was changed without the other, with the arithmetic.

    Neither rule is right everywhere: square-root scaling is what BEiT's authors advised for a
    smaller batch (half the rate at a quarter of 2,048, microsoft/unilm issue 383), linear scaling
    what VQ-KD does.
    """
    ratio = batch / reference.batch
    linear, root = reference.lr * ratio, reference.lr * math.sqrt(ratio)
    low, high = sorted((linear, root))
    own = f"{reference.source} has optim.lr={reference.lr:g} at batch.global_size={reference.batch}"
    here = f"this run optim.lr={lr:g} at batch.global_size={batch}"
    scaled = (
        f"square-root scaling gives {reference.lr:g} x sqrt({batch}/{reference.batch}) = "
        f"{root:.3g}, linear scaling {reference.lr:g} x {batch}/{reference.batch} = {linear:.3g}"
    )
    same_rate = math.isclose(lr, reference.lr, rel_tol=1e-9)
    if ratio == 1 and same_rate:
        return Finding("ok", "learning rate", f"{own}, and so has this run")
    if ratio == 1:
        text = f"{own}, {here}: the rate is {lr / reference.lr:.3g} times that of the same batch"
        return Finding("warn", "learning rate", text)
    if same_rate:
        text = f"{own}, {here}: the batch was changed and the rate was not; {scaled}"
        return Finding("warn", "learning rate", text)
    if low * (1 - _ROUNDING) <= lr <= high * (1 + _ROUNDING):
        return Finding("ok", "learning rate", f"{own}, {here}; {scaled}")
    text = f"{own}, {here}, which lies outside both rules: {scaled}"
    return Finding("warn", "learning rate", text)

"""A run that goes on with another number of processes, or another accumulation.

The sampler deals the same global batches out to whatever ranks there are, so nothing but
Lightning's counters stands in the way: they count micro-batches. Here they are rewritten to the
same optimizer step of the same epoch. Everything else that they count (epochs, optimizer steps,
schedule) is of global batches already.
"""

import copy
from typing import Any

from beit.errors import UserError

Counters = dict[str, Any]


def respread(
    checkpoint: dict[str, Any], *, world_size: int, accumulate: int, micro_batches: int
) -> dict[str, Any]:
    """The checkpoint, with its counters in the micro-batches of the run that goes on.

    The global batch is the same on both sides, which is for the caller to see to.

    Args:
        checkpoint: as `settle` left it, with what it was written under in `beit.progress`.
        world_size, accumulate: from now on.
        micro_batches: of a rank in an epoch, from now on, after `limit_train_batches`.

    Raises:
        UserError: the checkpoint is not at an optimizer boundary, or an epoch has another number of
            optimizer steps now.
    """
    before = checkpoint["beit"]["progress"]
    old, new = before["accumulate"], accumulate
    if (before["world_size"], old) == (world_size, new):
        return checkpoint
    loops = copy.deepcopy(checkpoint["loops"])
    counters = loops["fit_loop"]
    batches = counters["epoch_loop.batch_progress"]
    epochs = counters["epoch_progress"]["current"]["processed"]  # those that have ended
    steps_per_epoch = -(-micro_batches // new)
    _check_epochs(batches, epochs, old, steps_per_epoch, before)
    done = batches["current"]["ready"]
    if done % old and -(-done // old) != steps_per_epoch:
        raise UserError(
            f"this checkpoint stands at micro-batch {done} of an epoch, in the middle of an "
            f"optimizer step of {old}: it can only go on with {before['world_size']} devices and "
            f"{old} accumulated micro-batches"
        )
    moved = min(-(-done // old) * new, micro_batches)
    past = batches["total"]["ready"] - done
    for name, old_base, new_base in (("current", 0, 0), ("total", past, epochs * micro_batches)):
        for stage, count in batches[name].items():
            # what lags behind, the last one's completion, goes on lagging behind
            batches[name][stage] = new_base + moved - (old_base + done - count)
    return {**checkpoint, "loops": loops}


def _check_epochs(
    batches: Counters, epochs: int, accumulate: int, steps: int, before: Counters
) -> None:
    """An epoch's optimizer steps are counted in the epochs that have ended, if any."""
    if epochs == 0:
        return
    length = (batches["total"]["ready"] - batches["current"]["ready"]) / epochs
    if -(-length // accumulate) != steps:
        raise UserError(
            f"an epoch had {-(-length // accumulate):.0f} optimizer steps on "
            f"{before['world_size']} devices and would have {steps} now: limit_train_batches "
            "counts micro-batches, give it so that an epoch is the same"
        )

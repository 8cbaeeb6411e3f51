"""What one process does for all of a job, so that all of them know how it went."""

from collections.abc import Callable
from typing import TypeVar

import lightning as L

from beit.errors import UserError
from beit.job.exits import RunEnd

Outcome = TypeVar("Outcome")


def on_first_rank(trainer: L.Trainer, function: Callable[[], Outcome]) -> Outcome:
    """Call a function on rank 0; its result, or what it raised, is every rank's.

    Otherwise the others would wait for a rank that has gone. Raises what the function raises of
    UserError, RunEnd and OSError.
    """
    outcome: Outcome | None = None
    error: Exception | None = None
    if trainer.is_global_zero:
        try:
            outcome = function()
        except (UserError, RunEnd, OSError) as raised:
            error = raised
    if trainer.world_size > 1:
        told = None if error is None else error.with_traceback(None)
        outcome, error = trainer.strategy.broadcast((outcome, told))
    if error is not None:
        raise error
    return outcome  # type: ignore[return-value]


def check_same_step(trainer: L.Trainer, folder: object) -> None:
    """Raises UserError where the processes of a job go on from different steps."""
    first = trainer.strategy.broadcast(trainer.global_step)
    same = first == trainer.global_step
    if not trainer.strategy.reduce_boolean_decision(same, all=True):
        raise UserError(
            f"the processes of this job start at different steps ({trainer.global_step} here, "
            f"{first} on the first): {folder} must be one folder that all of them see"
        )

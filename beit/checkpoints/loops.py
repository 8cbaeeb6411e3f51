"""Where a run stands in its epoch, written into a checkpoint so that Lightning goes on from there.

Lightning 2.6 saves its counters as they are at the moment, and guesses from their differences
where that was. Saved after an epoch's last micro-batch, before its validation, a run goes on
without that validation and with an epoch counter that is one behind: the next checkpoint in the
middle of an epoch then counts as one between epochs. Saved at the end of a run of `max_steps`
within an epoch, the rest of that epoch is left out. So the counters are rewritten into one of three
forms, each of which Lightning's loops take for what it is:

- between epochs: the epoch counts as ended in every counter, no micro-batch of the next as begun;
- within an epoch: k micro-batches, of which the last counts as processed but not as completed
  (it is what Lightning itself saves in `on_train_batch_end`);
- before a validation that is due: k micro-batches, all completed, and a validation as begun, of
  which no batch counts as done. It is run as a whole after the resume.
"""

from typing import Any

import lightning as L

Counters = dict[str, Any]


def at_boundary(trainer: L.Trainer) -> bool:
    """Whether the micro-batch at hand ends an accumulation window: its gradients were applied.

    For use in `on_train_batch_end` and later; the last window of an epoch may be a short one.
    """
    return not trainer.fit_loop._should_accumulate()


def ends_epoch(trainer: L.Trainer) -> bool:
    """Whether the micro-batch at hand is its epoch's last."""
    progress = trainer.fit_loop.epoch_loop.batch_progress
    return progress.is_last_batch or progress.current.ready >= trainer.num_training_batches


def ends_plan(trainer: L.Trainer) -> bool:
    """Whether no step is left after the epoch that is being ended; for `on_train_epoch_end`."""
    # not `fit_loop.done`, which changes the counters
    epochs = trainer.fit_loop.epoch_progress.current.processed
    of_epochs = trainer.max_epochs not in (-1, None) and epochs >= trainer.max_epochs
    return of_epochs or (trainer.max_steps != -1 and trainer.global_step >= trainer.max_steps)


def ends_run(trainer: L.Trainer) -> bool:
    """The same, or the training is told to stop there."""
    return ends_plan(trainer) or trainer.should_stop


def settle(checkpoint: dict[str, Any], trainer: L.Trainer, *, validated: bool) -> None:
    """Rewrite the counters of a checkpoint of this moment, in place.

    Args:
        checkpoint: as Lightning dumped it, at an optimizer boundary.
        validated: the validation that was due after this micro-batch, if any, has ended.
    """
    counters = checkpoint["loops"]["fit_loop"]
    epochs, batches = counters["epoch_progress"], counters["epoch_loop.batch_progress"]
    done = batches["current"]["ready"]
    # incremented once the callbacks' `on_train_batch_end` and the validation are over
    stepped = counters["epoch_loop.state_dict"]
    ended = epochs["current"]["processed"] > epochs["current"]["completed"]  # on_train_epoch_end
    epoch = epochs["current"]["processed"] - (1 if ended else 0)
    if ended:
        stepped["_batches_that_stepped"] -= 1
    if not ended and not validated and validation_due(trainer):
        _set(epochs, started=epoch + 1, processed=epoch)
        _set(batches, started=done, processed=done, completed=done)
        _begin_validation(counters["epoch_loop.val_loop.batch_progress"])
    elif done < trainer.num_training_batches and not batches["is_last_batch"]:
        _set(epochs, started=epoch + 1, processed=epoch)
        _set(batches, started=done, processed=done, completed=done - 1)
    else:
        _set(epochs, started=epoch + 1, processed=epoch + 1)
        _set(batches, started=0, processed=0, completed=0)
        batches["is_last_batch"] = False
        stepped["_batches_that_stepped"] += 1
    checkpoint["epoch"] = epoch


def begin_epoch_afresh(trainer: L.Trainer) -> None:
    """After a resume between epochs: what follows is an epoch like any other, not a restart.

    For `on_train_start`. With `max_steps` Lightning takes every resume for one within an epoch,
    and leaves out the next.
    """
    loop: Any = trainer.fit_loop
    if loop.restarting and loop.epoch_loop.batch_progress.current.ready == 0:
        for part in (loop, loop.epoch_loop, loop.epoch_loop.val_loop):
            part._restarting = False
            part.reset_restart_stage()


def validation_due(trainer: L.Trainer) -> bool:
    """Whether a validation follows the micro-batch at hand, however the run is told to stop."""
    loop: Any = trainer.fit_loop.epoch_loop
    if not loop._should_check_val_epoch() or trainer._val_check_time_interval is not None:
        return False
    if trainer.val_check_batch == float("inf"):
        return bool(loop.batch_progress.is_last_batch)
    counted_over_epochs = trainer.check_val_every_n_epoch is None
    index = loop.total_batch_idx if counted_over_epochs else loop.batch_idx
    return (index + 1) % trainer.val_check_batch == 0


def _set(progress: Counters, *, started: int, processed: int, completed: int | None = None) -> None:
    """Set the current counts; the totals keep their distance from what was started."""
    completed = processed if completed is None else completed
    total, current = progress["total"], progress["current"]
    before = total["started"] - current["started"] + (current["started"] if started == 0 else 0)
    for counts, base in ((current, 0), (total, before)):
        counts["ready"] = counts["started"] = base + started
        counts["processed"], counts["completed"] = base + processed, base + completed


def _begin_validation(progress: Counters) -> None:
    for counts, ready in ((progress["current"], 0), (progress["total"], 1)):
        counts["ready"] = counts["started"] = ready
        counts["processed"] = counts["completed"] = 0
    progress["is_last_batch"] = False

"""What an epoch's metrics have gathered is not lost where the epoch is cut."""

from collections.abc import Iterator
from typing import Any

import lightning as L
from torch import Tensor
from torchmetrics import Metric

KEY = "epoch_metrics"  # of a checkpoint


class EpochMetrics(L.Callback):
    """Carries the training's metrics through a checkpoint, so that they are those of whole epochs.

    Those are the torchmetrics of the task, and what it logs with `on_epoch=True`; Lightning carries
    neither. What counts for all ranks is summed over them and goes on with the first; the number of
    ranks may change. Between epochs, and of a validation under way, which is repeated, nothing is
    taken over.
    """

    def __init__(self) -> None:
        self._pending: dict[str, dict[str, Any]] = {}  # what has not been logged again yet
        self._in_training: set[str] = set()  # metrics that were in use when a validation began

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        results = trainer.fit_loop.epoch_loop._results
        logged = {
            key: {
                "name": result.meta.forked_name(on_step=False),
                "metric": result.meta.metric_attribute,
                "state": _over_ranks(trainer, result) if result.is_tensor else {},
            }
            for key, result in results.items()
            if result.meta.on_epoch and not result.has_reset  # of this epoch
        }
        metrics = {}
        for name, metric in _metrics(pl_module):
            if not trainer.validating or name in self._in_training:
                with metric.sync_context():  # on all ranks, also where it was not updated
                    if metric.update_called:
                        metrics[name] = _copied(metric.metric_state)
        checkpoint[KEY] = {"logged": {**self._pending, **logged}, "metrics": metrics}

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        found = checkpoint.get(KEY)
        if found is None or progress["current"]["ready"] == 0:  # between epochs
            return
        self._pending = dict(found["logged"])
        for name, metric in _metrics(pl_module):
            if name in found["metrics"]:
                _go_on(metric, found["metrics"][name], first=trainer.is_global_zero)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._in_training = {name for name, metric in _metrics(pl_module) if metric.update_called}

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Lightning makes a place for a metric when it is logged first."""
        results = trainer.fit_loop.epoch_loop._results if self._pending else {}
        for key in self._pending.keys() & results.keys():
            before = self._pending.pop(key)
            if trainer.is_global_zero:
                _add(results[key], before["state"])

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """What was not logged again, for the epoch was cut at its end, before the validation."""
        for logged in self._pending.values():
            if logged["metric"]:
                metric: Any = pl_module.get_submodule(logged["metric"])
                value = metric.compute()
                metric.reset()
            else:
                value = logged["state"]["value"] / logged["state"].get("cumulated_batch_size", 1)
            pl_module.log(logged["name"], value)
        self._pending = {}


def _metrics(task: L.LightningModule) -> Iterator[tuple[str, Metric]]:
    return ((name, part) for name, part in task.named_modules() if isinstance(part, Metric))


def _over_ranks(trainer: L.Trainer, result: Any) -> dict[str, Tensor]:
    """What was gathered under a name: by all ranks, or where it is not synchronised by this one."""
    state = _copied(result.metric_state)
    if not result.meta.sync.should:
        return state
    operation = _operation(result)
    return {
        name: trainer.strategy.reduce(value, reduce_op=operation) for name, value in state.items()
    }


def _operation(result: Any) -> str:
    return result.meta.reduce_fx.__name__ if _is_extreme(result) else "sum"


def _is_extreme(result: Any) -> bool:
    return result.meta.is_max_reduction or result.meta.is_min_reduction


def _add(result: Any, before: dict[str, Tensor]) -> None:
    for name, value in before.items():
        now = getattr(result, name)
        value = value.to(now.device)
        both = result.meta.reduce_fx(now, value) if _is_extreme(result) else value + now
        setattr(result, name, both)


def _go_on(metric: Metric, state: dict[str, Any], *, first: bool) -> None:
    """Take up a state of all ranks, on the first one."""
    metric.reset()
    metric._update_count = 1  # else torchmetrics takes it for empty
    for name, value in state.items() if first else ():
        values = [part.to(metric.device) for part in (value if type(value) is list else [value])]
        # what was a list on each rank is one tensor for all of them
        setattr(metric, name, values if type(getattr(metric, name)) is list else values[0])


def _copied(state: dict[str, Any]) -> dict[str, Any]:
    return {
        name: [part.clone() for part in value] if type(value) is list else value.clone()
        for name, value in state.items()
    }

"""What of Lightning's own handling of signals stands in the way of ours, and is put aside."""

from typing import Any

import lightning as L


class NoSignals:
    """In place of Lightning's signal connector, which would install handlers of its own.

    Its SIGTERM handler broadcasts inside the handler, where it waits for ever if the other ranks
    are in another collective; it ends with exit code 0; and under SLURM it saves and requeues
    from the handler. Lightning asks `received_sigterm` after each batch that was logged and
    validated, and after each epoch: there a stop that was agreed on is raised.
    """

    def __init__(self, ask: Any) -> None:
        self._ask = ask

    @property
    def received_sigterm(self) -> bool:
        self._ask()
        return False

    def register_signal_handlers(self) -> None:
        """Nothing."""

    def teardown(self) -> None:
        """Nothing."""


def take_over(trainer: L.Trainer, ask: Any) -> None:
    """Signals of this trainer's runs are ours; `ask` is called at the end of batches and epochs."""
    inner: Any = trainer
    inner._signal_connector = NoSignals(ask)
    # a broadcast before every micro-batch, to tell of a SIGTERM of rank 0
    inner.fit_loop.epoch_loop._broadcast_sigterm_tensor = _nothing


def _nothing() -> None:
    pass

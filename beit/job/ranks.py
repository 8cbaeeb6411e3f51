"""The watch over the ranks of a job: one that is lost ends all, and the first cause is told.

Every rank has a thread of its own that speaks with rank 0 over a connection of its own, so that a
main thread which hangs in a collective does not stop it. See `judge` for what counts as lost and
`ending` for how the processes go. A run of one process has no thread and opens no socket.

Lightning's launcher passes the address on to the ranks that it starts; they are watched before they
meet. Ranks started by others (torchrun, slurm) learn it when the process group is up; what happens
to them before is for whoever started them to see.
"""

import os
import signal
import subprocess
import sys
import threading
from types import TracebackType
from typing import Any

import lightning as L
from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver

from beit.errors import UserError
from beit.job import causes, exits
from beit.job.hub import Hub
from beit.job.member import Member
from beit.job.processes import (
    PARENT,
    end_with_parent,
    end_with_parent_if_told,
    name_to_children,
)
from beit.job.settings import JobSettings

# `port:token` of rank 0, for the ranks that Lightning's launcher starts on the same machine
_ADDRESS = "BEIT_RANK_WATCH"
# variables of a process that torchrun, slurm or Lightning's launcher has started
_STARTED_BY_OTHERS = {"LOCAL_RANK", "SLURM_PROCID"}


class RankWatch(L.Callback):
    """Guards a fit: a context around it, and the first of the trainer's callbacks.

    In a job of several processes what is raised inside the context does not leave it, once the
    ranks know of each other: the process ends there, with the job's exit code.

    Args:
        first: whether this is the job's first process.
        num_nodes: machines of the job.
    """

    def __init__(
        self, settings: JobSettings, *, world_size: int, first: bool, num_nodes: int = 1
    ) -> None:
        self._settings = settings
        self._world_size = world_size
        self._num_nodes = num_nodes
        self._first = first
        self._hub: Hub | None = None
        self._member: Member | None = None
        self._launched = False
        self._warm = {"train": False, "val": False}
        self._started: list[subprocess.Popen[Any]] = []

    def __enter__(self) -> "RankWatch":
        if self._world_size > 1:
            _end_with_starter()
            self._member = self._begin()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._member is None:
            return
        _forget_environment()
        code = causes.code_of(error) if error is not None else exits.Exit.DONE
        ends_well = code == exits.Exit.DONE or exits.is_stop(code)
        # what is raised at once may be faster than the news of the others
        if ends_well or not self._member.meets_others() or self._member.is_alone:
            self._member.leave(code)
            if self._hub is not None:
                self._hub.close()
            if error is not None:
                for child in self._children():
                    child.kill()
            return
        assert error is not None
        self._report(error)
        self._member.unwound.set()
        self._member.join()  # it ends the process

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """The process group is up: tell the address to the ranks that others started."""
        if self._member is None:
            return
        _forget_environment()
        hub = self._hub
        own = (self._host(), hub.port, hub.token) if hub is not None else None
        address: Any = trainer.strategy.broadcast(own)
        if self._member.rank < 0:
            host, port, token = address
            self._member.tell(host, port, token, trainer.global_rank)
        if self._member.meets_others() and self._launched:
            end_with_parent(0)  # the watch sees it, and can say why

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Before anything that waits for other ranks: say what happened."""
        if self._member is not None and not exits.is_stop(causes.code_of(exception)):
            self._report(exception)

    def on_train_batch_start(self, *_: Any) -> None:
        self._tick(in_step=self._warm["train"])

    def on_before_backward(self, *_: Any) -> None:
        self._tick(in_step=self._warm["train"])

    def on_after_backward(self, *_: Any) -> None:
        self._tick(in_step=self._warm["train"])

    def on_before_optimizer_step(self, *_: Any) -> None:
        self._tick(in_step=self._warm["train"])

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self._warm["train"] = True
        self._tick(in_step=False)
        if self._member is not None:
            self._member.place.step = trainer.global_step
            self._member.place.epoch = trainer.current_epoch

    def on_validation_batch_start(self, *_: Any) -> None:
        self._tick(in_step=self._warm["val"])

    def on_validation_batch_end(self, *_: Any) -> None:
        self._warm["val"] = True
        self._tick(in_step=False)

    def _begin(self) -> Member:
        """This rank's thread, and the hub on rank 0; who was launched has the address already."""
        times = {
            "limit": self._settings.rank_timeout_seconds,
            "heartbeat": self._settings.heartbeat_seconds,
        }
        address = os.environ.pop(_ADDRESS, "")
        self._launched = bool(address)
        if self._first:
            self._hub = Hub(**times, everywhere=self._num_nodes > 1)
            self._hub.start()
            address = os.environ[_ADDRESS] = f"{self._hub.port}:{self._hub.token}"
        node = int(os.environ.get("NODE_RANK", os.environ.get("GROUP_RANK", 0)))
        first_here = node * (self._world_size // self._num_nodes)
        member = Member(**times, hub=self._hub, first_here=first_here)
        member.children = self._children
        if address:
            port, _, token = address.partition(":")
            rank = 0 if self._first else int(os.environ["LOCAL_RANK"])
            member.tell("127.0.0.1", int(port), token, rank)
        member.start()
        return member

    def _tick(self, *, in_step: bool) -> None:
        if self._member is not None:
            self._member.place.in_step = in_step
            self._member.place.ticks += 1

    def _report(self, error: BaseException) -> None:
        assert self._member is not None
        place = self._member.place
        self._member.report(
            causes.of_exception(
                error,
                rank=self._member.rank,
                pid=os.getpid(),
                step=place.step,
                epoch=place.epoch,
            )
        )

    def _host(self) -> str:
        return os.environ["MASTER_ADDR"] if self._num_nodes > 1 else "127.0.0.1"

    def _children(self) -> list[subprocess.Popen[Any]]:
        """The ranks that Lightning's launcher started. Its own watch over them, which kills rank 0
        with the others before anything can be said, ends here."""
        for thread in threading.enumerate():
            if isinstance(thread, _ChildProcessObserver) and thread._child_processes:
                self._started, thread._child_processes = thread._child_processes, []
        return self._started


def _end_with_starter() -> None:
    """Who started this process takes it along; and it those that it will start."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent(signal.SIGTERM)  # the agent's death is a stop
    end_with_parent_if_told()
    if not _STARTED_BY_OTHERS & set(os.environ):
        _refuse_without_file()
        name_to_children(signal.SIGKILL)


def _forget_environment() -> None:
    """What was meant for the launched ranks is for no later child."""
    for name in (_ADDRESS, PARENT):
        os.environ.pop(name, None)


def _refuse_without_file() -> None:
    """Lightning starts the other ranks by running this program again."""
    main = sys.modules["__main__"]
    if not hasattr(main, "__file__") and getattr(main, "__spec__", None) is None:
        raise UserError(
            "several devices are a process each, and `python -c` or a notebook cannot be started "
            "again for them: put the program into a file, or use `beit train` or torchrun"
        )

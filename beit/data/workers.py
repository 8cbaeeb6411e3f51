"""The processes that read: a loader that says which of them was lost, and over which image."""

import functools
import logging
import multiprocessing
import signal
import threading
import time
import traceback
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from ctypes import c_int64
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, get_worker_info

from beit.console import quiet_pillow
from beit.data import opening
from beit.errors import UserError
from beit.job.exits import Exit, RunEnd

log = logging.getLogger(__name__)

_IDLE = -1
_LOOK_EVERY = 2.0  # seconds of waiting for a batch, after which the workers are looked after
# what a signal that a worker did not ask for mostly means
_LIKELY = {
    signal.SIGKILL: "most likely the memory ran out: fewer loader.num_workers, a smaller "
    "loader.prefetch_factor, or more memory",
    signal.SIGBUS: "most likely the shared memory (/dev/shm) is full: fewer loader.num_workers or "
    "a smaller loader.prefetch_factor",
    signal.SIGTERM: "somebody ended it",
}
_CRASHED = "most likely a fault in the decoder: remove that image"


class WorkerLost(RunEnd):
    """A process that reads images is gone, or silent for too long."""

    code = Exit.LOST


class SampleError(RuntimeError):
    """A fault of the program while it made a sample: which one, and the traceback."""


class Failure:
    """What went wrong in a worker, in place of a batch.

    Torch makes another text of an exception, and sometimes another type, on its way out of a
    worker; an object of ours comes out as it went in.
    """

    def __init__(self, error: UserError | SampleError) -> None:
        self.error = error


class Told(NamedTuple):
    """A batch with stand-ins, and why each of the unreadable images could not be read."""

    batch: Any
    reasons: dict[int, str]


def fault(error: Exception, what: str) -> SampleError:
    """The error of a sample; out of a worker the traceback goes along as text."""
    first = f"{what}: {type(error).__name__}: {error}"
    if get_worker_info() is None:
        return SampleError(first)
    return SampleError(f"{first}\n\nIn the worker:\n{''.join(traceback.format_exception(error))}")


class WatchedLoader(DataLoader):
    """A DataLoader of our own data sets, whose errors name the worker and the image.

    Each worker writes the index of the image that it is reading to a board in shared memory. So a
    worker that was killed, crashed or hangs is told with that image.

    Raises, from its iterators:
        WorkerLost: a worker is gone, or no batch came within `limit` seconds (0: never mind).
        UserError, SampleError: as they were raised in a worker.
    """

    def __init__(
        self, dataset: Any, *, num_workers: int, collate_fn: Any, limit: float, **options: Any
    ) -> None:
        board = multiprocessing.RawArray(c_int64, [_IDLE] * max(num_workers, 1))
        if num_workers > 0:
            options["worker_init_fn"] = functools.partial(_begin, board, opening.MAX_PIXELS)
            # torch hears of a worker's end by a signal, whose handler Lightning takes away at the
            # end of a fit: in the next one of this process it would notice nothing
            options["timeout"] = min(_LOOK_EVERY, limit or _LOOK_EVERY)
        super().__init__(
            dataset, num_workers=num_workers, collate_fn=Deliver(collate_fn), **options
        )
        self.board, self.limit = board, limit
        self._given_up = False
        self._lost: WorkerLost | None = None
        self._latest: weakref.ref[Any] | None = None  # of torch's iterators
        self.reasons: dict[int, str] = {}  # of the unreadable images so far

    def __iter__(self) -> Any:
        # at once, not at the first next(): then the sampler's epoch is read
        batches = super().__iter__()
        self._latest = weakref.ref(batches)
        return _Watched(self, batches)

    def lost(self) -> WorkerLost | None:
        """What is known of workers that have ended by themselves, None if all live."""
        if self._given_up:
            return self._lost
        for number, worker in enumerate(self.workers()):
            if worker.exitcode not in (None, 0):
                return WorkerLost(
                    f"data worker {number} (pid {worker.pid}) "
                    f"{_ended(worker.exitcode)}{self._at(number)}; {_cause(worker.exitcode)}"
                )
        return None

    def give_up(self, lost: WorkerLost | None) -> None:
        """End all workers: torch would give each of them five seconds to end by itself."""
        self._given_up, self._lost = True, lost
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch would raise once more for each
            for worker in self.workers():
                worker.kill()

    def workers(self) -> Sequence[Any]:
        """Processes of the latest iterator, by number."""
        return getattr(self._latest() if self._latest else None, "_workers", ())

    def silent(self) -> WorkerLost:
        """No batch came in time: what the workers are at."""
        places = [f"worker {n}{self._at(n)}" for n, at in enumerate(self.board) if at != _IDLE]
        at = ", ".join(places) or "none of them is reading an image"
        return WorkerLost(
            f"no batch came from the data workers for {self.limit:g} s "
            f"(loader.timeout_seconds): {at}; is the file system slow or gone?"
        )

    def _at(self, number: int) -> str:
        index = self.board[number]
        if index == _IDLE:
            return ""
        source: Any = self.dataset
        return f" while reading {source.source.name(index)} (index {index})"


class _Watched:
    """An iterator of a WatchedLoader."""

    def __init__(self, loader: WatchedLoader, batches: Iterator[Any]) -> None:
        self._loader = loader
        self._batches = batches

    def __iter__(self) -> "_Watched":
        return self

    def __len__(self) -> int:
        return len(self._loader)

    def __next__(self) -> Any:
        batch = self._fetch()
        if isinstance(batch, Failure):
            self._loader.give_up(None)
            raise batch.error
        if isinstance(batch, Told):
            self._loader.reasons.update(batch.reasons)
            return batch.batch
        return batch

    def _fetch(self) -> Any:
        waited = 0.0  # counted in looks: while the whole job was stopped, no time passes
        while True:
            try:
                return next(self._batches)
            except (RuntimeError, OSError, EOFError) as error:
                looked = "timed out after" in str(error)
                # a worker that crashes breaks its pipes first: "Connection reset by peer"
                if lost := self._lost_within(seconds=0.0 if looked else 1.0):
                    self._loader.give_up(lost)
                    raise lost from error
                if not looked:
                    raise
                waited += self._loader.timeout
                if 0 < self._loader.limit <= waited:
                    silent = self._loader.silent()
                    self._loader.give_up(silent)
                    raise silent from error

    def _lost_within(self, seconds: float) -> WorkerLost | None:
        until = time.monotonic() + seconds
        while not (lost := self._loader.lost()) and time.monotonic() < until:
            time.sleep(0.02)
        return lost


class Deliver:
    """Collates samples, and passes on what else there is to tell."""

    def __init__(self, collate: Any) -> None:
        self.collate = collate

    def __call__(self, samples: Sequence[Any]) -> Any:
        if isinstance(samples[0], Failure):
            return samples[0]
        batch = self.collate(samples)
        reasons = {sample.failed: sample.reason for sample in samples if sample.failed >= 0}
        return Told(batch, reasons) if reasons else batch


@contextmanager
def losses_named(loaders: Any) -> Iterator[None]:
    """Replaces an error that follows from a lost worker by one that says so.

    Torch notices the end of a worker by a signal, and then raises wherever the program happens to
    be. `loaders` is asked for `lost`, which it must have noted before its loaders were shut down.
    """
    try:
        yield
    except (RuntimeError, OSError, EOFError) as error:
        lost = getattr(loaders, "lost", None)
        if isinstance(error, WorkerLost) or lost is None:
            raise
        raise lost from error


def _begin(board: Any, max_pixels: int, number: int) -> None:
    """The start of a worker."""
    torch.set_num_threads(1)  # the workers share the cores with the training step
    opening.limit_pixels(max_pixels)  # a spawned one knows nothing of the process that began it
    quiet_pillow()  # what is wrong with an image is told in the log, once
    info = get_worker_info()
    assert info is not None
    data: Any = info.dataset
    data.reading = functools.partial(board.__setitem__, number)


def _ended(exitcode: int) -> str:
    if exitcode > 0:
        return f"ended with exit code {exitcode}"
    return f"was killed by {signal.Signals(-exitcode).name}"


def _cause(exitcode: int) -> str:
    if exitcode > 0:
        return "something in it called exit"
    return _LIKELY.get(signal.Signals(-exitcode), _CRASHED)

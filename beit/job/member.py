"""A rank's own thread: it says that the rank lives, and ends the process when the job is lost."""

import contextlib
import logging
import re
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from beit.job.causes import Cause
from beit.job.ending import end
from beit.job.exits import Exit
from beit.job.hub import Hub
from beit.job.messages import Channel, wait
from beit.job.processes import Process, ended

log = logging.getLogger(__name__)

# seconds that a rank which raised has for closing its files and loggers
UNWIND = 5.0
_CONNECT = 10.0
# the backward pass of DDP waits for the other ranks too
_COLLECTIVE = re.compile(r"torch.(distributed|autograd).")


@dataclass
class Place:
    """Where the main thread of a rank is; written by it, read by the rank's own thread."""

    ticks: int = 0
    in_step: bool = False
    step: int = -1
    epoch: int = 0


class Member(threading.Thread):
    """Sends a heartbeat, reports what the main thread raises, and goes when it is told to.

    Args:
        limit: seconds that rank 0 may be silent.
        heartbeat: seconds between two heartbeats.
        hub: on rank 0, its hub.
        first_here: the first rank of this machine, as far as Lightning's launcher numbers them: the
            one whose children the others are.
    """

    def __init__(
        self, *, limit: float, heartbeat: float, hub: Hub | None, first_here: int = 0
    ) -> None:
        super().__init__(name="beit-member", daemon=True)
        self.place = Place()
        self.rank = -1
        self.connected = threading.Event()  # and the others are known
        self.decided = threading.Event()  # the first cause is known
        self.unwound = threading.Event()  # the main thread has closed what it could
        self.children: Callable[[], list[subprocess.Popen[Any]]] = list
        self._limit, self._heartbeat, self._hub = limit, heartbeat, hub
        self._first_here = first_here
        self._main = threading.current_thread()
        self._address: tuple[str, int, str] | None = None
        self._channel: Channel | None = None
        self._say: deque[tuple[str, dict[str, Any]]] = deque()
        self._wake = socket.socketpair()
        self._wake[1].setblocking(False)
        self._reported = False
        self._leaving = False
        self._cause: Cause | None = None
        self._roster: dict[int, tuple[str, Process]] = {}
        self._seen: set[int] = set()  # children whose end is known
        self._changed = self._heard = time.monotonic()
        self._ticks = 0
        self._beaten = 0.0

    @property
    def is_alone(self) -> bool:
        """Whether no other rank has been heard of."""
        return not set(self._roster) - {self.rank}

    def meets_others(self) -> bool:
        """Whether the other ranks are known; waits for that where it has been told of them."""
        return self._address is not None and self.connected.wait(_CONNECT)

    def tell(self, host: str, port: int, token: str, rank: int) -> None:
        """Where rank 0 listens, and which rank this is."""
        self.rank = rank
        self._address = host, port, token
        self._poke()

    def report(self, cause: Cause) -> None:
        """The main thread raised: say so at once, and wait until the first cause is known."""
        if not self._reported and not self.is_alone:
            self._reported = True
            self._say.append(("raised", {"cause": cause.as_dict()}))
            self._poke()
            self.decided.wait(self._limit)

    def leave(self, code: int) -> None:
        """The main thread is done; returns when that was said. Rank 0 goes last."""
        self._say.append(("left", {"code": code}))
        self._poke()
        if self._hub is not None:
            self._wait_for_others()
            if self.decided.is_set():
                self.join()  # it ends the process
        self._leaving = True
        self._poke()
        self.join(2 * self._heartbeat + 1.0)

    def run(self) -> None:
        """Until `leave`, or the end of the process."""
        while not self._leaving or (self._say and self._channel):
            self._connect_if_told()
            before = time.monotonic()
            ends = [self._wake[0], *([self._channel] if self._channel else [])]
            ready = wait(ends, self._until_beat())
            if self._wake[0] in ready:
                self._wake[0].recv(4096)
            now = time.monotonic()
            if now - before > 3 * self._heartbeat:
                self._heard += now - before  # this process was stopped: nobody's silence
            self._watch_children()
            if self._channel is not None:
                self._listen(self._channel, now)
                self._speak(self._channel, now)
            if self._cause is not None:
                self._end(self._cause)
        if self._channel is not None:
            self._channel.close()

    def _poke(self) -> None:
        with contextlib.suppress(OSError):
            self._wake[1].send(b".")

    def _until_beat(self) -> float:
        """Seconds to sleep; who has started children looks after them more often."""
        rest = self._heartbeat
        if self._channel is not None:
            rest += self._beaten - time.monotonic()
        return min(rest, 0.2) if self.children() else rest

    def _connect_if_told(self) -> None:
        if self._address is None or self._channel is not None:
            return
        host, port, token = self._address
        try:
            self._channel = Channel(socket.create_connection((host, port), timeout=_CONNECT))
        except OSError as error:
            self._address = None
            if host == "127.0.0.1":
                self._conclude(0, f"cannot be reached ({error.strerror or error})")
            else:
                log.warning(
                    "rank %d cannot reach rank 0 at %s:%d (%s): it will be missed only by the "
                    "timeout of the process group",
                    *(self.rank, host, port, error),
                )
            return
        self._heard = time.monotonic()
        process, name = Process.this(), socket.gethostname()
        self._channel.send("hello", token=token, rank=self.rank, process=vars(process), host=name)

    def _listen(self, channel: Channel, now: float) -> None:
        for message in channel.receive():
            self._heard = now
            if message["kind"] == "roster":
                for rank, (host, process) in message["members"].items():
                    self._roster[int(rank)] = host, Process(**process)
                self.connected.set()
            elif message["kind"] == "cause":
                self._cause = self._cause or Cause(**message["cause"])
            elif message["kind"] == "closing":
                self._leaving = True  # rank 0 is done: nobody is left to report to
        if self._leaving or self._cause is not None:
            return
        if channel.ended:
            self._conclude(0, "is gone without a word (killed, or the connection was cut)")
        elif now - self._heard > self._limit:
            self._conclude(0, f"silent for {now - self._heard:.0f} s")

    def _speak(self, channel: Channel, now: float) -> None:
        while self._say:
            kind, content = self._say.popleft()
            channel.send(kind, **content)
        if now - self._beaten < self._heartbeat:
            return
        self._beaten, place = now, self.place
        if place.ticks != self._ticks:
            self._ticks, self._changed = place.ticks, now
        stuck = now - self._changed > self._limit / 2
        channel.send("beat", **vars(place), **(self._stack() if stuck else {"where": ""}))

    def _stack(self) -> dict[str, Any]:
        """Where the main thread stands, and whether it waits for other ranks there."""
        frame = sys._current_frames().get(self._main.ident or 0)
        calls = traceback.extract_stack(frame)[-6:] if frame else []
        waits = any(_COLLECTIVE.search(call.filename) for call in calls[-3:])
        return {"where": "".join(traceback.format_list(calls)), "waits": waits}

    def _watch_children(self) -> None:
        for rank, child in enumerate(self.children(), start=self._first_here + 1):
            returncode = child.poll()
            if returncode is None or rank in self._seen:
                continue
            self._seen.add(rank)
            if self._channel is not None:
                self._say.append(("child", {"rank": rank, "returncode": returncode}))
            elif returncode:
                self._conclude(rank, ended(returncode))

    def _conclude(self, rank: int, what: str) -> None:
        """A cause that this rank finds by itself, for rank 0 does not answer."""
        host, process = self._roster.get(rank, ("", None))
        if process is not None and process.is_here:
            if process.is_gone:
                what = "its process is gone without a word (killed?)"
            elif process.state in ("T", "t"):
                what = f"stopped, {what}"
        self._cause = self._cause or Cause(
            rank,
            Exit.LOST,
            what,
            step=self.place.step,
            epoch=self.place.epoch,
            host=host,
            pid=process.pid if process else 0,
        )

    def _wait_for_others(self) -> None:
        assert self._hub is not None
        patience = time.monotonic() + self._limit
        while self._hub.others() and not self.decided.is_set():
            if time.monotonic() > patience:
                self._say.append(("overdue", {}))
                self._poke()
                patience += self._limit
            time.sleep(0.01)

    def _end(self, cause: Cause) -> None:
        """End this process, when what it had to close is closed."""
        self.decided.set()
        if self._reported:
            self.unwound.wait(UNWIND)
        peers = {rank: process for rank, (_, process) in self._roster.items() if rank != self.rank}
        lost = cause.rank if cause.code == Exit.LOST else 0
        hub = self._hub
        end(
            cause,
            rank=self.rank,
            peers=peers,
            children=self.children(),
            elsewhere=lambda: hub.others(lost) if hub is not None else 0,
            patience=UNWIND + 3.0,
        )

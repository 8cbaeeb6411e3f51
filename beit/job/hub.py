"""Where the ranks of a job report: a thread of rank 0 with a port of its own."""

import contextlib
import hmac
import secrets
import socket
import threading
import time
from typing import Any

from beit.job.causes import Cause
from beit.job.judge import Judge
from beit.job.messages import Channel, wait
from beit.job.processes import Process

# seconds: what many ranks say is taken together, for each round costs the main thread of rank 0
_ROUND = 0.1


class Hub(threading.Thread):
    """Listens to all ranks, and tells them the first cause once there is one.

    Args:
        limit: seconds that a rank may be silent.
        heartbeat: seconds between two heartbeats of a rank.
        everywhere: listen on all networks of the machine, for ranks on others.
    """

    def __init__(self, *, limit: float, heartbeat: float, everywhere: bool) -> None:
        super().__init__(name="beit-hub", daemon=True)
        self.token = secrets.token_hex(16)
        self.cause: Cause | None = None
        self._heartbeat = heartbeat
        self._judge = Judge(limit=limit, heartbeat=heartbeat)
        self._listener = _listen_on_all() if everywhere else socket.create_server(("127.0.0.1", 0))
        self._listener.setblocking(False)
        self._channels: dict[Channel, int | None] = {}  # the rank, once it has registered
        self._closing = threading.Event()

    @property
    def port(self) -> int:
        """Where the ranks reach it."""
        return self._listener.getsockname()[1]

    def others(self, lost: int = 0) -> int:
        """Ranks that are still connected, without rank 0 and the one that is lost."""
        return sum(1 for rank in list(self._channels.values()) if rank and rank != lost)

    def close(self) -> None:
        """Let the ranks go: what they do from now on is theirs."""
        self._closing.set()
        self.join(self._heartbeat + 2.0)

    def run(self) -> None:
        """Until `close`."""
        last = time.monotonic()
        while not self._closing.is_set():
            for ready in wait([self._listener, *self._channels], min(self._heartbeat, 0.25)):
                if ready is self._listener:
                    self._accept()
                else:
                    self._listen(ready)
            now = time.monotonic()
            if now - last > 3 * self._heartbeat:
                self._judge.paused(now - last)
            last = now
            self._pronounce(now)
            self._closing.wait(_ROUND)
        for channel in list(self._channels):
            channel.send("closing")
            channel.close()
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # there are no more, or no more files can be opened
            while True:
                self._channels[Channel(self._listener.accept()[0])] = None

    def _listen(self, channel: Channel) -> None:
        for message in channel.receive():
            rank = self._channels[channel]
            if rank is None:
                self._register(channel, message)
            else:
                self._take(channel, rank, message)
        if channel.ended:
            rank = self._channels.pop(channel)
            channel.close()
            if rank is not None:
                self._judge.lost(rank, time.monotonic())

    def _register(self, channel: Channel, message: dict[str, Any]) -> None:
        token = str(message.get("token")).encode(errors="replace")
        if not hmac.compare_digest(token, self.token.encode()):
            channel.ended = True
            return
        rank, process = int(message["rank"]), Process(**message["process"])
        self._channels[channel] = rank
        self._judge.registered(rank, process, message["host"], time.monotonic())
        self._introduce(channel, rank)
        if self.cause is not None:
            self._tell([channel])

    def _introduce(self, newcomer: Channel, rank: int) -> None:
        """Rank 0 is told of all, the others of rank 0 and of those on their machine."""
        members = self._judge.members
        machine = members[rank].process.machine
        entries = {}
        for channel, other in self._channels.items():
            if other is None or not (
                0 in (rank, other) or members[other].process.machine == machine
            ):
                continue
            entries[other] = members[other].introduction
            if channel is not newcomer:
                channel.send("roster", members={rank: members[rank].introduction})
        newcomer.send("roster", members=entries)

    def _take(self, channel: Channel, rank: int, message: dict[str, Any]) -> None:
        now, kind = time.monotonic(), message.pop("kind")
        if kind == "beat":
            self._judge.beat(rank, now, **message)
            channel.send("heard")
        elif kind == "raised":
            self._judge.raised(Cause(**message["cause"]), now)
        elif kind == "left":
            self._judge.left(rank, message["code"])
        elif kind == "child":
            self._judge.ended(message["rank"], message["returncode"], now)
        elif kind == "overdue":
            self._judge.overdue(now)

    def _pronounce(self, now: float) -> None:
        """Tell the verdict once it is there."""
        if self.cause is None:
            self.cause = self._judge.verdict(now)
            if self.cause is not None:
                self._tell(list(self._channels))

    def _tell(self, channels: list[Channel]) -> None:
        assert self.cause is not None
        for channel in channels:
            channel.send("cause", cause=self.cause.as_dict())


def _listen_on_all() -> socket.socket:
    """On a port of all networks of this machine; all ranks may come at once."""
    if socket.has_dualstack_ipv6():
        options: dict[str, Any] = {"family": socket.AF_INET6, "dualstack_ipv6": True}
        return socket.create_server(("", 0), backlog=1024, **options)
    return socket.create_server(("", 0), backlog=1024)

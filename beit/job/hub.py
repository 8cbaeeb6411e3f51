"""Where the ranks of a job report: a thread of rank 0 with a port of its own."""

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
        self._listener = socket.create_server(("" if everywhere else "127.0.0.1", 0))
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
        for channel in list(self._channels):
            channel.send("closing")
            channel.close()
        self._listener.close()

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:
            return
        self._channels[Channel(connection)] = None

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
        if not hmac.compare_digest(str(message.get("token")), self.token):
            channel.ended = True
            return
        rank, process = int(message["rank"]), Process(**message["process"])
        self._channels[channel] = rank
        self._judge.registered(rank, process, message["host"], time.monotonic())
        roster = {
            rank: [member.host, vars(member.process)]
            for rank, member in self._judge.members.items()
        }
        for known, other in self._channels.items():
            if other is not None:
                known.send("roster", members=roster)
        if self.cause is not None:
            self._tell([channel])

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

"""Lines of JSON over a socket: what the ranks of a job say to each other beside the training."""

import json
import os
import select
import socket
import weakref
from typing import Any

# a traceback is the largest thing that is said
_LONGEST = 1_000_000

_open: "weakref.WeakSet[Channel]" = weakref.WeakSet()


class Channel:
    """One end of a connection. Neither sending nor receiving ever waits."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._socket.setblocking(False)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._received = self._unsent = b""
        self.ended = False
        _open.add(self)

    def fileno(self) -> int:
        """For `wait`."""
        return self._socket.fileno()

    def send(self, kind: str, **content: Any) -> None:
        """Say something; what the peer does not take yet goes with the next word.

        Its end shows in `receive`: something may still be there to be heard.
        """
        if len(self._unsent) < _LONGEST:  # else it does not read: its silence will be noticed
            self._unsent += json.dumps({"kind": kind, **content}).encode() + b"\n"
        try:
            sent = self._socket.send(self._unsent)
        except OSError:
            return
        self._unsent = self._unsent[sent:]

    def receive(self) -> list[dict[str, Any]]:
        """All that was said since; sets `ended` when the peer is gone or talks nonsense."""
        while not self.ended and len(self._received) < _LONGEST:
            try:
                piece = self._socket.recv(65536)
            except BlockingIOError:
                break
            except OSError:
                piece = b""
            self.ended = not piece
            self._received += piece
        *lines, self._received = self._received.split(b"\n")
        self.ended |= len(self._received) >= _LONGEST
        try:
            said = [json.loads(line) for line in lines]
        except (ValueError, RecursionError):
            self.ended = True
            return []
        return [message for message in said if isinstance(message, dict)]

    def close(self) -> None:
        """End the connection."""
        self.ended = True
        self._socket.close()


def wait(readable: list[Any], seconds: float) -> list[Any]:
    """Those of these that have something to say, as soon as there are any."""
    live = {one.fileno(): one for one in readable if one.fileno() >= 0}
    poll = select.poll()  # `select` ends at the 1024th file of a process
    for number in live:
        poll.register(number, select.POLLIN)
    return [live[number] for number, _ in poll.poll(max(0.0, seconds) * 1000)]


def _close_inherited() -> None:
    """A forked data worker must not hold its rank's connection open: its end would go unseen."""
    for channel in list(_open):
        channel.close()


os.register_at_fork(after_in_child=_close_inherited)

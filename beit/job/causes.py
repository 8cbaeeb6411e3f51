"""Why a job of several processes ends: the first cause, told apart from what follows from it."""

import re
import socket
import traceback
from dataclasses import asdict, dataclass
from typing import Any

import torch

from beit.errors import UserError
from beit.job.exits import Exit, RunEnd
from beit.job.signals import AtOnce

# what gloo, NCCL and the stores raise at a rank because another one is gone
_FOLLOW_UP = re.compile(
    r"closed by peer|Connection reset|Broken pipe|gloo|NCCL|ProcessGroup|TCPStore|"
    r"[Tt]imed out waiting|Socket [Tt]imeout|monitoredBarrier",
)


@dataclass(frozen=True)
class Cause:
    """What ended a job.

    Args:
        rank: where it happened.
        code: the exit code of the job, see `beit.job.exits`.
        what: one line.
        detail: a traceback, or the place where the process stood; may be empty.
        follow_up: whether it looks like a consequence of another rank's end.
        step: optimizer steps done by that rank, -1 before the first one is known.
    """

    rank: int
    code: int
    what: str
    detail: str = ""
    follow_up: bool = False
    step: int = -1
    epoch: int = 0
    host: str = ""
    pid: int = 0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def block(self) -> str:
        """What is printed last: one line for a mistake in the input, else all that is known."""
        if self.code == Exit.MISTAKE:
            return f"beit: error: rank {self.rank}: {self.what}\n"
        where = f"rank {self.rank}" + (f" (host {self.host}, pid {self.pid})" if self.pid else "")
        when = f"step {self.step}, epoch {self.epoch}" if self.step >= 0 else "before training"
        lines = [f"beit: first cause: {where}:"] if self.detail else []
        lines += [f"    {line}" for line in self.detail.splitlines()]
        lines += [f"beit: the job ends, exit code {int(self.code)}: {where}, {when}: {self.what}"]
        return "\n".join(lines) + "\n"


def of_exception(error: BaseException, *, rank: int, pid: int, step: int, epoch: int) -> Cause:
    """The cause that an exception is."""
    code = code_of(error)
    plain = isinstance(error, (UserError, RunEnd))
    name = type(error).__name__
    message = str(error) if plain else _ends(str(error))
    message = " ".join(message.split())
    return Cause(
        rank,
        code,
        message if plain else f"{name}: {message}" if message else name,
        detail="" if plain else "".join(traceback.format_exception(error))[-20_000:],
        follow_up=is_follow_up(error),
        step=step,
        epoch=epoch,
        host=socket.gethostname(),
        pid=pid,
    )


def _ends(text: str) -> str:
    """The first and the last line: what a data worker raises carries a traceback between them."""
    lines = text.strip().splitlines()
    return text if len(lines) < 3 else f"{lines[0]} ... {lines[-1]}"


def code_of(error: BaseException) -> int:
    """The exit code for an exception that nothing handled."""
    if isinstance(error, UserError):
        return Exit.MISTAKE
    if isinstance(error, RunEnd):
        return error.code
    if isinstance(error, (KeyboardInterrupt, AtOnce)):
        return Exit.SIGINT
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else Exit.FAULT if error.code else 0
    return Exit.FAULT


def is_follow_up(error: BaseException) -> bool:
    """Whether an exception came out of a collective, where another rank's end is felt."""
    if isinstance(error, torch.distributed.DistError):
        return True
    return isinstance(error, RuntimeError) and bool(_FOLLOW_UP.search(str(error)))

"""Who is to blame: what rank 0 hears from all ranks, and the first cause that follows from it.

No clock, no socket and no thread of its own: the caller says what time it is.
"""

from dataclasses import dataclass, replace

from beit.job.causes import Cause
from beit.job.exits import MEANINGS, Exit
from beit.job.processes import Process, ended

# seconds: a rank that fails in a collective waits so long for the true cause to show itself
SETTLE = 3.0
# a connection that ended waits so long for the exit code of its process
_EXIT_CODE_WITHIN = 1.0


@dataclass
class Member:
    """What is known of a rank that has registered."""

    process: Process
    host: str
    heard: float
    changed: float  # when its main thread last came further
    ticks: int = 0  # how far its main thread came; all ranks run the same program
    in_step: bool = False
    step: int = -1
    epoch: int = 0
    where: str = ""
    waits: bool = False  # its main thread stands in a collective
    left: int | None = None  # exit code with which it took its leave
    lost: float | None = None  # when its connection ended without that
    returncode: int | None = None

    @property
    def introduction(self) -> list[object]:
        """What other ranks are told of it."""
        return [self.host, vars(self.process)]


class Judge:
    """Collects what is heard of the ranks, and finds the first cause of their end.

    In this order: an exception; a process that is gone; one that was silent for `limit` seconds;
    one whose main thread hangs; an exception that follows from another rank's end, if nothing else
    shows up within three seconds.

    A main thread hangs if it is inside a step (of training or validation), has not come further for
    `limit` seconds, and another rank has been waiting for as long: one that is ahead, or that
    stands in a collective at the same place where this one does not. What may take long is not
    judged: everything up to the end of the first step, and what lies between the steps (saving,
    pictures, reading ahead); there the timeout of the process group holds.
    """

    def __init__(self, *, limit: float, heartbeat: float) -> None:
        self.limit = limit
        self.settle = max(SETTLE, 3 * heartbeat)
        self.members: dict[int, Member] = {}
        self._raised: list[tuple[float, Cause]] = []

    def registered(self, rank: int, process: Process, host: str, now: float) -> None:
        """A rank says who it is."""
        self.members[rank] = Member(process, host, heard=now, changed=now)

    def beat(self, rank: int, now: float, *, ticks: int, in_step: bool, **place: object) -> None:
        """A heartbeat: `place` has step, epoch, where and waits."""
        member = self.members[rank]
        if ticks != member.ticks:
            member.changed = now
        self.members[rank] = replace(member, heard=now, ticks=ticks, in_step=in_step, **place)  # type: ignore[arg-type]

    def raised(self, cause: Cause, now: float) -> None:
        """A rank raised."""
        self._raised.append((now, cause))

    def left(self, rank: int, code: int) -> None:
        """A rank takes its leave: it is done, or was asked to stop."""
        self.members[rank].left = code

    def lost(self, rank: int, now: float) -> None:
        """A connection ended: without a leave that is the end of the process."""
        member = self.members[rank]
        if member.left is None and member.lost is None:
            member.lost = now

    def ended(self, rank: int, returncode: int, now: float) -> None:
        """A process ended with this return code, also before it could register."""
        if rank not in self.members:
            self.members[rank] = Member(Process("", 0, 0), "", heard=now, changed=now)
        self.members[rank].returncode = returncode
        self.lost(rank, now)

    def overdue(self, now: float) -> None:
        """Rank 0 has long been done, others have not."""
        for rank, member in self.members.items():
            if member.left is None and member.lost is None and rank:
                self.raised(self._cause(rank, "does not come to its end as rank 0 did"), now)

    def paused(self, seconds: float) -> None:
        """The judge itself was stopped: the others' silence meanwhile does not count."""
        for member in self.members.values():
            member.heard += seconds
            member.changed += seconds

    def verdict(self, now: float) -> Cause | None:
        """The first cause, as soon as it is certain."""
        for _, cause in self._raised:
            if not cause.follow_up:
                return cause
        found = self._lost(now)
        if found or any(m.lost is not None for m in self.members.values()):
            return found
        return self._silent(now) or self._hung(now) or self._follow_up(now)

    def _lost(self, now: float) -> Cause | None:
        gone = [(m.lost, rank) for rank, m in self.members.items() if m.lost is not None]
        if not gone:
            return None
        since, rank = min(gone)
        code = self.members[rank].returncode
        if code is None and now - since < _EXIT_CODE_WITHIN:
            return None
        if code is None:
            return self._cause(rank, "its process is gone without a word (killed?)")
        known = {int(one) for one in MEANINGS} - {0}
        return self._cause(rank, ended(code), code if code in known else Exit.LOST)

    def _silent(self, now: float, limit: float | None = None) -> Cause | None:
        limit = self.limit if limit is None else limit
        waiting = [(m.heard, rank) for rank, m in self.members.items() if m.left is None]
        if not waiting or now - min(waiting)[0] <= limit:
            return None
        heard, rank = min(waiting)
        stopped = self.members[rank].process.state in ("T", "t")
        how = "stopped, " if stopped else ""
        return self._cause(rank, f"{how}silent for {now - heard:.0f} s")

    def _hung(self, now: float) -> Cause | None:
        ranks = [rank for rank, m in self.members.items() if m.left is None]
        if len(ranks) < 2:
            return None
        last = min(ranks, key=self._place)
        member = self.members[last]
        ahead = [self.members[r] for r in ranks if self._place(r) > self._place(last)]
        if not ahead or not member.in_step:
            return None
        if now - max(member.changed, *(m.changed for m in ahead)) <= self.limit:
            return None
        return self._cause(last, f"hangs: no progress for {now - member.changed:.0f} s")

    def _place(self, rank: int) -> tuple[int, bool]:
        return self.members[rank].ticks, self.members[rank].waits

    def _follow_up(self, now: float) -> Cause | None:
        if not self._raised or now - self._raised[0][0] < self.settle:
            return None
        early = [rank for rank, m in self.members.items() if m.left]
        if early:
            code = self.members[early[0]].left or 0
            return self._cause(early[0], f"left the job with exit code {code}", code)
        # it was not heard of since before the other one's collective failed
        return self._silent(now, self.settle) or self._raised[0][1]

    def _cause(self, rank: int, what: str, code: int = Exit.LOST) -> Cause:
        member = self.members[rank]
        return Cause(
            rank,
            code,
            what,
            detail=member.where,
            step=member.step,
            epoch=member.epoch,
            host=member.host,
            pid=member.process.pid,
        )

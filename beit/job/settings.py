"""What a run does about faults: numbers that are not finite, signals, processes that are lost."""

from dataclasses import dataclass

from beit.data.limits import not_negative, whole_number
from beit.errors import UserError


@dataclass(frozen=True)
class JobSettings:
    """How a job ends, and what it puts up with. Everything here is on in every run.

    Args:
        max_nonfinite_steps: optimizer steps of the run that may be left out because the loss or a
            gradient is not finite; the next such step ends the run. 0 stops at the first.
        stop_seconds: a process that was asked to stop has so long, beyond the step under way, to
            write its checkpoint and end; then it is ended without.
        requeue: under SLURM, put the job back into the queue when SIGUSR1 stops it.
        requeue_on_sigterm: when SIGTERM stops it, too (what a preemption sends).
        heartbeat_seconds: between two signs of life of a rank, where there are several.
        rank_timeout_seconds: a rank that is silent, or holds the others up, for longer is lost, and
            the job ends.
    """

    max_nonfinite_steps: int = 0
    stop_seconds: float = 10.0
    requeue: bool = False
    requeue_on_sigterm: bool = False
    heartbeat_seconds: float = 1.0
    rank_timeout_seconds: float = 300.0

    def __post_init__(self) -> None:
        whole_number("max_nonfinite_steps", self.max_nonfinite_steps, at_least=0)
        for name in ("stop_seconds", "heartbeat_seconds", "rank_timeout_seconds"):
            not_negative(name, getattr(self, name))
        if not 0 < 4 * self.heartbeat_seconds <= self.rank_timeout_seconds:
            raise UserError(
                f"rank_timeout_seconds {self.rank_timeout_seconds}: expected at least four times "
                f"heartbeat_seconds {self.heartbeat_seconds}, and that above 0"
            )

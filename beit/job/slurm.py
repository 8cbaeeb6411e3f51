"""SLURM: a stopped job back into the queue."""

import logging
import os
import signal
import subprocess

from beit.job.settings import JobSettings

log = logging.getLogger(__name__)

_SECONDS = 30.0


def requeue(settings: JobSettings, number: int) -> bool:
    """Put this job back into the queue, if the settings say so for this signal.

    To be called once in a job, after the checkpoint. Returns whether SLURM took it.
    """
    wanted = {
        signal.SIGUSR1: settings.requeue,
        signal.SIGTERM: settings.requeue and settings.requeue_on_sigterm,
    }
    job = job_id()
    if job is None or not wanted.get(signal.Signals(number), False):
        return False
    try:
        done = subprocess.run(
            ["scontrol", "requeue", job], capture_output=True, text=True, timeout=_SECONDS
        )
    except (OSError, subprocess.SubprocessError) as error:
        log.error("job %s was not put back into the queue: %s", job, error)
        return False
    if done.returncode != 0:
        reason = done.stderr.strip() or f"scontrol ended with {done.returncode}"
        log.error("job %s was not put back into the queue: %s", job, reason)
        return False
    log.warning("job %s is back in the queue", job)
    return True


def job_id() -> str | None:
    """What scontrol knows this job by, None outside SLURM. Of an array it is the one task."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    if array and task:
        return f"{array}_{task}"
    return os.environ.get("SLURM_JOB_ID")

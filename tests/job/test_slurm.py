import signal
import stat

import pytest

from beit.job import slurm
from beit.job.settings import JobSettings


@pytest.fixture
def scontrol(tmp_path, monkeypatch):
    """A scontrol in PATH that notes its words; calling the fixture makes it fail."""
    note = tmp_path / "words"

    def make(code: int = 0) -> None:
        program = tmp_path / "scontrol"
        program.write_text(f'#!/bin/sh\necho "$@" >> {note}\necho refused >&2\nexit {code}\n')
        program.chmod(program.stat().st_mode | stat.S_IEXEC)

    make()
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    for name in ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.delenv(name, raising=False)
    make.words = lambda: note.read_text().splitlines() if note.exists() else []
    return make


BOTH = JobSettings(requeue=True, requeue_on_sigterm=True)


@pytest.mark.parametrize(
    ("settings", "number", "expected"),
    [
        (JobSettings(), signal.SIGUSR1, []),
        (JobSettings(requeue=True), signal.SIGUSR1, ["requeue 71"]),
        (JobSettings(requeue=True), signal.SIGTERM, []),
        (BOTH, signal.SIGTERM, ["requeue 71"]),
        (BOTH, signal.SIGINT, []),  # who types Ctrl-C wants an end
    ],
)
def test_it_requeues_for_the_signals_that_were_asked_for(
    scontrol, monkeypatch, settings, number, expected
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "71")
    assert slurm.requeue(settings, number) is bool(expected)
    assert scontrol.words() == expected


def test_of_an_array_it_is_the_one_task(scontrol, monkeypatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "73")  # of a task it is a number of its own
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "71")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    assert slurm.requeue(BOTH, signal.SIGUSR1)
    assert scontrol.words() == ["requeue 71_2"]


def test_outside_slurm_nothing_is_called(scontrol) -> None:
    assert not slurm.requeue(BOTH, signal.SIGUSR1)
    assert scontrol.words() == []


def test_a_refusal_and_a_missing_scontrol_are_told(scontrol, monkeypatch, caplog) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "71")
    scontrol(code=1)
    assert not slurm.requeue(BOTH, signal.SIGUSR1)
    monkeypatch.setenv("PATH", "/nowhere")
    assert not slurm.requeue(BOTH, signal.SIGUSR1)
    refused, missing = [record.getMessage() for record in caplog.records]
    assert "refused" in refused
    assert "scontrol" in missing

"""A sweep whose members fail, are killed or stopped: each is marked, and the others run."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from beit import sweep
from beit.errors import UserError
from beit.sweep import Sweep

# a member's process, in place of a run: what it does follows from its words
MEMBER = """
import json, os, signal, sys, time
words = dict(word.split("=", 1) for word in sys.argv[1:] if "=" in word)
with open(os.environ["CALLS"], "a") as file:
    file.write(words["do"] + "\\n")
do = words["do"]
if do.startswith("exit"):
    sys.exit(int(do[4:]))
elif do == "oom":
    os.kill(os.getpid(), signal.SIGKILL)
elif do == "wait":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    print("waiting", flush=True)
    time.sleep(60)
else:
    with open(os.environ["BEIT_SWEEP_RESULT"], "w") as file:
        json.dump({"val/loss": float(do)}, file)
"""


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Members are processes of the script above; the file has which of them were started."""
    script = tmp_path / "member.py"
    script.write_text(MEMBER)
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    start = subprocess.Popen

    def popen(command: list[str], **options: Any) -> Any:
        assert command[1:4] == ["-m", "beit.cli", "train"]
        return start([sys.executable, str(script), *command[4:]], **options)

    monkeypatch.setattr(sweep.subprocess, "Popen", popen)
    return tmp_path / "calls"


def run(folder: Path, *members: str, words: tuple[str, ...] = ()) -> Sweep:
    made = Sweep(["-m"])
    made.values = [  # type: ignore[attr-defined]
        made.run(folder / str(number), number, [f"do={member}", *words])
        for number, member in enumerate(members)
    ]
    return made


def record(folder: Path) -> list[tuple[str, Any]]:
    entries = json.loads((folder / "sweep.json").read_text())
    return [(entry["state"], entry["code"]) for entry in entries]


def test_each_end_is_marked_and_the_others_run(tmp_path: Path, calls: Path) -> None:
    made = run(tmp_path / "s", "0.5", "exit1", "oom", "exit2", "0.25")
    assert made.values == [0.5, None, None, None, 0.25]  # type: ignore[attr-defined]
    assert record(tmp_path / "s") == [
        ("done", 0),
        ("failed, exit code 1", 1),
        ("killed by SIGKILL", -9),
        ("failed, exit code 2", 2),
        ("done", 0),
    ]
    assert made.code() == 1
    table = made.table().splitlines()
    assert len(table) == 6
    assert table[3].split() == ["2", "killed", "by", "SIGKILL", "-", "do=oom", f"{tmp_path}/s/2"]
    assert "0.25" in table[5]


@pytest.mark.parametrize(
    ("members", "code"),
    [(("1", "2"), 0), (("1", "exit2"), 2), (("exit2", "oom"), 1), (("exit3", "exit2"), 3)],
)
def test_the_exit_code_is_the_worst(
    members: tuple[str, ...], code: int, tmp_path: Path, calls: Path
) -> None:
    assert run(tmp_path / "s", *members).code() == code


def test_resume_auto_goes_on_with_the_unfinished_ones(tmp_path: Path, calls: Path) -> None:
    first = run(tmp_path / "s", "0.5", "oom")
    assert first.code() == 1
    with pytest.raises(UserError, match="already holds a sweep"):
        run(tmp_path / "s", "0.5", "oom")
    again = run(tmp_path / "s", "0.5", "oom", "0.75", words=("resume=auto",))
    assert calls.read_text().split() == ["0.5", "oom", "oom", "0.75"]
    assert again.values == [0.5, None, 0.75]  # type: ignore[attr-defined]
    with pytest.raises(UserError, match=r"member 0 was do=0\.5"):
        run(tmp_path / "s", "0.6", words=("resume=auto",))
    assert len(record(tmp_path / "s")) == 3


def test_a_start_that_is_cut_off_forgets_no_member(tmp_path: Path, calls: Path) -> None:
    run(tmp_path / "s", "exit1", "0.5")
    one = Sweep(["-m"])
    one.run(tmp_path / "s" / "0", 0, ["do=exit1", "resume=auto"])
    assert [state for state, _ in record(tmp_path / "s")] == ["failed, exit code 1", "done"]


def test_a_stop_reaches_the_member_and_the_rest_is_not_run(tmp_path: Path, calls: Path) -> None:
    made = Sweep(["-m"])
    pid = os.getpid()
    helper = os.fork()
    if helper == 0:  # once the member runs
        while not calls.exists() or "wait" not in calls.read_text():
            time.sleep(0.02)
        time.sleep(0.5)
        os.kill(pid, signal.SIGTERM)
        os._exit(0)
    with made.stoppable():
        for number, do in enumerate(["0.5", "wait", "0.5"]):
            made.run(tmp_path / "s" / str(number), number, [f"do={do}"])
    os.waitpid(helper, 0)
    assert record(tmp_path / "s") == [
        ("done", 0),
        ("stopped, exit code 143", 143),
        ("not run", None),
    ]
    assert made.code() == 143
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_member_is_a_run_of_its_own(tmp_path: Path) -> None:
    """From the command line: its run, its folder, its metric."""
    words = ["task=classification", "model=micro", "data=digits", "logger=csv", "callbacks=none"]
    words += ["batch.global_size=8", "batch.per_device=8", "trainer.max_epochs=1"]
    words += [
        "trainer.limit_train_batches=2",
        "trainer.limit_val_batches=1",
        "optim.warmup_epochs=0",
    ]
    words += ["loader.num_workers=0", "loader.check_images=0", "trainer.precision=32-true"]
    words += ["model.depth=1", f"paths.runs_dir={tmp_path}", "name=one sweep"]
    command = [sys.executable, "-m", "beit.cli", "train", "-m", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    folder = tmp_path / "sweeps" / "one sweep"
    assert done.returncode == 0, done.stderr[-3000:]
    entries = json.loads((folder / "sweep.json").read_text())
    assert [entry["state"] for entry in entries] == ["done"]
    assert entries[0]["metrics"]["val/loss"] > 0
    assert Path(entries[0]["folder"]).joinpath("metrics.csv").exists()
    assert not list(folder.glob(".*"))
    lines = done.stderr.splitlines()
    assert lines[-2].split()[:3] == ["member", "state", "val/loss"]
    assert lines[-1].split()[:2] == ["0", "done"]


def test_the_sweeping_process_imports_nothing_heavy(tmp_path: Path) -> None:
    code = (
        "import sys; from beit import cli, sweep; sys.argv = ['beit', 'train', '-m', 'seed=0,1', "
        f"'experiment=demo/scratch', 'paths.runs_dir={tmp_path}']; "
        "sweep.Sweep._run = lambda self, folder, member, stages: setattr(member, 'state', 'done'); "
        "code = cli.main(); assert code == 0, code; "
        "assert not {'torch', 'lightning', 'timm'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100)

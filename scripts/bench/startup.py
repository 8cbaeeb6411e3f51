"""How long a user waits: for the help, for an import, for the first optimizer step of the demo."""

import subprocess
import sys
import tempfile
from functools import partial

from scripts.bench.processes import ROOT
from scripts.bench.results import Entry, Table
from scripts.bench.settings import Settings
from scripts.bench.timing import Step, alternate, timed

ROW = "Start-up, whole processes"
_ONE_STEP = ("trainer.max_steps=1", "optim.warmup_epochs=0", "optim.warmup_steps=0")
_BEIT = "import sys; from beit.cli import main; sys.exit(main())"
# ends the process after its first optimizer step; all that it imports the training needs too
_FIRST_STEP = """
import os, sys
from torch.optim.optimizer import register_optimizer_step_post_hook

def end(*_):
    print("stepped", flush=True)
    os._exit(0)

register_optimizer_step_post_hook(end)
from beit.cli import main
sys.exit(main() or 1)
"""


def run(settings: Settings) -> list[Table]:
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        commands: dict[str, Step] = {
            "beit --help": partial(_run, _BEIT, "--help"),
            "import beit": partial(_run, "import beit"),
            "import torch, for comparison": partial(_run, "import torch"),
            **_training(folder, quick=settings.quick),
        }
        seconds = alternate(timed(commands), rounds=settings.rounds, warmup=settings.number(1, 0))
    entries = [Entry(name, values) for name, values in seconds.items()]
    return [Table("", entries, compared="")]


def _training(folder: str, *, quick: bool) -> dict[str, Step]:
    """The command of the demo's second stage, after the tokenizer that it needs was made.

    In the quick form that of its first stage, which needs nothing.
    """
    stage, runs = "tokenizer" if quick else "pretrain", f"paths.runs_dir={folder}"
    if not quick:
        _run(_BEIT, "train", "experiment=demo/tokenizer", runs, *_ONE_STEP)
    # a name of its own each time, as a user's run has
    numbers = iter(range(10**9))

    def train() -> None:
        words = ("train", f"experiment=demo/{stage}", runs, f"name=run-{next(numbers)}")
        _run(_FIRST_STEP, *words, says="stepped")

    return {f"beit train experiment=demo/{stage}, to the first step": train}


def _run(program: str, *words: str, says: str = "") -> None:
    command = [sys.executable, "-c", program, *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode or says not in done.stdout:
        raise RuntimeError(f"{' '.join(words)} failed:\n{done.stdout}{done.stderr}")

"""The rows of the fault sweep: each module of this folder that has a ROW, and how one is run."""

import importlib
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType


@dataclass(frozen=True)
class Result:
    """What a row showed."""

    name: str  # of the module
    row: str
    passed: int
    tried: int
    control: bool  # with the protection switched off the same check failed, as it must
    seconds: float
    detail: str

    @property
    def good(self) -> bool:
        return 0 < self.tried == self.passed and self.control


def names() -> list[str]:
    """Modules of the rows, told by their text: importing one costs time."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return [file.stem for file in files if "\nROW = " in file.read_text(encoding="utf-8")]


def load(name: str) -> ModuleType:
    """The module of a row: ROW, TRIALS, SHARE, `run` and `control`."""
    return importlib.import_module(f"scripts.faults.{name}")


def run_row(name: str, *, short: bool, seed: int, trials: Sequence[int] = ()) -> Result:
    """One row in a folder of its own; what goes wrong in it is its result."""
    module = load(name)
    count = trials[0] if trials else module.SHARE if short else module.TRIALS
    started = time.monotonic()
    passed, tried, control = 0, 0, False
    with tempfile.TemporaryDirectory(prefix=f"faults-{name}-") as temporary:
        folder = Path(temporary)
        for part in ("run", "control"):
            (folder / part).mkdir()
        try:
            passed, tried, detail = module.run(count, folder / "run", seed)
            control = module.control(folder / "control", seed)
            if not control:
                detail += "; the control found nothing"
        except Exception as error:  # noqa: BLE001 - the other rows are to be run
            traceback.print_exc()
            detail = f"{type(error).__name__}: {error}".splitlines()[0]
    seconds = time.monotonic() - started
    return Result(name, module.ROW, passed, tried, control, seconds, detail)

"""The run's metrics as one CSV file that survives a restart."""

import csv
import io
import os
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from beit.files import replace_text

_BLOCK = 1 << 16


class MetricsFile(Logger):
    """Appends one row for each logged dict to `<save_dir>/metrics.csv`.

    Lightning's CSVLogger deletes the file it finds, so that a resumed run would lose its past.
    Here a resumed run goes on after the last row of the checkpoint's past (see `rewind`), so that
    each metric stands once for each step. A new metric adds a column, for which the file is
    rewritten whole and then put in the old one's place.

    The step of a row is Lightning's: that of the n-th optimizer step is n - 1, and so is that of
    the validation and the means over the epoch that follow it.
    """

    def __init__(self, save_dir: str) -> None:
        super().__init__()
        self._save_dir = Path(save_dir)
        self.path = self._save_dir / "metrics.csv"
        self._columns: list[str] = []
        self._known: tuple[int, set[str]] = (-1, set())  # a step, and metrics that it has already

    @property
    def name(self) -> str:
        return ""

    @property
    def version(self) -> str:
        return ""

    @property
    def save_dir(self) -> str:
        return str(self._save_dir)

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *_: Any, **__: Any) -> None:
        """Nothing: the run's config lies beside the file."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if step == self._known[0]:
            new = metrics.keys() - self._known[1]
            if new <= {"epoch"}:
                return
            metrics = {key: metrics[key] for key in metrics if key in new or key == "epoch"}
        row = {"step": step, **{key: float(value) for key, value in metrics.items()}}
        if not self._columns and self.path.exists():
            self._columns = self._take_over()
        if not set(row) <= set(self._columns):
            self._add_columns(set(row))
        with self.path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self._columns, lineterminator="\n").writerow(row)

    @rank_zero_only
    def rewind(self, step: int) -> None:
        """Drop the rows of all optimizer steps after the first `step`.

        Read from the end, and cut there: it takes no longer for a long file. What a run had logged
        after its last saved step (the validation at the end of an epoch) is not logged again.
        """
        if not self.path.exists():
            return
        self._columns = self._take_over()
        known: set[str] = set()
        with self.path.open("rb+") as file:
            for begin, line in _from_the_end(file):
                number, metrics = self._read_row(line)
                if number is None or number >= step:
                    file.truncate(begin)
                elif number == step - 1:
                    known |= metrics
                else:
                    break
        self._known = step - 1, known

    def _read_row(self, line: str) -> tuple[int | None, set[str]]:
        """The step of a row and the metrics it has; None for what is no row."""
        values = dict(zip(self._columns, next(csv.reader([line]), [])))
        text = values.pop("step", "")
        number = int(text) if text.isdigit() else None
        return number, {name for name, value in values.items() if value}

    def _take_over(self) -> list[str]:
        """The columns of the file that a previous start of this run left."""
        with self.path.open("rb+") as file:
            for begin, line in _from_the_end(file, header=True):
                if not line.endswith("\n"):
                    file.truncate(begin)  # it was killed in the middle of a row
                break
            file.seek(0)
            return [name for name in file.readline().decode().strip().split(",") if name]

    def _add_columns(self, names: set[str]) -> None:
        known = {*self._columns, *names} - {"step", "epoch"}
        rows = read_metrics(self.path) if self.path.exists() else []
        self._columns = ["step", "epoch", *sorted(known)]
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self._columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        replace_text(self.path, text.getvalue())


def _from_the_end(file: IO[bytes], *, header: bool = False) -> Iterator[tuple[int, str]]:
    """(where it begins, text with its line end) of each line, the last one first.

    The first line of the file, unless `header`, is left out.
    """
    begin, rest = file.seek(0, os.SEEK_END), b""
    while begin > 0:
        size = min(_BLOCK, begin)
        begin -= size
        file.seek(begin)
        lines = (file.read(size) + rest).splitlines(keepends=True)
        rest = lines[0]  # it may begin in the block before
        at = begin + sum(map(len, lines))
        for line in reversed(lines[1:]):
            at -= len(line)
            yield at, line.decode(errors="replace")
    if rest and header:
        yield 0, rest.decode(errors="replace")


def read_metrics(path: Path) -> list[dict[str, str]]:
    """Rows of a metrics file as they were written; an empty text where nothing was logged."""
    with path.open(newline="", encoding="utf-8") as file:
        return [dict(row) for row in csv.DictReader(file)]

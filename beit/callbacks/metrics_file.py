"""The run's metrics as one CSV file that survives a restart."""

import csv
import os
from argparse import Namespace
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only


class MetricsFile(Logger):
    """Appends one row for each logged dict to `<save_dir>/metrics.csv`.

    Lightning's CSVLogger deletes the file it finds, so that a resumed run would lose its past.
    Here rows are only ever added; after a resume the steps since the last checkpoint stand twice,
    and the later row counts. A new metric adds a column, for which the file is rewritten whole
    and then put in the old one's place.
    """

    def __init__(self, save_dir: str) -> None:
        super().__init__()
        self._save_dir = Path(save_dir)
        self.path = self._save_dir / "metrics.csv"
        self._columns: list[str] = []

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
        row = {"step": step, **{key: float(value) for key, value in metrics.items()}}
        if not self._columns and self.path.exists():
            self._columns = self._take_over()
        if not set(row) <= set(self._columns):
            self._add_columns(set(row))
        with self.path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self._columns).writerow(row)

    def _take_over(self) -> list[str]:
        """The columns of the file that a previous start of this run left."""
        text = self.path.read_text(encoding="utf-8")
        if text and not text.endswith("\n"):
            # it was killed in the middle of a row
            self._replace(text[: text.rfind("\n") + 1])
        return text.partition("\n")[0].strip().split(",") if "\n" in text else []

    def _add_columns(self, names: set[str]) -> None:
        known = {*self._columns, *names} - {"step", "epoch"}
        rows = read_metrics(self.path) if self.path.exists() else []
        self._columns = ["step", "epoch", *sorted(known)]
        lines = [",".join(self._columns)]
        lines += [",".join(row.get(name, "") for name in self._columns) for row in rows]
        self._save_dir.mkdir(parents=True, exist_ok=True)
        self._replace("\n".join(lines) + "\n")

    def _replace(self, text: str) -> None:
        draft = self.path.with_suffix(".csv.part")
        draft.write_text(text, encoding="utf-8")
        os.replace(draft, self.path)


def read_metrics(path: Path) -> list[dict[str, str]]:
    """Rows of a metrics file as they were written; an empty text where nothing was logged."""
    with path.open(newline="", encoding="utf-8") as file:
        return [dict(row) for row in csv.DictReader(file)]

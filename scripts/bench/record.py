"""What was measured, kept from run to run: rows of a later run take the place of earlier ones."""

import dataclasses
import json
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from beit.run_folder import describe_environment
from scripts.bench.ceilings import Ceilings
from scripts.bench.results import Entry, Table
from scripts.bench.rows import ROWS, Result
from scripts.bench.settings import Settings


@dataclass(frozen=True)
class Run:
    """When, where and with what rows were measured, and what the machine could do then."""

    date: str
    commit: str
    processor: str
    cores: int
    packages: dict[str, str]
    settings: dict[str, Any]
    ceilings: Ceilings

    @classmethod
    def now(cls, settings: Settings, ceilings: Ceilings) -> "Run":
        about = describe_environment()
        return cls(
            datetime.now(timezone.utc).strftime("%Y-%m-%d"),
            about["commit"],
            about["machine"]["processor"],
            about["machine"]["cores"],
            about["packages"],
            asdict(settings),
            ceilings,
        )

    def __str__(self) -> str:
        torch = self.packages["torch"]
        return (
            f"{self.date}, commit {self.commit}, {self.settings['threads']} threads on "
            f"{self.processor} ({self.cores} cores), torch {torch}, "
            f"{self.settings['rounds']} rounds. {ceilings_told(self.ceilings)}"
        )


Found = dict[str, tuple[Run, Result]]  # by the row's module


def merged(path: Path, run: Run, results: list[Result]) -> Found:
    """The rows in the file, those of this run in place of theirs; writes the file anew."""
    found = _read(path) if path.exists() else {}
    found |= {result.name: (run, result) for result in results}
    content = {
        name: {"run": asdict(run), "result": asdict(result)}
        for name, (run, result) in found.items()
    }
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return found


def markdown(found: Found) -> str:
    """Every row under a heading; the run is named where it is another than the row's before."""
    lines: list[str] = []
    before = None
    for name in ROWS:
        if name not in found:
            continue
        run, result = found[name]
        if run != before:
            lines += [str(run), ""]
            before = run
        lines += [f"### {result.row}", ""]
        for table in result.tables:
            lines += _table(table, run.ceilings)
    return "\n".join(lines)


def ceilings_told(seen: Ceilings) -> str:
    return (
        f"The machine's ceilings in the same run: {seen['bf16'] / 1e12:.2f} TFLOP/s for products "
        f"in bf16, {seen['fp32'] / 1e12:.2f} in fp32; {seen['copy'] / 1e9:.1f} GB/s copied."
    )


def _table(table: Table, seen: Ceilings) -> list[str]:
    header = table.header()
    return [
        *([f"{table.title[0].upper()}{table.title[1:]}:", ""] if table.title else []),
        _line(header),
        _line(["---", *["---:"] * (len(header) - 1)]),
        *map(_line, table.cells(seen)),
        "",
        *(line for note in table.notes for line in (note, "")),
    ]


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _read(path: Path) -> Found:
    content = json.loads(path.read_text(encoding="utf-8"))
    return {
        name: (Run(**part["run"]), _result(part["result"]))
        for name, part in content.items()
        if name in ROWS
    }


def _result(part: dict[str, Any]) -> Result:
    tables = [
        Table(**{**table, "entries": [Entry(**entry) for entry in table["entries"]]})
        for table in part["tables"]
    ]
    return dataclasses.replace(Result(**part), tables=tables)

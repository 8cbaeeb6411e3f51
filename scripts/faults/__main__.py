"""python -m scripts.faults [ROW ...]: the fault sweep, as a table, JSON and Markdown."""

import argparse
import dataclasses
import json
import multiprocessing
import os
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from beit.run_folder import describe_environment
from scripts.faults import rows
from scripts.sections import write_section

_LONG = ("kills", "signals", "ranks", "loggers")  # minutes each
DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "reliability.md"


def main() -> int:
    """Run the rows, print and write what they showed. Returns the exit code: 1 if one failed."""
    options = _options()
    console = Console()
    started = time.monotonic()
    results = []
    for result in _results(options):
        results.append(result)
        mark = "[green]ok[/]" if result.good else "[red]FAILED[/]"
        console.print(
            f"{mark} {result.name}: {result.passed} of {result.tried} in {result.seconds:.0f} s, "
            f"{result.detail}"
        )
    results.sort(key=lambda result: result.name)
    seconds = time.monotonic() - started
    console.print(_table(results))
    text = _write(options.output, results, seed=options.seed, seconds=seconds)
    options.output.with_suffix(".md").write_text(text, encoding="utf-8")
    if options.write_docs and not options.rows:
        write_section(DOCUMENT, "faults", "make faults", text)
    console.print(f"{seconds:.0f} s; written to {options.output}.json and .md")
    return 0 if all(result.good for result in results) else 1


def _results(options: argparse.Namespace) -> Iterator[rows.Result]:
    """The rows' results as they come, several rows at a time, the longest ones first."""
    names = sorted(options.rows or rows.names(), key=lambda name: name not in _LONG)
    # by fork: what is imported here need not be imported again
    with ProcessPoolExecutor(options.jobs, multiprocessing.get_context("fork")) as pool:
        given = {"short": options.short, "seed": options.seed, "trials": options.trials}
        waiting = [pool.submit(rows.run_row, name, **given) for name in names]
        for done in as_completed(waiting):
            yield done.result()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m scripts.faults", description=__doc__)
    parser.add_argument("rows", nargs="*", choices=[[], *rows.names()], metavar="ROW")
    parser.add_argument("--short", action="store_true", help="the short form that the tests run")
    parser.add_argument("--trials", type=int, nargs=1, default=(), help="of each row")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="rows at a time")
    parser.add_argument("--write-docs", action="store_true", help="into docs/reliability.md")
    parser.add_argument("--output", type=Path, default=Path("runs/faults"), help="without suffix")
    return parser.parse_args()


def _table(results: list[rows.Result]) -> Table:
    table = Table("fault", "trials", "passed", "control", "s", "result", title="faults")
    for result in results:
        table.add_row(*_cells(result), style="" if result.good else "red")
    return table


def _cells(result: rows.Result) -> list[str]:
    control = "fails, as it must" if result.control else "found nothing"
    numbers = [str(result.tried), str(result.passed)]
    return [result.row, *numbers, control, f"{result.seconds:.0f}", result.detail]


def _write(output: Path, results: list[rows.Result], *, seed: int, seconds: float) -> str:
    """Write the JSON; returns the same as Markdown."""
    about = describe_environment()
    content: dict[str, Any] = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "commit": about["commit"],
        "machine": about["machine"],
        "packages": about["packages"],
        "seed": seed,
        "seconds": round(seconds, 1),
        "rows": [dataclasses.asdict(result) for result in results],
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.with_suffix(".json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    machine = about["machine"]
    lines = [
        f"Commit {about['commit']}, {machine['processor']}, {os.cpu_count()} cores, seed {seed}, "
        f"{seconds:.0f} s.",
        "",
        "| fault | trials | passed | control | s | result |",
        "|---|---:|---:|---|---:|---|",
        *("| " + " | ".join(_cells(result)) + " |" for result in results),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    raise SystemExit(main())

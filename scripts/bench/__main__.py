"""python -m scripts.bench [ROW ...]: ours beside its peers, as tables, JSON and Markdown."""

import argparse
import traceback
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table as RichTable

from scripts.bench import ceilings, record, rows
from scripts.bench.results import Table
from scripts.bench.settings import Settings
from scripts.bench.timing import threads
from scripts.sections import write_section

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "performance.md"


def main() -> int:
    """Run the rows, print and write what they measured. Returns the exit code: 1 if one failed."""
    options = _options()
    settings = Settings(
        rounds=options.rounds or (1 if options.quick else 5),
        threads=options.threads,
        quick=options.quick,
        images=options.images,
        unilm=options.unilm,
    )
    console = Console()
    results, seen = [], _ceilings(settings)
    failed = []
    for name in options.rows or rows.ROWS:
        try:
            result = rows.run_row(name, settings)
        except Exception:  # noqa: BLE001 - the other rows are to be run
            traceback.print_exc()
            failed.append(name)
            continue
        seen = ceilings.best(seen, _ceilings(settings))
        results.append(result)
        console.rule(f"{result.row} ({name}, {result.seconds:.0f} s)")
        for table in result.tables:
            _print(console, table, seen)
    run = record.Run.now(settings, seen)
    found = record.merged(options.output.with_suffix(".json"), run, results)
    text = record.markdown(found)
    options.output.with_suffix(".md").write_text(text, encoding="utf-8")
    if options.write_docs and not failed:
        write_section(DOCUMENT, "bench", "make bench", text)
    console.print(record.ceilings_told(seen), *[f"FAILED: {name}" for name in failed], sep="\n")
    console.print(f"written to {options.output}.json and .md")
    return 1 if failed else 0


def _ceilings(settings: Settings) -> ceilings.Ceilings:
    with threads(settings.threads):
        return ceilings.measure(quick=settings.quick)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m scripts.bench", description=__doc__)
    parser.add_argument("rows", nargs="*", choices=[[], *rows.ROWS], metavar="ROW")
    parser.add_argument("--rounds", type=int, help="timed calls of each contender (5)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: only that it runs")
    parser.add_argument("--images", default="", help="photographs: a folder, or parquet files")
    parser.add_argument("--unilm", default="", help="a checkout of microsoft/unilm")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--write-docs", action="store_true", help="into docs/performance.md")
    parser.add_argument("--output", type=Path, help="without suffix (runs/bench)")
    options = parser.parse_args()
    if options.quick and options.write_docs:
        parser.error("--quick measures nothing that --write-docs could write")
    options.output = options.output or Path("runs/bench-quick" if options.quick else "runs/bench")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    return options


def _print(console: Console, table: Table, seen: ceilings.Ceilings) -> None:
    shown = RichTable(*table.header(), title=table.title or None)
    for cells in table.cells(seen):
        shown.add_row(*cells)
    console.print(shown, *table.notes, sep="\n")


if __name__ == "__main__":
    raise SystemExit(main())

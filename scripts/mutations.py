"""Break the program on purpose, one fault at a time, and see which test notices.

    python -m scripts.mutations [NAME ...]      # make mutations; NAME: part of a mutation's name

Each fault is put into a temporary copy of the package, never into the working tree, and the tests
that ought to notice run there. The table in docs/parity.md is written anew, with NAME the rows of
these alone. Exit code 1 where a fault survives or a test fails without one.
"""

import importlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from scripts.faulty import MUTATIONS, Mutation
from scripts.sections import read_section, write_section

ROOT = Path(__file__).parents[1]
COPIED = ("beit", "configs", "tests", "scripts", "docs", "pyproject.toml", "Makefile", "README.md")
TIME_LIMIT = 300  # seconds for the tests of one file
# imported once; every trial is a fork of that. The package itself is imported by the trials alone
LIBRARIES = (
    *("torch", "torchvision.transforms", "timm.data", "timm.models.beit", "timm.optim"),
    *("lightning", "torchmetrics", "datasets", "sklearn.datasets", "scipy.interpolate", "rich"),
    *("transformers.models.beit.modeling_beit", "transformers.models.beit.image_processing_beit"),
    "transformers.models.beit.image_processing_pil_beit",
)


class FirstFailure:
    """A pytest plugin that keeps the name of the first test that fails."""

    name = ""

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed and not self.name:
            self.name = report.nodeid.partition("::")[2].partition("[")[0]

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed and not self.name:
            self.name = "(cannot be imported)"


def main(words: list[str]) -> int:
    chosen = [m for m in MUTATIONS if not words or any(word in m.name for word in words)]
    for name in LIBRARIES:
        importlib.import_module(name)
    with tempfile.TemporaryDirectory(prefix="beit-mutations-") as folder:
        copy = Path(folder)
        _copy_tree(copy)
        broken = _controls(copy, chosen)
        if broken:
            print(f"fail without any fault: {', '.join(broken)}")
            return 1
        caught = {mutation.name: _trial(copy, mutation) for mutation in chosen}
    survivors = [name for name, tests in caught.items() if not tests]
    print(f"{len(caught) - len(survivors)} of {len(caught)} caught", *survivors, sep="\n  ")
    place = ROOT / "docs" / "parity.md", "mutations", "make mutations"
    write_section(*place, "\n".join(table(caught, read_section(*place))))
    return 1 if survivors else 0


def table(caught: dict[str, list[str]], before: str = "") -> Iterable[str]:
    """Markdown: each fault, and in each file that was asked the first test to fail.

    What was not tried has its row of the table `before`; none, where there was none.
    """
    known = {line.split(" | ")[0].removeprefix("| "): line for line in before.splitlines()}
    yield "| fault | file | noticed by |"
    yield "| --- | --- | --- |"
    for mutation in MUTATIONS:
        if mutation.name in caught:
            noticed = ", ".join(f"`{test}`" for test in caught[mutation.name]) or "**nothing**"
            yield f"| {mutation.name} | `{mutation.file}` | {noticed} |"
        elif mutation.name in known:
            yield known[mutation.name]


def _copy_tree(copy: Path) -> None:
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            skipped = shutil.ignore_patterns("__pycache__")
            shutil.copytree(source, copy / name, ignore=skipped)
        else:
            shutil.copy(source, copy / name)


def _controls(copy: Path, mutations: list[Mutation]) -> list[str]:
    """The tests that fail in the copy as it is: they would prove nothing."""
    files = dict.fromkeys(test for mutation in mutations for test in mutation.tests)
    failing = []
    for test in files:
        if failure := _first_failure(copy, test):
            failing.append(f"{test}::{failure}")
    return failing


def _trial(copy: Path, mutation: Mutation) -> list[str]:
    """`file::test` for each test file that notices the mutation."""
    path, started = copy / mutation.file, time.monotonic()
    original = path.read_text(encoding="utf-8")
    path.write_text(mutation.applied(original), encoding="utf-8")
    try:
        failures = {test: _first_failure(copy, test) for test in mutation.tests}
    finally:
        path.write_text(original, encoding="utf-8")
    caught = [f"{test.partition('/')[2]}::{name}" for test, name in failures.items() if name]
    seconds = time.monotonic() - started
    print(f"{seconds:5.1f} s  {mutation.name}: {', '.join(caught) or 'SURVIVES'}", flush=True)
    return caught


def _first_failure(copy: Path, test: str) -> str:
    """Name of the first test of a file that fails in the copy, "" if none, from a fork of us."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        signal.alarm(TIME_LIMIT)
        with os.fdopen(writing, "w") as stream:
            json.dump(_run_tests(copy, test), stream)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as stream:
        answer = stream.read()
    _, status = os.waitpid(child, 0)
    if status != 0 or not answer:
        return f"(ended by {os.waitstatus_to_exitcode(status)})"
    return json.loads(answer)


def _run_tests(copy: Path, test: str) -> str:
    os.chdir(copy)
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    sys.path.insert(0, str(copy))
    sys.dont_write_bytecode = True  # a second fault in the same second would find the first one's
    import pytest

    import beit

    assert Path(beit.__file__).is_relative_to(copy), beit.__file__
    failure = FirstFailure()
    options = ["-x", "-q", "-p", "no:cacheprovider", "--rootdir", str(copy)]
    code = pytest.main([*options, str(copy / test)], plugins=[failure])
    if code == 0:
        return ""
    return failure.name or f"(pytest ended with {int(code)})"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

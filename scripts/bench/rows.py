"""The rows of the benchmark, each a module of this folder, and how one is run."""

import importlib
import time
from dataclasses import dataclass
from types import ModuleType

from scripts.bench.results import Table
from scripts.bench.settings import Settings
from scripts.bench.timing import threads

# in the order of the document
ROWS = (
    "masks",
    "views",
    "tokenizer",
    "mim_step",
    "mim_step_compiled",
    "pretraining_step",
    "classification_step",
    "segmentation_step",
    "inference",
    "memory",
    "startup",
    "scaling",
    "growth",
    "guards",
    "index",
)


@dataclass(frozen=True)
class Result:
    """What a row measured."""

    name: str  # of the module
    row: str
    tables: list[Table]
    seconds: float


def load(name: str) -> ModuleType:
    """The module of a row: ROW, and `run`, which gives its tables."""
    return importlib.import_module(f"scripts.bench.{name}")


def run_row(name: str, settings: Settings) -> Result:
    module = load(name)
    started = time.monotonic()
    with threads(settings.threads):
        tables = module.run(settings)
    return Result(name, module.ROW, tables, time.monotonic() - started)

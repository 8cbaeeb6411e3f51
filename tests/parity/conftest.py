"""`pytest tests/parity --write-docs` writes what these tests measured into docs/parity.md."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# neither tests nor scripts is a package
sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[2]))

from measured import Measured

from scripts.sections import write_section

DOCUMENT = Path(__file__).parents[2] / "docs" / "parity.md"
MATRICES = ("Encoder",)
RESULTS = pytest.StashKey[Measured]()


@pytest.fixture(scope="session")
def measured(pytestconfig: pytest.Config) -> Iterator[Measured]:
    """measured(part, what, against, difference, allowed): notes it, and asserts it is allowed."""
    results = Measured()
    pytestconfig.stash[RESULTS] = results
    yield results
    if pytestconfig.getoption("--write-docs"):
        write_section(DOCUMENT, "parity", "make parity", results.tables(MATRICES))

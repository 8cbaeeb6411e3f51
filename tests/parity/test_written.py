"""The last of these tests: docs/parity.md has the rows, columns and limits that they measure."""

from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import DOCUMENT, MATRICES
from measured import Measured, skeleton

from scripts.sections import read_section

FILES = {path.name for path in Path(__file__).parent.glob("test_*.py")}


def test_the_document_is_current(request, measured):
    options = request.config.option
    ran = {item.path.name for item in request.session.items if item.path.parent.name == "parity"}
    if request.config.getoption("--write-docs"):
        pytest.skip("it is being written")
    if ran != FILES or options.keyword or options.markexpr or request.session.testsfailed:
        pytest.skip("only a part of the parity tests ran")
    if any("::" in argument for argument in request.config.args):
        pytest.skip("only a part of the parity tests ran")
    if not (find_spec("dall_e") and find_spec("scipy")):
        pytest.skip("without the packages dall_e and scipy there is nothing to compare with")
    written = skeleton(read_section(DOCUMENT, "parity", "make parity"))
    found = skeleton(measured.tables(MATRICES))
    hint = "docs/parity.md is out of date: make parity writes it anew"
    assert sorted(set(written) ^ set(found)) == [], hint


def test_tables_by_hand():
    measured = Measured()
    measured("Matrix", "a", "x", 0.5, 1.0)
    measured("Matrix", "a", "x", 0.25, 1.0)
    measured("Matrix", "b", "y", 1e-7, 1e-5)
    measured("List", "c", "z", 0, 0)
    with pytest.raises(AssertionError, match="c against z: 1, allowed 0"):
        measured("List", "c", "z", 1, 0)
    text = measured.tables(("Matrix",))
    assert "| a | 5.0e-01 |  |\n| b |  | 1.0e-07 |" in text
    assert "| *allowed* | *1* | *1e-05* |" in text
    assert "| c | z | equal |  |" in text
    assert skeleton(text) == skeleton(text.replace("5.0e-01", "6.0e-02"))
    assert skeleton(text) != skeleton(text.replace("1e-05", "1e-04"))

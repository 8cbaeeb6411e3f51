"""A small share of the fault sweep (`make faults`): every row, and its control, which must fail."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from scripts.faults import rows


@pytest.mark.parametrize("name", rows.names())
def test_row(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    result = rows.run_row(name, short=True, seed=0)
    assert result.control, f"{result.row}: with the fault put back nothing fails: {result.detail}"
    assert result.passed == result.tried > 0, f"{result.row}: {result.detail}"

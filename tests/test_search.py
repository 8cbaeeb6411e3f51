"""A search by Optuna: cut and gone on with it is the uncut one; a failed trial counts as failed."""

import sys
from pathlib import Path

import pytest

from beit import search
from beit.errors import UserError

SETTINGS = {
    "space": {"a": {"low": 1e-3, "high": 1.0, "log": True}, "b": {"choices": ["x", "y z"]}},
    "direction": "minimize",
    "trials": 7,
    "startup_trials": 3,
    "seed": 5,
}


class Tries:
    """Words of each trial; trial 2 fails; the signal comes while trial `cut` runs."""

    def __init__(self, cut: int = -1) -> None:
        self.seen: dict[int, list[str]] = {}
        self.again: list[int] = []
        self.cut = cut

    def __call__(self, number: int, words: list[str], again: bool) -> float | None:
        self.seen[number] = words
        self.again += [number] if again else []
        if number in (2, self.cut):
            return None
        return abs(float(words[0].partition("=")[2]) - 0.1)

    def stopped(self) -> bool:
        return self.cut in self.seen


def test_a_search_that_was_cut_goes_on_as_if_it_had_not(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    whole, first, rest = Tries(), Tries(cut=4), Tries()
    best = search.run(SETTINGS, tmp_path / "whole", whole, stopped=whole.stopped)
    search.run(SETTINGS, tmp_path / "cut", first, stopped=first.stopped)
    assert sorted(first.seen) == [0, 1, 2, 3, 4]
    assert search.run(SETTINGS, tmp_path / "cut", rest, stopped=rest.stopped) == best
    assert rest.seen == whole.seen
    assert len({tuple(words) for words in whole.seen.values()}) == 7
    assert rest.again == [4, 5, 6]  # trial 2 failed, and stays so
    assert {words[1] for words in whole.seen.values()} <= {"b=x", "b='y z'"}
    values = [abs(float(w[0][2:]) - 0.1) for n, w in whole.seen.items() if n != 2]
    assert best == min(values)


def test_a_space_that_is_none(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    with pytest.raises(UserError, match=r"sweep\.search\.space\.a=.*expected \{low, high\}"):
        search.run(SETTINGS | {"space": {"a": {"low": 2}}}, tmp_path, Tries(), stopped=bool)


def test_without_optuna_there_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(UserError, match=r"pip install 'beit\[optuna\]'"):
        search.run(SETTINGS, tmp_path, Tries(), stopped=bool)
    assert not list(tmp_path.iterdir())

"""A search by Optuna: cut and gone on with it is the uncut one; a failed trial counts as failed."""

import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from beit import planned, search
from beit.errors import UserError
from beit.sweep import Member, Sweep

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


def test_choices_reach_a_trial_as_they_are(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    tries = Tries()
    settings = SETTINGS | {"space": {"b": {"choices": [None, True, 2, "2"]}}, "trials": 25}
    search.run(
        settings,
        tmp_path,
        lambda n, words, again: tries.seen.update({n: words}),
        stopped=tries.stopped,
    )
    assert {words[0] for words in tries.seen.values()} == {"b=null", "b=true", "b=2", "b='2'"}


def test_a_trial_that_was_killed_as_it_was_drawn_has_failed(tmp_path: Path) -> None:
    optuna = pytest.importorskip("optuna")
    whole, tries = Tries(), Tries()
    search.run(SETTINGS, tmp_path / "whole", whole, stopped=whole.stopped)
    place = tmp_path / "killed"
    place.mkdir()
    study = optuna.create_study(
        storage=f"sqlite:///{place / search.STUDY}", study_name="sweep", direction="minimize"
    )
    study.ask()  # and the process is gone
    search.run(SETTINGS, place, tries, stopped=tries.stopped)
    assert sorted(tries.seen) == [1, 2, 3, 4, 5, 6]
    assert tries.seen[1] == whole.seen[1]  # drawn at random, as a function of its number


def test_a_space_that_is_none(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    with pytest.raises(UserError, match=r"sweep\.search\.space\.a=.*expected \{low, high\}"):
        search.run(SETTINGS | {"space": {"a": {"low": 2}}}, tmp_path, Tries(), stopped=bool)


def test_without_optuna_there_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(UserError, match=r"pip install 'beit\[optuna\]'"):
        search.run(SETTINGS, tmp_path, Tries(), stopped=bool)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "other",
    [
        {"direction": "maximize"},
        {"space": SETTINGS["space"] | {"a": {"low": 1e-3, "high": 1.0}}},
        {"space": SETTINGS["space"] | {"b": {"choices": ["x"]}}},
        {"space": {"b": SETTINGS["space"]["b"]}},
        {"space": SETTINGS["space"] | {"c": {"low": 1, "high": 2}}},
    ],
)
def test_another_search_in_the_same_folder_is_refused(tmp_path: Path, other: dict) -> None:
    pytest.importorskip("optuna")
    search.run(SETTINGS | {"trials": 3}, tmp_path, Tries(), stopped=bool)
    tries = Tries()
    with pytest.raises(UserError, match=r"another search .*name="):
        search.run(SETTINGS | other, tmp_path, tries, stopped=bool)
    assert not tries.seen


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"trials": 0}, "search.trials 0"),
        ({"seed": -1}, "search.seed -1"),
        ({"startup_trials": -1}, "search.startup_trials -1"),
        ({"space": {}}, r"search\.space"),
        ({"space": {"a": 5}}, r"space\.a=5: expected"),
    ],
)
def test_numbers_that_are_none(tmp_path: Path, wrong: dict, said: str) -> None:
    pytest.importorskip("optuna")
    with pytest.raises(UserError, match=said):
        search.run(SETTINGS | wrong, tmp_path / "new", Tries(), stopped=bool)
    assert not (tmp_path / "new").exists()


def test_a_key_that_is_null_so_far_can_be_searched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("optuna")
    made, member = Sweep(["-m"]), Member(0, [], str(tmp_path / "0"))
    made.members.append(Member(-1, [], str(tmp_path)))  # nothing is run before
    monkeypatch.setattr(made, "run", lambda *_, **__: 0.5)

    def searched(key: str) -> float | None:
        space = {key: {"low": 1.0, "high": 2.0}}
        plan = {"metric": "m", "before": [], "after": [], "evaluations": {}}
        plan["search"] = SETTINGS | {"space": space, "trials": 1}
        cfg = OmegaConf.create({"sweep": plan, "seed": 0, "trainer": {"clip": None}})
        return planned.run(made, member, cfg, {})

    assert searched("trainer.clip") == 0.5
    with pytest.raises(UserError, match=r"trainer\.clap is not a key of this config"):
        searched("trainer.clap")

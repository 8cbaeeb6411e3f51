"""A search by Optuna, behind `beit train -m`.

Hydra's own plugin for it (hydra-optuna-sweeper 1.3.0) needs an Optuna before 3.0, so Optuna is
asked itself. Its study lies in the sweep's folder as a file of SQLite, and goes on with it.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from beit.data.limits import whole_number
from beit.errors import UserError
from beit.stages import word_of

STUDY = "optuna.db"
# number, words of the trial, whether one that failed is tried again -> its metric
Try = Callable[[int, list[str], bool], float | None]


def run(
    settings: dict[str, Any], folder: Path, attempt: Try, *, stopped: Callable[[], bool]
) -> float | None:
    """Try what the study asks for, until there are `trials` of them. Returns the best metric.

    A trial that failed counts as one and is not tried again. What a sampler draws for a trial is a
    function of the seed, the trial's number and the results before it: a search that was cut goes
    on as if it had not been.

    Raises UserError for a space that cannot be searched, where the folder has the study of another
    one, and where Optuna is missing.
    """
    optuna = _optuna()
    space = _checked(optuna, settings)
    folder.mkdir(parents=True, exist_ok=True)
    study = optuna.create_study(
        storage=f"sqlite:///{(folder / STUDY).absolute()}",
        study_name="sweep",
        direction=settings["direction"],
        load_if_exists=True,
    )
    _check_same(study, settings["direction"], space, folder)
    for number in range(settings["trials"]):
        if stopped():
            break
        known = study.get_trials(deepcopy=False)
        if number < len(known):
            trial = known[number]
        else:
            study.sampler = optuna.samplers.TPESampler(
                seed=_seed(settings["seed"], number), n_startup_trials=settings["startup_trials"]
            )
            trial = study.ask(space)
        finished = number < len(known) and trial.state.is_finished()
        if not finished and trial.params.keys() != space.keys():
            study.tell(number, state=optuna.trial.TrialState.FAIL)  # killed while it was drawn
            continue
        words = [f"{key}={word_of(value)}" for key, value in trial.params.items()]
        value = attempt(number, words, not finished)
        if not finished and not stopped():
            failed = None if value is not None else optuna.trial.TrialState.FAIL
            study.tell(number, value, state=failed)
    done = study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))
    return study.best_value if done else None


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise UserError(
            "this sweep is a search by Optuna, which is not installed: pip install 'beit[optuna]'"
        ) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def _checked(optuna: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """The space as distributions. Raises UserError for settings that are none."""
    for name, least in {"trials": 1, "startup_trials": 0, "seed": 0}.items():
        whole_number(f"sweep.search.{name}", settings[name], at_least=least)
    if settings["direction"] not in ("minimize", "maximize"):
        raise UserError(f"direction={settings['direction']}: expected minimize or maximize")
    if not settings["space"]:
        raise UserError("sweep.search.space is empty: give a key to search over, and its range")
    return {key: _distribution(optuna, key, node) for key, node in settings["space"].items()}


def _check_same(study: Any, direction: str, space: dict[str, Any], folder: Path) -> None:
    """Raises UserError for the study of another search: Optuna would mix the two."""
    drawn = [trial.distributions for trial in study.get_trials(deepcopy=False)]
    # nothing was drawn yet for one that was killed as it was asked for
    same = all(one == space for one in drawn if one)
    if study.direction.name.lower() != direction or not same:
        raise UserError(
            f"{folder / STUDY} is of another search (space or direction): give this sweep another "
            "name (name=...)"
        )


def _distribution(optuna: Any, key: str, node: Any) -> Any:
    """Of {choices: [...]}, or {low, high} with log or step; whole numbers stay whole."""
    try:
        node = dict(node)
        if "choices" in node:
            return optuna.distributions.CategoricalDistribution(**node)
        whole = all(type(node.get(end)) is int for end in ("low", "high"))
        kinds = optuna.distributions.IntDistribution, optuna.distributions.FloatDistribution
        return kinds[0 if whole else 1](**node)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"sweep.search.space.{key}={node}: expected {{low, high}} with log: true or a step, or "
            f"{{choices: [...]}} ({error})"
        ) from error


def _seed(seed: int, number: int) -> int:
    """A sampler of its own for each trial: one that went on would draw the same again."""
    return int(np.random.SeedSequence([seed, number]).generate_state(1)[0])

"""What a sweep runs beside its members: recipes before them, recipes and evaluations after each."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

WEIGHTS = "checkpoints/last.safetensors"  # in the folder of a run
# groups whose words reach every stage of a member: where the data are, and what runs it
_SHARED = ("data", "loader", "trainer", "logger", "job")
_SHARED_PATHS = ("paths.data_dir", "paths.runs_dir")
_READING = ("num_workers", "prefetch_factor", "timeout_seconds", "max_image_pixels", "check_images")
_OF_EVALUATION = ("data", "trainer", "paths.data_dir", *(f"loader.{key}" for key in _READING))
# what Hydra reads as null, a truth value or a number
_NO_TEXT = re.compile(r"null|true|false|[+-]?(inf|nan|[\d_.]+(e[+-]?\d+)?)", re.IGNORECASE)
ONE_DEVICE = ("trainer.devices=1", "trainer.num_nodes=1", "trainer.strategy=auto")


@dataclass(frozen=True)
class Stage:
    """One command: `beit VERB WORDS`. What it measures stands under its name."""

    name: str
    verb: str
    words: list[str] = field(default_factory=list)
    folder: str = ""  # where it is told to write


def before(plan: Mapping[str, Any], typed: Iterable[str]) -> list[Stage]:
    """Recipes that are run once, in their usual folders, or gone on with there."""
    shared = _shared(typed)
    return [
        Stage(recipe, "train", [f"experiment={recipe}", *shared, "resume=auto"])
        for recipe in plan["before"]
    ]


def after(plan: Mapping[str, Any], typed: Iterable[str], folder: Path, *, seed: int) -> list[Stage]:
    """Recipes that start from the weights of the member in `folder`, and looks at its backbone."""
    shared, weights = _shared(typed), folder / WEIGHTS
    stages = []
    for recipe in plan["after"]:
        name = recipe.rpartition("/")[2]
        own = [f"experiment={recipe}", f"seed={seed}", f"init_from={quoted(weights)}"]
        stages.append(Stage(name, "train", [*own, *shared, "resume=auto"], str(folder / name)))
    for name, settings in plan["evaluations"].items():
        place = str(folder / name)
        words = [f"checkpoint={weights}", f"evaluation={name}", f"seed={seed}"]
        words += [word for word in shared if _is_of(word, _OF_EVALUATION)]
        words += ONE_DEVICE  # however many the member is trained on
        words += [f"{key}={word_of(value)}" for key, value in (settings or {}).items()]
        words += [f"output={place}", "overwrite=true"]
        stages.append(Stage(name, "evaluate", words, place))
    return stages


def quoted(value: str | Path) -> str:
    """A text as Hydra reads it in a word, whatever is in it."""
    text = str(value)
    if re.fullmatch(r"[\w./-]+", text) and not _NO_TEXT.fullmatch(text):
        return text
    # a backslash says something only in front of a quote
    escaped = re.sub(r"(\\*)('|$)", lambda m: 2 * m[1] + ("\\'" if m[2] else ""), text)
    return f"'{escaped}'"


def word_of(value: Any) -> str:
    """A value of a config as Hydra reads it in a word: null, true, [1,2], {a:1}, 'a, b'."""
    if isinstance(value, str):
        return quoted(value)
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{word_of(one)}" for key, one in value.items()) + "}"
    if isinstance(value, Sequence):
        return "[" + ",".join(word_of(one) for one in value) + "]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def _shared(typed: Iterable[str]) -> list[str]:
    return [word for word in typed if _is_of(word, (*_SHARED, *_SHARED_PATHS))]


def _is_of(word: str, keys: Iterable[str]) -> bool:
    key = word.lstrip("+~").partition("=")[0]
    return any(key == one or key.startswith(f"{one}.") for one in keys)

"""Rules of single parts of a training config, told before anything is built.

They see plain dicts, in which an interpolation may stand as its text `${...}`.
"""

import math
import re
from collections.abc import Iterable
from typing import Any

from beit.errors import UserError
from beit.memory import free_memory
from beit.nearest import did_you_mean

_IMAGES = ("train", "val", "num_classes", "name", "repo", "classes")
# nodes without a `_target_`, and the keys in them that tasks read
GROUPS = {
    "data": _IMAGES,
    "labelled": _IMAGES,
    "normalize": ("mean", "std"),
    "views": ("train", "eval"),
    "head": ("main", "auxiliary"),
}
OBJECTS = (
    *("task", "datamodule", "trainer", "job", "loader"),
    *("model", "tokenizer", "masking", "pyramid", "inference", "optim"),
)
OBJECTS_BELOW = {
    "data": ("train", "val"),
    "labelled": ("train", "val"),
    "views": ("train", "eval"),
    "head": ("main",),
}
# keys of the root that a task's config refers to, or that would do nothing
READ_BY = {
    "views_per_image": "task=mim",
    "token_cache": "task=mim",
    "labels_per_class": "task=classification and task=linear_probe",
    "labelled_images": "task=segmentation",
}
COLLECTIONS = ("callbacks", "logger")  # objects under names of the user's choice

LEAST = {
    "num_nodes": 1,
    "log_every_n_steps": 1,
    "check_val_every_n_epoch": 1,
    "gradient_clip_val": 0,
}
LARGEST_SEED = 2**32 - 1  # numpy's


def check_root(config: dict[str, Any], known: Iterable[str]) -> None:
    """Raises UserError for a key that no training config has."""
    for key in sorted(set(config) - set(known)):
        hint = did_you_mean(key, known, otherwise="see beit train --help")
        raise UserError(f"{key} is not a key of a training config: {hint}")


def check_missing(missing: list[str]) -> None:
    """Raises UserError that names every key without a value."""
    if len(missing) == 1:
        raise UserError(f"{missing[0]} has no value: give it, as in {missing[0]}=VALUE")
    if missing:
        keys = f"{', '.join(missing[:-1])} and {missing[-1]}"
        raise UserError(f"{keys} have no value: give them, as in {missing[0]}=VALUE")


def check_read(config: dict[str, Any], defaults: Any) -> None:
    """Raises UserError for a key of another task, which nothing here would read."""
    read = set(re.findall(r"\$\{(\w+)", str(config)))
    for key, tasks in READ_BY.items():
        if key not in read and config[key] != getattr(defaults, key):
            name = config["task_name"]
            raise UserError(f"{key}={config[key]} is of {tasks} alone, and this is {name}")


def check_groups(config: dict[str, Any]) -> None:
    """Raises UserError for keys that nothing reads, and for what names no class."""
    read = set(re.findall(r"\$\{(\w+\.\w+)", str(config)))
    for group, known in GROUPS.items():
        node = config.get(group)
        if not isinstance(node, dict) or "_target_" in node:
            continue
        for key in node:
            if key not in known and f"{group}.{key}" not in read:
                hint = did_you_mean(f"{group}.{key}", [f"{group}.{name}" for name in known])
                raise UserError(f"{group}.{key} is not a key of a training config: {hint}")
        for key in OBJECTS_BELOW.get(group, ()):
            _check_object(f"{group}.{key}", node.get(key), {})
    for group in OBJECTS:
        _check_object(group, config.get(group), {})
    for group in COLLECTIONS:
        for key, value in (config.get(group) or {}).items():
            _check_object(f"{group}.{key}", value, config[group])


def _check_object(key: str, value: Any, siblings: dict[str, Any]) -> None:
    if value is None or (isinstance(value, str) and value.startswith("${")):
        return
    if _names_class(value):
        return
    group = key.rpartition(".")[0]
    others = [f"{group}.{other}" for other, node in siblings.items() if _names_class(node)]
    hint = did_you_mean(key, others, otherwise="expected a node that says its class, or null")
    raise UserError(f"{key} has no _target_: {hint}")


def _names_class(node: Any) -> bool:
    return isinstance(node, dict) and "_target_" in node


def check_normalize(node: dict[str, Any]) -> None:
    """Raises UserError for what is not a number for each channel."""
    for key, least in (("mean", -math.inf), ("std", 0)):
        values = node.get(key)
        numbers = values if isinstance(values, list) else []
        fits = [isinstance(number, (int, float)) and number > least for number in numbers]
        if len(fits) != 3 or not all(fits):
            positive = "positive " if key == "std" else ""
            raise UserError(f"normalize.{key}={values}: expected three {positive}numbers, RGB")


def check_trainer(trainer: dict[str, Any]) -> None:
    """Raises UserError for numbers that Lightning takes and only fails on, or ignores, later."""
    for name, least in LEAST.items():
        value = trainer.get(name)
        if value is not None and value < least:
            raise UserError(f"trainer.{name}={value}: expected at least {least}, or null")
    for name in ("max_epochs", "max_steps"):
        value = trainer.get(name)
        if value is not None and (value == 0 or value < -1):
            raise UserError(f"trainer.{name}={value}: expected a positive whole number")
    if not any((trainer.get(name) or -1) > 0 for name in ("max_epochs", "max_steps")):
        raise UserError("trainer.max_epochs and trainer.max_steps are both -1: give one of them")
    for name in ("limit_train_batches", "limit_val_batches"):
        _check_limit(name, trainer.get(name), least=1 if "train" in name else 0)


def _check_limit(name: str, value: float | None, *, least: int) -> None:
    if value is None:
        return
    wrong = value < least if isinstance(value, int) else not 0 <= value <= 1
    if wrong or (least and value == 0):
        raise UserError(
            f"trainer.{name}={value}: expected a number of batches from {least}, or a share of "
            "them with a decimal point, up to 1.0"
        )


def check_seed(seed: int) -> None:
    if not 0 <= seed <= LARGEST_SEED:
        raise UserError(f"seed={seed}: expected a whole number from 0 to {LARGEST_SEED}")


def check_positions(model: dict[str, Any], num_tokens: int) -> None:
    """Raises UserError for images so large that a network for them cannot even be built."""
    needed = 8 * num_tokens**2  # which entry of the bias table belongs to which pair of tokens
    free = free_memory() if needed > 2**30 else None
    if model.get("relative_position", "none") != "none" and free is not None and needed > free:
        raise UserError(
            f"model.image_size={model['image_size']}: the relative positions of {num_tokens:,} "
            f"tokens take {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB of memory are free: "
            "choose a smaller image_size (segmentation sees larger images in windows)"
        )


def check_channels(channels: int) -> None:
    if channels != 3:
        raise UserError(f"model.in_channels={channels}: images are read as RGB, expected 3")

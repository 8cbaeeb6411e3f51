"""The words of a command: which are settings of the verb's own, flags of Hydra's, or mistakes."""

import os
from collections.abc import Iterable, Sequence
from typing import TextIO

from beit.errors import UserError

# Hydra's flags that make sense here, and whether a value follows
_FLAGS = {
    "-m": False,
    "--multirun": False,
    "--resolve": False,
    "--cfg": True,
    "-c": True,
    "--package": True,
    "-p": True,
    "--config-dir": True,
    "-cd": True,
}
_KINDS = ("job", "hydra", "all")  # of --cfg


def asks_help(arguments: Iterable[str]) -> bool:
    return any(word in ("-h", "--help") for word in arguments)


def is_sweep(arguments: Iterable[str]) -> bool:
    return any(word in ("-m", "--multirun") for word in arguments)


def split_flags(arguments: Iterable[str]) -> tuple[list[str], list[str]]:
    """The words and the flags: Hydra understands words only before the flags.

    Raises UserError for a flag that train does not have, or without its value.
    """
    from beit.nearest import did_you_mean

    words: list[str] = []
    flags: list[str] = []
    waiting = iter(arguments)
    for argument in waiting:
        name, equals, value = argument.partition("=")
        if not argument.startswith("-"):
            words.append(argument)
        elif name not in _FLAGS or (equals and not _FLAGS[name]):
            raise UserError(f"{argument} is not a flag of train: {did_you_mean(name, _FLAGS)}")
        elif not _FLAGS[name]:
            flags.append(name)
        else:
            flags += [name, _value_of(name, value if equals else next(waiting, ""))]
    return words, flags


def _value_of(flag: str, value: str) -> str:
    kinds = _KINDS if flag in ("--cfg", "-c") else ()
    if not value or value.startswith("-") or (kinds and value not in kinds):
        expected = "job, hydra or all" if kinds else "a value after it"
        raise UserError(f"{flag} {value}".rstrip() + f": expected {expected}")
    return value


def split(arguments: Iterable[str], own: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """The verb's own KEY=VALUE settings, and the rest. Raises UserError for other words."""
    settings, rest = {}, []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals:
            raise UserError(f"{argument!r} is not of the form KEY=VALUE")
        if key in own:
            settings[key] = value
        else:
            rest.append(argument)
    return settings, rest


def split_all(
    arguments: Iterable[str], own: Sequence[str], verb: str, usage: str
) -> dict[str, str]:
    """The settings of a verb that has no others. Raises UserError for other words."""
    return split_known(arguments, own, (), verb, usage)[0]


def split_known(
    arguments: Iterable[str], own: Sequence[str], groups: Sequence[str], verb: str, usage: str
) -> tuple[dict[str, str], list[str]]:
    """The verb's own settings, and words of these groups. Raises UserError for other words."""
    settings, rest = split(arguments, own)
    for word in rest:
        if word.partition("=")[0].partition(".")[0] not in groups:
            raise UserError(f"{word!r} is not a setting of {verb}: expected {usage}")
    return settings, rest


def required(settings: dict[str, str], key: str) -> str:
    if not settings.get(key):
        raise UserError(f"{key} has no value: give it, as in {key}=PATH")
    return settings[key]


def whole_number(settings: dict[str, str], key: str, default: int = 0) -> int:
    value = settings.get(key, str(default))
    if not value.isdigit() or int(value) < 1:
        raise UserError(f"{key}={value}: expected a whole number of at least 1")
    return int(value)


def whole_numbers(settings: dict[str, str], key: str) -> list[int]:
    parts = settings[key].split(",")
    if not all(part.isdigit() and len(part) < 10 for part in parts):
        raise UserError(f"{key}={settings[key]}: expected whole numbers with commas between them")
    return [int(part) for part in parts]


def flag(settings: dict[str, str], key: str) -> bool:
    value = settings.get(key, "false").lower()
    if value not in ("true", "false"):
        raise UserError(f"{key}={settings[key]}: expected true or false")
    return value == "true"


def small_number(settings: dict[str, str], key: str) -> float:
    try:
        value = float(settings[key])
    except ValueError:
        value = 0.0
    if not 0 < value < 1:
        raise UserError(f"{key}={settings[key]}: expected a number between 0 and 1")
    return value


def lines_of(settings: dict[str, str], key: str) -> list[str]:
    """The lines of the text file that a setting names."""
    try:
        with open(settings[key], encoding="utf-8") as file:
            return file.read().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{key}={settings[key]} cannot be read as text: {error}") from error


def new_file(settings: dict[str, str], key: str) -> str | None:
    """The name of a file that is to be made. Raises UserError where there is one."""
    if (path := settings.get(key)) and os.path.exists(path):
        raise UserError(f"{key}={path} exists already: give another name or remove it")
    return path


def sink(output: str | None) -> TextIO:
    """Where a verb prints to: a file that is made for it, else stdout."""
    if not output:
        return os.fdopen(os.dup(1), "w")
    try:
        return open(output, "x", encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"output={output} cannot be written ({error.strerror}): choose another file"
        ) from error

"""Values out of a foreign file's plain data, each of the type that is expected there."""

import json
import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

from beit.errors import UserError
from beit.printable import printable

_MISSING: Any = object()
LIMIT = 64 * 2**20  # bytes of a config; one with 22,000 class names has about 2 MB
LARGEST = 10**6  # of a size, in whatever unit


class Fields:
    """A dict that somebody else wrote; `where` is its file, for the messages."""

    def __init__(self, content: Any, where: Any) -> None:
        if not isinstance(content, dict):
            raise UserError(f"{where}: expected an object with keys, found {_shown(content)}")
        self.content = content
        self.where = where

    @classmethod
    def read(cls, path: Path) -> "Fields":
        """A JSON file. Raises UserError for one that is missing, damaged or far too large."""
        try:
            if path.stat().st_size > LIMIT:
                raise UserError(f"{path} has more than {LIMIT} bytes: that is no config")
            return cls(json.loads(path.read_text(encoding="utf-8")), path)
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror})") from error
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{path} is damaged: it is no JSON ({printable(str(error))})"
            ) from error

    def __contains__(self, key: str) -> bool:
        return self.content.get(key) is not None

    def inner(self, key: str) -> "Fields":
        """A dict within, empty where there is none."""
        return Fields(self.content.get(key) or {}, self.where)

    def whole(self, key: str, default: int = _MISSING, at_least: int = 1) -> int:
        value = self._value(key, default)
        if type(value) is not int or not at_least <= value <= LARGEST:
            raise self.wrong(key, f"a whole number of at least {at_least}")
        return value

    def number(
        self, key: str, default: float = _MISSING, low: float = 0.0, high: float = 1.0
    ) -> float:
        value = self._value(key, default)
        if type(value) not in (int, float) or not (math.isfinite(value) and low <= value <= high):
            raise self.wrong(key, f"a number from {low:g} to {high:g}")
        return float(value)

    def flag(self, key: str, default: bool = _MISSING) -> bool:
        value = self._value(key, default)
        if type(value) is not bool:
            raise self.wrong(key, "true or false")
        return value

    def word(self, key: str, choices: Collection[str], default: str = _MISSING) -> str:
        value = self._value(key, default)
        if value not in choices:
            raise self.wrong(key, f"one of {', '.join(choices)}")
        return value

    def numbers(self, key: str, default: tuple[float, ...] = _MISSING) -> tuple[float, ...]:
        value = self._value(key, default)
        good = isinstance(value, list | tuple) and 0 < len(value) < 100
        if not good or any(type(v) not in (int, float) or not math.isfinite(v) for v in value):
            raise self.wrong(key, "a list of numbers")
        return tuple(float(v) for v in value)

    def wholes(self, key: str, default: tuple[int, ...] = _MISSING) -> tuple[int, ...]:
        """A few whole numbers from 0 on."""
        value = self._value(key, default)
        good = isinstance(value, list | tuple) and 0 < len(value) < 100
        if not good or any(type(v) is not int or not 0 <= v <= LARGEST for v in value):
            raise self.wrong(key, "a list of whole numbers of at least 0")
        return tuple(value)

    def several(self, key: str) -> list["Fields"]:
        """A list of dicts, empty where there is none."""
        value = self.content.get(key) or []
        if not isinstance(value, list | tuple):
            raise self.wrong(key, "a list of objects")
        return [Fields(item, self.where) for item in value]

    def size(self, key: str, default: Any = _MISSING) -> tuple[int, int]:
        """(height, width) of one number, a pair, or {"height", "width"}."""
        value = self._value(key, default)
        if isinstance(value, dict):
            value = [value.get("height"), value.get("width")]
        sides = list(value) if isinstance(value, list | tuple) else [value, value]
        if len(sides) != 2 or any(type(s) is not int or not 0 < s <= LARGEST for s in sides):
            raise self.wrong(key, "one size in pixels, or height and width")
        return sides[0], sides[1]

    def names(self, key: str) -> list[str] | None:
        """A list of names, or a dict from number to name with every number from 0 on."""
        value = self.content.get(key)
        if value is None:
            return None
        if isinstance(value, dict):
            numbered = {int(k): v for k, v in value.items() if str(k).isdecimal() and len(k) < 9}
            if sorted(numbered) != list(range(len(value))):
                raise self.wrong(key, "a name for each of 0, 1, 2, ...")
            value = [numbered[i] for i in range(len(value))]
        if not isinstance(value, list | tuple) or not all(isinstance(name, str) for name in value):
            raise self.wrong(key, "a list of names")
        return list(value)

    def wrong(self, key: str, expected: str) -> UserError:
        return UserError(
            f"{self.where}: {key} is {_shown(self.content.get(key))}; expected {expected}"
        )

    def _value(self, key: str, default: Any) -> Any:
        value = self.content.get(key)
        if value is None and default is _MISSING:
            raise UserError(f"{self.where} has no {key}")
        return default if value is None else value


def _shown(value: Any) -> str:
    return printable(repr(value), limit=80)

"""Whether a value out of a config file can be what a constructor's annotation says.

Only plain data are judged: numbers, text, lists, dicts. Where an annotation says more than can be
told from those, everything is accepted.
"""

import inspect
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

_UNIONS = (Union, types.UnionType)
_WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    Path: "a path",
    type(None): "null",
}


def annotations(target: Callable[..., Any]) -> dict[str, Any]:
    """Argument -> annotation; empty where they cannot be evaluated."""
    function = target.__init__ if isinstance(target, type) else target  # type: ignore[misc]
    try:
        return get_type_hints(function)
    except (NameError, TypeError, AttributeError):  # names imported for type checkers alone
        return {}


def accepts(annotation: Any, value: Any) -> bool:
    """Whether `value` (None, a number, text, a list or a dict) may stand there.

    A dict with a `_target_` stands for an object, which may be anything.
    """
    if isinstance(value, dict) and "_target_" in value:
        return True
    if annotation is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if annotation in (bool, type(None)):
        return isinstance(value, annotation)
    if annotation in (str, Path):
        return isinstance(value, str)
    if get_origin(annotation) is Literal:
        options = get_args(annotation)
        return any(type(value) is type(option) and value == option for option in options)
    if get_origin(annotation) in _UNIONS:
        return any(accepts(kind, value) for kind in get_args(annotation))
    if get_origin(annotation) in (list, Sequence, tuple):
        return isinstance(value, list) and _accepts_items(annotation, value)
    if get_origin(annotation) in (dict, Mapping):
        return isinstance(value, dict)
    # an object of ours is nothing that a file can hold
    return not (inspect.isclass(annotation) and annotation.__module__.startswith("beit."))


def expectation(annotation: Any) -> str:
    """What the annotation asks for, in words: `a whole number or null`."""
    if get_origin(annotation) in _UNIONS:
        plain = [kind for kind in get_args(annotation) if get_origin(kind) is not Literal]
        words = [expectation(kind) for kind in plain]
        if options := literals(annotation):
            words.insert(0, _one_of(options))
        return " or ".join(dict.fromkeys(words))
    if get_origin(annotation) is Literal:
        return _one_of(literals(annotation))
    if get_origin(annotation) in (list, Sequence, tuple):
        kinds = get_args(annotation)
        if get_origin(annotation) is tuple and Ellipsis not in kinds:
            return f"a list of {len(kinds)}"
        return "a list"
    if get_origin(annotation) in (dict, Mapping):
        return "a mapping"
    if annotation in _WORDS:
        return _WORDS[annotation]
    return f"a node whose _target_ makes a kind of {getattr(annotation, '__name__', annotation)}"


def literals(annotation: Any) -> list[str]:
    """The values that the annotation lists, where it lists any."""
    if get_origin(annotation) in _UNIONS:
        return [word for kind in get_args(annotation) for word in literals(kind)]
    if get_origin(annotation) is Literal:
        return [str(option) for option in get_args(annotation)]
    return []


def _one_of(options: list[str]) -> str:
    return f"one of {', '.join(dict.fromkeys(options))}"


def _accepts_items(annotation: Any, items: list[Any]) -> bool:
    kinds = get_args(annotation)
    if get_origin(annotation) is tuple and Ellipsis not in kinds:
        fits = len(items) == len(kinds)
        return fits and all(accepts(kind, item) for kind, item in zip(kinds, items))
    return not kinds or all(accepts(kinds[0], item) for item in items)

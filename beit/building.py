"""From nodes of the config to objects: what a `_target_` may name, what its constructor takes.

Names of arguments can be checked before anything is resolved, their values before anything is
built. What only the constructor finds out is told with the key that the user would change.
"""

import inspect
import re
from collections.abc import Callable
from typing import Any

import hydra.utils
from hydra.errors import InstantiationException
from omegaconf import OmegaConf

from beit.annotations import accepts, annotations, expectation, literals
from beit.errors import UserError
from beit.nearest import did_you_mean
from beit.security import targets

Place = tuple[str | int, ...]  # keys and indices that lead from a node to a value below it


def instantiate(node: Any, **extra: Any) -> Any:
    """Build the object that a node's `_target_` names, once every target in it is allowed.

    Raises UserError where a target is not allowed, does not exist, or refuses its arguments. What
    goes wrong in the program itself is raised as it is.
    """
    if isinstance(node, dict):
        _check_resolved(node)  # out of a checkpoint, say: nothing in it is looked up
        node = OmegaConf.create(node)
    # Hydra itself cannot resolve an interpolation into a list
    content: Any = OmegaConf.to_container(node, resolve=True, throw_on_missing=True)
    _check_resolved(content)
    check_arguments(content, lambda place: located(node, place), extra=tuple(extra))
    check_values(content, lambda place: located(node, place))
    try:
        return hydra.utils.instantiate(content, _convert_="all", **extra)
    except InstantiationException as error:
        cause = error.__cause__
        mistake = _explained(error, node, content)
        if mistake is None and cause is not None:
            raise cause from cause.__cause__
        raise mistake or error from cause


def check_arguments(
    content: Any, where: Callable[[Place], str], extra: tuple[str, ...] = ()
) -> None:
    """Raises UserError for a target that is not allowed or unknown, and for unknown arguments.

    Args:
        content: dicts, lists and scalars; interpolations may stand in it as text.
        where: the key of what stands at a place, as the user knows it.
        extra: arguments that the root's constructor gets besides.
    """
    targets.check_nodes(content, where)  # all of them before the first is imported
    for place, node in targets.nodes(content):
        known = _parameters(targets.resolve(node["_target_"], where((*place, "_target_"))))
        given = [key for key in node if not key.startswith("_")]
        for name in given if place else [*given, *extra]:
            if known is not None and name not in known:
                hint = did_you_mean(name, known)
                owner = str(node["_target_"]).rpartition(".")[2]
                raise UserError(f"{where((*place, name))} is not an argument of {owner}: {hint}")


def check_values(content: Any, where: Callable[[Place], str]) -> None:
    """Raises UserError for a value that is not of the type its constructor declares."""
    for place, node in targets.nodes(content):
        target = targets.resolve(node["_target_"])
        declared, parameters = annotations(target), _parameters(target) or {}
        for name, value in node.items():
            if name not in declared or name not in parameters:
                continue
            if value is None and parameters[name].default is None:
                continue  # `argument: int = None`
            if accepts(declared[name], value):
                continue
            hint = did_you_mean(str(value), literals(declared[name]), otherwise=" ")
            expected = f"expected {expectation(declared[name])}; {hint}".rstrip("; ")
            raise UserError(f"{where((*place, name))}={shown(value)}: {expected}")


def located(node: Any, place: Place) -> str:
    """The key, in the whole config, of what stands at `place` below `node`.

    `task.backbone.width` is `model.width` where `task.backbone` is `${model}`.
    """
    for part in place[:-1]:
        node = node[part]  # what an interpolation leads to, in its own place
    if not place:
        return node._get_full_key(None) if OmegaConf.is_config(node) else ""
    last = place[-1]
    there = last in node if OmegaConf.is_dict(node) else OmegaConf.is_list(node)
    if there and OmegaConf.is_interpolation(node, last):
        texts: Any = OmegaConf.to_container(node, resolve=False)
        if found := re.fullmatch(r"\$\{([\w.]+)\}", texts[last]):
            return found[1]
    return node._get_full_key(last)


def shown(value: Any) -> str:
    """A value as one would type it."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _check_resolved(content: Any) -> None:
    """An escaped interpolation is refused: Hydra would resolve it after the checks."""
    if isinstance(content, str) and "${" in content:
        raise UserError(f"{content}: a value that is built from may not hold an interpolation")
    if isinstance(content, dict):
        content = list(content.values())
    for value in content if isinstance(content, list) else ():
        _check_resolved(value)


def _parameters(target: Callable[..., Any]) -> dict[str, inspect.Parameter] | None:
    """The arguments that have a name; None where any is taken, or none can be told."""
    try:
        parameters = inspect.signature(target).parameters
    except (TypeError, ValueError):  # a builtin without a signature
        return None
    kinds = {parameter.kind for parameter in parameters.values()}
    return None if inspect.Parameter.VAR_KEYWORD in kinds else dict(parameters)


def _explained(error: InstantiationException, node: Any, content: Any) -> UserError | None:
    """What a constructor found wrong, with its key; None for a fault of the program."""
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    cause = error.__cause__
    if cause is None:
        return UserError(" ".join(str(error).split()))
    refusals = (ValueError, TypeError, RuntimeError, AssertionError, ImportError)
    if not isinstance(cause, (*refusals, MisconfigurationException)) or _is_fault(cause):
        return None
    place, content = _failed(str(error), content)
    text = " ".join(str(cause).split()) or type(cause).__name__
    key = located(node, place)
    if not isinstance(cause, UserError):
        key = _blamed(text, content, key, lambda name: located(node, (*place, name)))
    return UserError(f"{key}: {text}" if key else text)


def _failed(message: str, content: Any) -> tuple[Place, Any]:
    """The node that Hydra speaks of, and its place: as near as the message can be followed."""
    found = re.search(r"full_key: (\S+)\s*$", message)
    place: list[str | int] = []
    for part in re.findall(r"[^.\[\]]+", found[1]) if found else ():
        if isinstance(content, dict) and part not in content:
            # of a.b[0].c the key is written so, but of a.b[0] itself it is a.b0
            name = part.rstrip("0123456789")
            steps: list[str | int] = [name, int(part[len(name) :])]
        else:
            steps = [int(part) if isinstance(content, list) else part]
        for step in steps:
            content = content[step]
        place += steps
    return tuple(place), content


def _is_fault(cause: BaseException) -> bool:
    """Values are checked against their types before: our own code has no excuse for a TypeError."""
    trace = cause.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    raised_in = trace.tb_frame.f_globals.get("__name__", "") if trace is not None else ""
    return isinstance(cause, (TypeError, AssertionError)) and raised_in.startswith("beit.")


def _blamed(text: str, content: dict[str, Any], key: str, where: Callable[[str], str]) -> str:
    """`key=value` of the argument that the text speaks of, else the node with all of them."""
    values = {
        key: shown(value)
        for key, value in content.items()
        if not key.startswith("_") and not isinstance(value, dict)
    }
    words = set(re.findall(r"[\w-]+", text))
    by_name = [name for name in values if name in words]
    by_text = [n for n in values if isinstance(content[n], str) and content[n] in words]
    for names in (by_name, by_text):
        if len(names) == 1:
            return f"{where(names[0])}={values[names[0]]}"
    return f"{key or content['_target_']}({', '.join(f'{k}={v}' for k, v in values.items())})"

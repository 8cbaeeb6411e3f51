"""Limits of what is read as configuration: small files, no deep nests, no aliases that explode.

YAML's aliases and OmegaConf's interpolations both let a few hundred bytes stand for gigabytes.
What a text stands for is counted before it is built.
"""

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import omegaconf._utils
import omegaconf.basecontainer
import yaml

from beit.errors import UserError

MAX_BYTES = 256 * 1024  # of one YAML file; the largest shipped one has 2 KiB
MAX_NODES = 20_000  # of one YAML file, every alias counted as what it stands for
MAX_DEPTH = 40
MAX_WORD = 32 * 1024  # characters of one KEY=VALUE; a list of 1,000 class names fits
MAX_RESOLVED = 2_000_000  # characters and nodes of a config with its interpolations filled in

_plain_loader = omegaconf._utils.get_yaml_loader


class BoundedLoader(_plain_loader()):  # type: ignore[misc]
    """OmegaConf's YAML loader, which refuses a document beyond the limits with a UserError."""

    def __init__(self, stream: Any) -> None:
        text = stream if isinstance(stream, str | bytes) else stream.read(MAX_BYTES + 1)
        self.source = str(getattr(stream, "name", "a YAML text"))
        if len(text) > MAX_BYTES:
            raise UserError(f"{self.source} has more than {MAX_BYTES // 1024} KiB of YAML")
        self.sizes: dict[int, int] = {}
        self.levels = 0
        super().__init__(text)
        # the readers' messages name it
        self.name = self.source

    def compose_node(self, parent: Any, index: Any) -> Any:
        alias = self.check_event(yaml.AliasEvent)
        self.levels += 1
        if self.levels > MAX_DEPTH:
            raise UserError(f"{self.source} is nested more than {MAX_DEPTH} levels deep")
        node = super().compose_node(parent, index)
        self.levels -= 1
        if alias and id(node) not in self.sizes:
            raise UserError(f"{self.source} has an alias of what it stands in")
        if not alias:
            self.sizes[id(node)] = 1 + sum(self.sizes.get(id(n), 1) for n in _below(node))
        if self.sizes[id(node)] > MAX_NODES:
            raise UserError(
                f"{self.source} stands for more than {MAX_NODES} values: an alias in it "
                "repeats what repeats others"
            )
        return node

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep=deep)
        except (ValueError, OverflowError, RecursionError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{self.source}: a value cannot be read: {error}") from error

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        content = super().construct_mapping(node, deep=deep)
        if not all(isinstance(key, str | int | float | bool) for key in content):
            raise UserError(f"{self.source} has a key that is no text")
        return content


# Path objects and the like: a config is plain data
BoundedLoader.yaml_constructors = {
    tag: function
    for tag, function in BoundedLoader.yaml_constructors.items()
    if tag is None or "python/" not in tag
}


def _below(node: Any) -> list[Any]:
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return node.value if isinstance(node, yaml.SequenceNode) else []


@contextlib.contextmanager
def bounded_yaml() -> Iterator[None]:
    """Within it, OmegaConf and Hydra read YAML through `BoundedLoader`."""
    places: list[Any] = [omegaconf._utils, omegaconf.basecontainer]
    before = [place.get_yaml_loader for place in places]
    for place in places:
        place.get_yaml_loader = lambda: BoundedLoader
    try:
        yield
    finally:
        for place, loader in zip(places, before):
            place.get_yaml_loader = loader


def check_word(word: str) -> None:
    """Raises UserError for a word of the command line that is too long or nested too deep."""
    key = word.partition("=")[0][:80]
    if len(word) > MAX_WORD:
        raise UserError(f"{key}: a value of more than {MAX_WORD // 1024} KiB; put it into a file")
    depth = 0
    for character in word:
        depth += (character in "[{(") - (character in "]})")
        if depth > MAX_DEPTH:
            raise UserError(f"{key}: a value nested more than {MAX_DEPTH} levels deep")


def check_plain(content: object) -> None:
    """Raises UserError for plain data that is no dict of strings, too large or nested too deep."""
    if not isinstance(content, dict):
        raise UserError(f"the config is {type(content).__name__}, expected a mapping")
    left: list[Any] = [content]
    level, nodes = 0, 0
    while left:
        level, nodes = level + 1, nodes + len(left)
        if level > MAX_DEPTH or nodes > MAX_NODES:
            raise UserError("the config is nested too deep, or too large")
        below: list[Any] = []
        for one in left:
            if isinstance(one, dict):
                if not all(isinstance(key, str) for key in one):
                    raise UserError("the config has a key that is no text")
                below += one.values()
            elif isinstance(one, list | tuple):
                below += one
        left = below


_REFERENCE = re.compile(r"(\.*)(?<!\w)([A-Za-z_]\w*(?:\.\w+|\[\w+\])*)")


def check_resolved_size(content: dict[str, Any]) -> None:
    """Raises UserError where filling in the interpolations would make a config enormous.

    Args:
        content: plain data, interpolations as text. What looks like the name of a key within
            `${...}` counts as that key's value: more than will be there, never less.
    """
    known: dict[Place, int] = {}
    open_places: set[Place] = set()

    def size(value: Any, place: Place, depth: int) -> int:
        if depth > 3 * MAX_DEPTH:
            raise UserError(f"{_dotted(place)}: nested, or referring on, too many levels deep")
        if isinstance(value, dict):
            total = 1 + sum(size(v, (*place, str(k)), depth + 1) for k, v in value.items())
        elif isinstance(value, list):
            total = 1 + sum(size(v, (*place, str(i)), depth + 1) for i, v in enumerate(value))
        else:
            text = value if isinstance(value, str) else ""
            total = 1 + len(text) + sum(of(other, depth) for other in _references(text, place))
        if total > MAX_RESOLVED:
            raise UserError(
                f"{_dotted(place)}: its interpolations stand for more than {MAX_RESOLVED} "
                "characters and values"
            )
        return total

    def of(place: Place, depth: int) -> int:
        if place not in known and place not in open_places:
            open_places.add(place)
            found, there = _select(content, place)
            known[place] = size(found, place, depth + 1) if there else 0
            open_places.discard(place)
        return known.get(place, 0)

    size(content, (), 0)


Place = tuple[str, ...]


def _dotted(place: Place) -> str:
    return ".".join(place)[:200] or "the config"


def _references(text: str, place: Place) -> Iterator[Place]:
    """The keys that a text may refer to; `..x` is one of a parent's."""
    for dots, name in _REFERENCE.findall(text) if "${" in text else ():
        base = place[: max(0, len(place) - len(dots))] if dots else ()
        yield (*base, *re.findall(r"\w+", name))


def _select(content: Any, place: Place) -> tuple[Any, bool]:
    for part in place:
        if isinstance(content, dict) and part in content:
            content = content[part]
        elif isinstance(content, list) and part.isdigit() and int(part) < len(content):
            content = content[int(part)]
        else:
            return None, False
    return content, True

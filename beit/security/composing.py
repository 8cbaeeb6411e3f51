"""What a composed config may hold besides the keys of a run: interpolations, and Hydra's own node.

Hydra builds objects, makes folders, sets variables and configures logging from its node before the
program sees anything. `vetted` looks at every config as soon as it is composed, the members of a
sweep too, and before Hydra goes on.
"""

import contextlib
import re
from collections.abc import Callable, Collection, Iterator
from typing import Any

import yaml
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from beit.errors import UserError
from beit.security import folders, limits, secrets, targets

# resolvers that read no file and run nothing; oc.decode, oc.create and oc.deprecated make text into
# nodes after the checks, a key put together while it is read cannot be checked at all
PURE = frozenset(
    {"grid", "token_size", "window_stride", "tapped_blocks", "checkpoint_value", "oc.select"}
)
COMPOSED = PURE | {"now", "oc.env", "hydra"}
_RESOLVER = re.compile(r"\$\{\s*([\w.]+)\s*:")
_DYNAMIC = re.compile(r"\$\{[^:}]*\$\{|\$\{\s*(?:oc\.select|hydra)\s*:[^,}]*\$\{")

# what Hydra's node must be: each of these reaches code, files or the environment
FIXED: dict[str, Any] = {
    "run.dir": ".",
    "output_subdir": None,
    "job.chdir": False,
    "job.env_set": {},
    "job.env_copy": [],
    "callbacks": {},
    "job_logging.root": None,
    "hydra_logging.root": None,
}
# Hydra's own, and the arguments that a config may give them: they build what nests in others
PLUGINS: dict[str, tuple[str, frozenset[str]]] = {
    "launcher": ("hydra._internal.core_plugins.basic_launcher.BasicLauncher", frozenset()),
    "sweeper": (
        "hydra._internal.core_plugins.basic_sweeper.BasicSweeper",
        frozenset({"max_batch_size", "params"}),
    ),
}
SUBDIR = "${hydra.job.num}"  # of a sweep's member, within the sweep's folder


def check_interpolations(content: Any, allowed: frozenset[str]) -> None:
    """Raises UserError for a resolver that is not allowed, and for keys that are put together."""
    for text in _strings(content):
        if "${" not in text:
            continue
        for name in _RESOLVER.findall(text):
            if name not in allowed:
                raise UserError(
                    f"{text[:100]}: the resolver {name} is not allowed here; there are "
                    f"{', '.join(sorted(allowed))}"
                )
        if _DYNAMIC.search(text):
            raise UserError(f"{text[:100]}: an interpolation inside the name of a key")


def _strings(content: Any) -> Iterator[str]:
    if isinstance(content, dict):
        for key, value in content.items():
            yield from _strings(str(key))
            yield from _strings(value)
    elif isinstance(content, list | tuple):
        for value in content:
            yield from _strings(value)
    elif isinstance(content, str):
        yield content


def check_words(words: list[str]) -> None:
    """Raises UserError for words that Hydra would act on before there is a config to look at."""
    for word in words:
        limits.check_word(word)
        key, _, value = word.lstrip("+~").replace("\\", "").partition("=")
        if key == "trust":
            raise UserError(f"{word}: trust is a word of the command line, not of a config")
        if key.startswith("hydra.searchpath") and re.search(r"\b(?!file:)\w+://", value):
            raise UserError(
                f"{word}: only folders (file://) may be searched for configs; a package is code"
            )


def check_hydra(node: dict[str, Any], words: list[str]) -> None:
    """Raises UserError for what Hydra's own node may not say.

    Args:
        node: plain data, interpolations as text.
        words: what the user typed; a config that brings words of its own is refused.
    """
    for key, expected in FIXED.items():
        value: Any = node
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if value != expected and (value or expected):
            raise UserError(f"hydra.{key} may not be set: beit keeps its own value")
    for key in ("job_logging", "hydra_logging"):
        if strange := set(node.get(key) or ()) - {"version", "root", "disable_existing_loggers"}:
            raise UserError(f"hydra.{key}.{min(strange)} may not be set: beit logs by itself")
    for kind in PLUGINS:
        _check_plugin(kind, node.get(kind) or {})
    if node.get("mode") is not None and not any(word.startswith("hydra.mode=") for word in words):
        raise UserError("hydra.mode may not be set by a config: say beit train -m for a sweep")
    if node.get("sweep", {}).get("subdir") not in (SUBDIR, None):
        raise UserError(f"hydra.sweep.subdir may not be set: expected {SUBDIR}")
    own = node.get("overrides") or {}
    if any(word not in words for kind in ("task", "hydra") for word in own.get(kind) or ()):
        raise UserError("hydra.overrides may not be set by a config")
    _check_space("hydra.sweeper.params", (node.get("sweeper") or {}).get("params") or {})


def _check_sweep(node: Any) -> None:
    """Raises UserError for what a sweep may not put into its members' and stages' words."""
    if not isinstance(node, dict):
        return
    _check_space("sweep.search.space", (node.get("search") or {}).get("space") or {})
    for name, settings in (node.get("evaluations") or {}).items():
        _check_space("sweep.evaluations", {name: ""})
        for key in settings or ():
            if not re.fullmatch(r"(evaluation\.\w+|labels_per_class|batch\.\w+)", str(key)):
                raise UserError(f"sweep.evaluations.{name}.{key} may not be set by a sweep")
    for recipe in [*(node.get("before") or ()), *(node.get("after") or ())]:
        _check_space("sweep", {recipe: ""})


def _check_plugin(kind: str, node: dict[str, Any]) -> None:
    ours, arguments = PLUGINS[kind]
    name = node.get("_target_", ours)
    rest = {key: value for key, value in node.items() if key != "_target_"}
    if name != ours and not targets.is_vouched_for(str(name)):
        raise UserError(
            f"hydra.{kind}: {name} is not allowed; if you trust that plugin, say "
            f"trust=[{str(name).rpartition('.')[0]}.]"
        )
    if name == ours and (strange := set(rest) - arguments):
        raise UserError(f"hydra.{kind}.{min(strange)} may not be set")
    if name == ours and any("${" in text for text in _strings(rest)):
        raise UserError(f"hydra.{kind} may not hold an interpolation")
    targets.check_nodes(rest, lambda place: ".".join(map(str, ("hydra", kind, *place))))


def _check_space(where: str, params: dict[str, Any]) -> None:
    """What a sweep searches over becomes words of the members' command lines."""
    for key, value in params.items():
        name = str(key).lstrip("+~")
        plain = re.fullmatch(r"[\w.@/:-]+", name) and "\n" not in str(value)
        first = re.split(r"[./@:]", name)[0]
        if not plain or first in ("hydra", "trust") or name in folders.OURS:
            raise UserError(f"{where}.{key} may not be searched over")


def check_composed(cfg: DictConfig, words: list[str], *, acts: bool) -> None:
    """All that can be told of a composed config from its text, Hydra's node included.

    Nothing is imported or written, and nothing is resolved but folders. Raises UserError.

    Args:
        words: the user's own.
        acts: Hydra will act on its node; it only composes a single model, say.
    """
    content: Any = OmegaConf.to_container(cfg, resolve=False)
    node = content.pop("hydra", None)
    if node is not None and acts:
        check_hydra(node, words)
        own = {key: value for key, value in node.items() if key not in _TEXTS}
        check_interpolations(own, COMPOSED)
        # the words stand in it twice, as texts; what they say is looked at in its place
        own["job"] = {k: v for k, v in own.get("job", {}).items() if k != "override_dirname"}
        secrets.check_secrets({**own, "overrides": None})
    check_interpolations(content, COMPOSED)
    secrets.check_secrets(content)
    _check_sweep(content.get("sweep"))
    _check_content(content)
    if "paths" in content:
        folders.check_folders(cfg, words)


def check_recorded(content: dict[str, Any], except_for: Collection[str] = ()) -> None:
    """All that can be told of the config that a checkpoint carries.

    Nothing of this machine may be looked up by it: no environment, no Hydra, no time.

    Args:
        except_for: dotted keys that are about to be replaced.
    """
    checked = _without(content, except_for)
    check_interpolations(checked, PURE)
    _check_content(checked)


def _check_content(content: dict[str, Any]) -> None:
    limits.check_resolved_size(content)
    targets.check_nodes(content, lambda place: ".".join(map(str, place)))
    folders.check_places(content)


def _without(content: Any, keys: Collection[str], prefix: str = "") -> Any:
    if not isinstance(content, dict):
        return content
    return {
        key: _without(value, keys, f"{prefix}{key}.")
        for key, value in content.items()
        if f"{prefix}{key}" not in keys
    }


_TEXTS = ("help", "hydra_help", "job_logging", "hydra_logging")  # templates with their own ${}


@contextlib.contextmanager
def vetted() -> Iterator[None]:
    """Within it, each config that Hydra composes is read within limits and checked at once.

    Hydra has no place to hook in between composing and acting on its node, so its loader's one
    method is wrapped for as long as this lasts.
    """
    if getattr(ConfigLoaderImpl.load_configuration, "checked", False):
        yield
        return
    plain: Callable[..., DictConfig] = ConfigLoaderImpl.load_configuration

    def load(
        self: Any, config_name: str | None, overrides: list[str], *rest: Any, **named: Any
    ) -> DictConfig:
        check_words(overrides)
        try:
            cfg = plain(self, config_name, list(overrides), *rest, **named)
        except (UserError, HydraException, OmegaConfBaseException):
            raise
        except _GARBAGE as error:
            text = " ".join(str(error).split())[:300] or type(error).__name__
            raise UserError(f"the config cannot be read: {text}") from error
        check_composed(cfg, list(overrides), acts=config_name == "train")
        return cfg

    load.checked = True  # type: ignore[attr-defined]
    ConfigLoaderImpl.load_configuration = load  # type: ignore[method-assign]
    try:
        with limits.bounded_yaml():
            yield
    finally:
        ConfigLoaderImpl.load_configuration = plain  # type: ignore[method-assign]


# what Hydra and YAML raise when they are fed with nonsense
_GARBAGE = (
    *(yaml.YAMLError, ValueError, TypeError, KeyError, AttributeError, AssertionError),
    *(RecursionError, OSError),
)

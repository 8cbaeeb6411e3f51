"""What a run writes stays in its folder, and the folder where the user keeps runs.

A config file may name a run, not choose where on the disk it lies: `paths.runs_dir` outside the
current folder, or a `paths.output_dir` outside of that, is for the user to type, or to write into
configs/local. Links are followed before anything is compared.
"""

import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationToMissingValueError, OmegaConfBaseException

from beit.errors import UserError
from beit.security import limits, targets

OURS = ("paths.runs_dir", "paths.output_dir")
# nodes whose objects write; what they write lies in the run's folder
WRITERS = ("callbacks", "logger", "trainer", "job")
DOWNLOADING = ("data", "labelled")  # groups whose sources may download
# rooms whose objects may write; in another group nobody would look at where
_WRITING = ("lightning.", "beit.callbacks.", "beit.checkpoints.", "beit.job.", "beit.loggers.")
# arguments that are a folder or a file of their own, not a name within one
WHOLE_PATHS = frozenset(
    {"default_root_dir", "dir", "dirpath", "folder", "log_dir", "metrics_file", "path"}
    | {"root", "root_dir", "save_dir"}
)
_USUAL = "runs"  # of the schema; where a link of that name leads is the user's choice
_OUTSIDE = "give it on the command line, or in configs/local, if you mean it"


def check_folders(cfg: DictConfig, words: list[str]) -> None:
    """Raises UserError where a config would write outside of the run's folder, before it does.

    Args:
        cfg: a composed config, with or without Hydra's node.
        words: KEY=VALUE of the user's own; folders that they name are theirs to choose.
    """
    typed = _typed(cfg, words)
    runs = _value(cfg, "paths.runs_dir")
    run = _value(cfg, "paths.output_dir")
    if runs is None or run is None:
        return  # without a name yet: the missing keys are told later
    if "paths.runs_dir" not in typed and runs != _USUAL and not _within(runs, "."):
        raise UserError(f"paths.runs_dir={runs} lies outside the current folder: {_OUTSIDE}")
    if "paths.output_dir" not in typed and not (_within(run, runs) and not _same(run, runs)):
        raise UserError(f"paths.output_dir={run} lies outside of paths.runs_dir={runs}: {_OUTSIDE}")
    tokens = _value(cfg, "token_cache")
    if tokens is not None and "token_cache" not in typed and not _within(tokens, runs):
        raise UserError(f"token_cache={tokens} lies outside of paths.runs_dir={runs}: {_OUTSIDE}")
    sweep = _value(cfg, "hydra.sweep.dir")
    if sweep is not None and "hydra.sweep.dir" not in typed and not _within(sweep, runs):
        raise UserError(f"hydra.sweep.dir={sweep} lies outside of paths.runs_dir={runs}")
    for group in WRITERS:
        node = _resolved(cfg, group)
        if group in ("callbacks", "logger") and isinstance(node, dict):  # objects by name
            node = {k: v for k, v in node.items() if isinstance(v, dict) and "_target_" in v}
        for key, name, text in _strings(node, group):
            _check_written(key, name, text, run)
    check_downloads(cfg, words)


def check_places(content: Any) -> None:
    """Raises UserError for an object that writes or downloads where its folder is not looked at."""
    for place, node in targets.nodes(content):
        key = ".".join(map(str, place))
        if node["_target_"].startswith(_WRITING) and place[:1] not in {(w,) for w in WRITERS}:
            raise UserError(
                f"{key}: {node['_target_']} writes, and may only stand in {', '.join(WRITERS)}"
            )
        if node.get("download") and place[:1] not in {(group,) for group in DOWNLOADING}:
            where = " or ".join(DOWNLOADING)
            raise UserError(f"{key}.download: only what stands in {where} may download")


def _typed(cfg: DictConfig, words: list[str]) -> set[str]:
    """Keys whose values are the user's own."""
    typed = {word.lstrip("+").partition("=")[0] for word in words}
    if "paths" in typed:
        return typed | {f"paths.{key}" for key in cfg.paths}
    chosen: Any = OmegaConf.to_container(cfg.paths, resolve=False)
    # a recipe may have put another file of that name, or another value, in its place
    return typed | {f"paths.{k}" for k, v in _local_paths().items() if chosen.get(k) == v}


def _local_paths() -> dict[str, Any]:
    """Folders that stand in the user's own file, configs/local/default.yaml of the checkout."""
    from beit.config import config_dir

    path = config_dir() / "local" / "default.yaml"
    if not path.is_file():
        return {}
    with path.open(encoding="utf-8") as stream:
        try:
            content = yaml.load(stream, Loader=limits.BoundedLoader)
        except yaml.YAMLError:
            return {}
    paths = content.get("paths") if isinstance(content, dict) else None
    return paths if isinstance(paths, dict) else {}


def _value(cfg: DictConfig, key: str) -> str | None:
    """A value as text; None where it is missing, which is told later."""
    try:
        value = OmegaConf.select(cfg, key)
    except InterpolationToMissingValueError:
        return None
    except OmegaConfBaseException as error:  # it might turn out to be anything
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{key} cannot be told before the run: {reason}") from error
    return None if value is None else str(value)


def _resolved(cfg: DictConfig, group: str) -> Any:
    """A group as plain data; a value that refers to a missing one is left out."""
    node: Any = cfg.get(group) if group in cfg else None
    if not OmegaConf.is_dict(node):
        return node
    found: dict[Any, Any] = {}
    for key in node:
        if OmegaConf.is_missing(node, key):
            continue
        try:
            value = node[key]
            plain = OmegaConf.is_config(value)
            found[key] = OmegaConf.to_container(value, resolve=True) if plain else value
        except InterpolationToMissingValueError:
            continue
        except OmegaConfBaseException as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{group}.{key} cannot be told before the run: {reason}") from error
    return found


def _strings(node: Any, key: str, name: str = "") -> Iterator[tuple[str, str, str]]:
    """(dotted key, its last part, text) of every text; positional arguments have no name."""
    if isinstance(node, dict):
        for part, value in node.items():
            yield from _strings(value, f"{key}.{part}", str(part))
    elif isinstance(node, list):
        for value in node:
            yield from _strings(value, key, name)
    elif isinstance(node, str):
        yield key, name, node


def _check_written(key: str, name: str, text: str, run: str) -> None:
    mend = "write ${paths.output_dir}/NAME"
    if name == "_args_":
        raise UserError(f"{key}: arguments of what writes files are given by name")
    if "://" in text or text.startswith("~"):
        raise UserError(f"{key}={text} is outside of the run's folder {run}: {mend}")
    parts = re.split(r"[/\\]", text)
    whole = name in WHOLE_PATHS or name.endswith(("_dir", "_path", "_file", "_folder"))
    if (whole or parts[0] == "") and text:
        outside = not _within(text, run)
    else:
        outside = ".." in parts
    if outside:
        raise UserError(f"{key}={text} is outside of the run's folder {run}: {mend}")


def check_downloads(cfg: DictConfig, words: list[str]) -> None:
    """Data sets are downloaded below paths.data_dir, which is the user's to choose as well."""
    typed = _typed(cfg, words)
    data = _value(cfg, "paths.data_dir")
    sources = (targets.nodes(_resolved(cfg, group), (group,)) for group in DOWNLOADING)
    for place, source in itertools.chain.from_iterable(sources):
        key, root = f"{'.'.join(map(str, place))}.root", str(source.get("root", ""))
        if not source.get("download") or key in typed:
            continue
        if data is None or "_args_" in source or not _within(root, data):
            raise UserError(f"{key}={root} lies outside of paths.data_dir={data}")
        if "paths.data_dir" not in typed and not _within(data, "."):
            raise UserError(f"paths.data_dir={data} lies outside the current folder: {_OUTSIDE}")


def _within(path: str, folder: str) -> bool:
    """Whether a path, its links followed, is a folder or lies below it."""
    there = Path(folder).expanduser().resolve()
    mine = Path(path).expanduser().resolve()
    return mine == there or there in mine.parents


def _same(path: str, folder: str) -> bool:
    return Path(path).expanduser().resolve() == Path(folder).expanduser().resolve()

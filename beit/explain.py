"""Hydra's messages turned into one line: the word that is wrong, and the nearest right one."""

import difflib
import re
from pathlib import Path

from hydra.errors import HydraException, MissingConfigException
from omegaconf.errors import OmegaConfBaseException

from beit import config
from beit.errors import UserError


def explain(error: Exception, overrides: list[str]) -> str:
    """One line for an error that Hydra or OmegaConf raised while composing `overrides`."""
    if isinstance(error.__cause__, UserError):  # raised by a resolver of ours
        return str(error.__cause__)
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        return _missing_choice(error)
    unknown = re.search(r"Could not override '([^'@]+)'", str(error)) or re.search(
        r"Key '([^']+)' is not in struct", str(error)
    )
    if unknown:
        return _unknown_key(unknown.group(1), error, overrides)
    keep = []
    for line in str(error).splitlines():
        if line.startswith(("Config search path", "Set the environment variable")):
            break
        if line.strip():
            keep.append(line.strip())
    if len(keep) == 1 and error.__cause__ is not None:
        keep += str(error.__cause__).splitlines()[:1]
    return "; ".join(keep).replace(":;", ":")


def _missing_choice(error: MissingConfigException) -> str:
    group, _, choice = str(error.missing_cfg_file).rpartition("/")
    options = sorted(error.options or ())
    if not options:
        group, _, rest = str(error.missing_cfg_file).partition("/")
        options, choice = choices(group), rest
    near = difflib.get_close_matches(choice, options, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"expected one of {', '.join(options)}"
    return f"{group}={choice} does not exist: {hint}"


def _unknown_key(key: str, error: Exception, overrides: list[str]) -> str:
    """The key as the user wrote it, and keys of the config that look like it."""
    rest = [word for word in overrides if not word.lstrip("+~").startswith(key)]
    try:
        cfg = config.compose([w for w in rest if not w.startswith("-")])
        known = [name for name, _ in config.dotted_keys(cfg)]
    except (HydraException, OmegaConfBaseException):
        known = []
    near = difflib.get_close_matches(key, known, n=2, cutoff=0.6)
    if not near:
        leaf = key.rpartition(".")[2]
        near = [name for name in known if name.rpartition(".")[2] == leaf][:2]
    hint = f"did you mean {' or '.join(near)}?" if near else "see beit train --help"
    return f"{key} is not a key of this config: {hint}"


def choices(group: str) -> list[str]:
    """Names of the shipped configs of a group, in its sub-folders too."""
    folder = config.config_dir() / group
    return sorted(str(p.relative_to(folder).with_suffix("")) for p in folder.rglob("*.yaml"))


def train_help() -> str:
    """What `beit train --help` prints: the groups with their choices, and the recipes."""
    folder = config.config_dir()
    groups = sorted(path.name for path in folder.iterdir() if path.is_dir())
    plain = [name for name in groups if name not in ("experiment", "sweep", "local")]
    lines = ["usage: beit train [GROUP=CHOICE ...] [KEY=VALUE ...] [-m]", "", "groups:"]
    lines += [f"  {name:12} {', '.join(choices(name))}" for name in plain]
    for group in ("experiment", "sweep"):
        lines += ["", f"{group}="]
        lines += [f"  {name:28} {_headline(folder / group / name)}" for name in choices(group)]
    lines += [
        "",
        "beit train experiment=NAME --cfg job    prints the config without running it",
        "--config-dir FOLDER                     adds a folder of your own configs",
    ]
    return "\n".join(lines)


def _headline(path: Path) -> str:
    """The first comment of a config that is not Hydra's."""
    for line in path.with_suffix(".yaml").read_text(encoding="utf-8").splitlines():
        if line.startswith("# ") and not line.startswith("# @"):
            return line[2:]
    return ""

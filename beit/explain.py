"""Hydra's messages turned into one line: the word that is wrong, and the nearest right one."""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

from hydra.errors import HydraException, MissingConfigException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from beit import config
from beit.errors import UserError
from beit.nearest import did_you_mean


@contextlib.contextmanager
def explained(overrides: list[str], *, config_name: str = "train") -> Iterator[None]:
    """Within it, what Hydra and OmegaConf raise about `overrides` becomes a UserError."""
    try:
        yield
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(explain(error, overrides, config_name)) from error
    except UserError as error:
        # what OmegaConf says of sweep.metric=... where there is no sweep
        if "NoneType" in str(error) and (told := _below_nothing(overrides, config_name)):
            raise UserError(told) from error
        raise


def explain(error: Exception, overrides: list[str], config_name: str = "train") -> str:
    """One line for an error that Hydra or OmegaConf raised while composing `overrides`."""
    own = _own_message(error)
    if own:
        return own
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        return _missing_choice(error)
    unknown = re.search(r"Could not override '([^'@]+)'", str(error)) or re.search(
        r"Key '([^']+)' is not in struct", str(error)
    )
    if unknown:
        told = _below_nothing(overrides, config_name)
        return told or _unknown_key(unknown.group(1), overrides, config_name)
    keep = []
    for line in str(error).splitlines():
        if line.startswith(("Config search path", "Set the environment variable")):
            break
        if line.strip():
            keep.append(line.strip())
    if len(keep) == 1 and error.__cause__ is not None:
        keep += str(error.__cause__).splitlines()[:1]
    return "; ".join(keep).replace(":;", ":")


def _own_message(error: BaseException) -> str:
    """What a resolver of ours raised on the way to this error; empty where none did."""
    waiting: list[BaseException | None] = [error]
    seen: list[BaseException] = []
    while waiting:
        one = waiting.pop(0)
        if isinstance(one, UserError):
            return str(one)
        if one is not None and one not in seen:
            seen.append(one)
            waiting += [one.__cause__, one.__context__]
    return ""


def _missing_choice(error: MissingConfigException) -> str:
    group, _, choice = str(error.missing_cfg_file).rpartition("/")
    options = sorted(error.options or ())
    if not options:
        group, _, rest = str(error.missing_cfg_file).partition("/")
        options, choice = choices(group), rest
    return f"{group}={choice} does not exist: {did_you_mean(choice, options)}"


def _below_nothing(overrides: list[str], config_name: str) -> str:
    """Of a word that changes a group which this config leaves out; empty where none does."""
    keys = {word: word.lstrip("+~").partition("=")[0] for word in overrides}
    groups = [word for word, key in keys.items() if "." not in key and not word.startswith("-")]
    try:
        cfg = config.compose(groups, config_name=config_name)
    except (HydraException, OmegaConfBaseException, UserError):
        return ""
    for key in keys.values():
        group, below, _ = key.partition(".")
        known = below and group in cfg and not OmegaConf.is_missing(cfg, group)
        if known and cfg[group] is None and (some := choices(group)):
            return f"{key}: this config has no {group}: choose {group}={' or '.join(some)}"
    return ""


def _unknown_key(key: str, overrides: list[str], config_name: str) -> str:
    """The key as the user wrote it, and keys of the config that look like it."""
    rest = [word for word in overrides if not word.lstrip("+~").startswith(key)]
    try:
        rest = [word for word in rest if not word.startswith("-")]
        cfg = config.compose(rest, config_name=config_name)
        known = [name for name, _ in config.dotted_keys(cfg)]
    except (HydraException, OmegaConfBaseException, UserError):
        known = []
    leaf = key.rpartition(".")[2]
    same = [name for name in known if name.rpartition(".")[2] == leaf][:2]
    other = f"did you mean {' or '.join(same)}?" if same else f"see beit {config_name} --help"
    return f"{key} is not a key of this config: {did_you_mean(key, known, otherwise=other)}"


def choices(group: str) -> list[str]:
    """Names of the shipped configs of a group, in its sub-folders too."""
    folder = config.config_dir() / group
    return sorted(str(p.relative_to(folder).with_suffix("")) for p in folder.rglob("*.yaml"))


# folders of configs that are no group of a training run's, or have a list of their own
_NOT_GROUPS = ("experiment", "sweep", "local", "evaluation")


def train_help() -> str:
    """What `beit train --help` prints: the groups with their choices, and the recipes."""
    folder = config.config_dir()
    groups = sorted(path.name for path in folder.iterdir() if path.is_dir())
    plain = [name for name in groups if name not in _NOT_GROUPS]
    lines = ["usage: beit train [GROUP=CHOICE ...] [KEY=VALUE ...] [FLAG ...]", "", "groups:"]
    lines += [f"  {name:12} {', '.join(choices(name))}" for name in plain]
    for group in ("experiment", "sweep"):
        lines += ["", f"{group}="]
        lines += [f"  {name:28} {_headline(folder / group / name)}" for name in choices(group)]
    lines += [
        "",
        "flags:",
        "  -m, --multirun        a sweep: every combination of values that stand with commas",
        "  --cfg job             prints the config without running it; --resolve fills it in",
        "  --config-dir FOLDER   adds a folder of your own configs",
        "  trust=[PACKAGE.]      lets configs name what is in a package of yours (or BEIT_TRUST)",
        "",
        "beit train experiment=demo/pretrain --cfg job",
        "beit train experiment=demo/scratch seed=0,1,2 -m",
        "beit train -m sweep=seeds experiment=demo/scratch",
    ]
    return "\n".join(lines)


def evaluate_help() -> str:
    """What `beit evaluate --help` prints."""
    folder = config.config_dir() / "evaluation"
    lines = [
        "usage: beit evaluate checkpoint=PATH [KEY=VALUE of the run's config ...]",
        "       beit evaluate checkpoint=PATH evaluation=CHOICE data=CHOICE [paths.data_dir=DIR]",
        "                     [output=FOLDER [overwrite=true]] [KEY=VALUE ...]",
        "",
        "The first validates the checkpoint as its run did. The second freezes its backbone:",
        "",
        *(f"  {name:14} {_headline(folder / name)}" for name in choices("evaluation")),
        "",
        "  evaluation.layers=[6,9,12]  layers, counted from 1; all of them without this",
        "  evaluation.k=[10,20]        and whatever else stands in configs/evaluation",
        "  labels_per_class=20         learn from so many labelled images of each class",
        "  compare_random=true         the same of the same network with random weights",
        "  view.crop_pct=1.0           images are prepared as the checkpoint's, unless told",
        "  trainer=gpu trainer.precision=32-true batch.per_device=256",
        "",
        f"data: {', '.join(choices('data'))}",
    ]
    return "\n".join(lines)


def _headline(path: Path) -> str:
    """The first comment of a config that is not Hydra's."""
    for line in path.with_suffix(".yaml").read_text(encoding="utf-8").splitlines():
        if line.startswith("# ") and not line.startswith("# @"):
            return line[2:]
    return ""

"""A run's config as its checkpoint carries it, and that config changed by the words of a user."""

from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from beit import config
from beit.errors import UserError
from beit.explain import choices
from beit.nearest import did_you_mean
from beit.security import folders, limits
from beit.security.composing import check_recorded

_TRAINED = ("callbacks", "logger")  # groups of training alone, which are left out


def composed(cfg: DictConfig) -> dict[str, Any]:
    """The config as plain data with its interpolations, so that a change of one key reaches all.

    What depends on the moment or the place is fixed: the run's name and its folder.
    """
    written = config.plain(cfg)
    content: Any = OmegaConf.to_container(cfg, resolve=False)
    content["name"] = str(written["name"])
    content["paths"]["output_dir"] = str(written["paths"]["output_dir"])
    return content


def from_checkpoint(path: str | Path, overrides: list[str]) -> DictConfig:
    """The config that a checkpoint carries, changed by KEY=VALUE words; `init_from` is the file.

    A word may choose from a group again (`trainer=gpu`, `data=folder`, `logger=none`).

    Raises:
        UserError: a key that the run's config does not have, a value that cannot be read.
    """
    from beit.interop.convert import any_checkpoint

    config.register()
    cfg = OmegaConf.create(_checked(any_checkpoint(path).composed, path, overrides))
    OmegaConf.set_struct(cfg, True)
    for word in overrides:
        key, _, text = word.partition("=")
        try:
            value = OmegaConf.select(_parsed(word, text), "value")
            old = OmegaConf.select(cfg, key, throw_on_missing=False)
            if key == "task":
                raise UserError(
                    f"{word}: the checkpoint is of task {cfg.task_name}; another one is trained "
                    "from its weights (beit train init_from=...)"
                )
            if isinstance(old, DictConfig) and isinstance(value, str):
                _choose(cfg, key, value)
            elif old is None and value is not None and key not in _TRAINED and choices(key):
                raise UserError(f"{word}: the checkpoint, of task {cfg.task_name}, has no {key}")
            else:
                OmegaConf.update(cfg, key, value)
        except yaml.YAMLError as error:
            raise UserError(f"{word}: the value cannot be read as YAML") from error
        except OmegaConfBaseException as error:
            raise UserError(f"{word}: the run's config has no such key") from error
    cfg.resume, cfg.init_from = None, str(path)
    changed: Any = OmegaConf.to_container(cfg, resolve=False)
    check_recorded(changed)
    folders.check_downloads(cfg, overrides)
    return cfg


def _checked(content: Any, path: str | Path, overrides: list[str]) -> dict[str, Any]:
    """The config of a checkpoint, which anybody may have written, without what only training needs.

    The user's words may replace what refers to the environment.
    """
    try:
        limits.check_plain(content)
        typed = {word.partition("=")[0] for word in overrides}
        for key in (*_TRAINED, "profiler", "plugins"):
            content["trainer"].pop(key, None)
        content.update(dict.fromkeys(_TRAINED))
        check_recorded(content, except_for=typed)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: its config is not one of a training run") from error
    return content


def _parsed(word: str, text: str) -> Any:
    """`value: TEXT` as YAML, within limits: 1e-3 is a number."""
    limits.check_word(word)
    with limits.bounded_yaml():
        return OmegaConf.create(f"value: {text}")


def _choose(cfg: DictConfig, group: str, choice: str) -> None:
    """Put another config of a group in place; what it leaves open stays as the run had it."""
    try:
        folder = str(config.config_dir())
        with config.vetted(), initialize_config_dir(config_dir=folder, version_base="1.3"):
            chosen = compose(config_name=f"{group}/{choice}")
    except HydraException as error:
        hint = did_you_mean(choice, choices(group.replace(".", "/")))
        raise UserError(f"{group}={choice}: no such choice: {hint}") from error
    node = OmegaConf.create(OmegaConf.to_container(chosen[group], resolve=False))
    for key in list(node):
        if OmegaConf.is_missing(node, key) and key in cfg[group]:
            node[key] = cfg[group][key]
    OmegaConf.update(cfg, group, node, merge=False)

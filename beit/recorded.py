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


def composed(cfg: DictConfig) -> dict[str, Any]:
    """The config as plain data with its interpolations, so that a change of one key reaches all.

    What depends on the moment or the place is fixed: the run's name and its folder.
    """
    cfg = cfg.copy()
    cfg.name, cfg.paths.output_dir = str(cfg.name), str(cfg.paths.output_dir)
    content: Any = OmegaConf.to_container(cfg, resolve=False)
    return content


def from_checkpoint(path: str | Path, overrides: list[str]) -> DictConfig:
    """The config that a checkpoint carries, changed by KEY=VALUE words; `init_from` is the file.

    A word may choose from a group again (`trainer=gpu`, `data=folder`, `logger=none`).

    Raises:
        UserError: a key that the run's config does not have, a value that cannot be read.
    """
    from beit.checkpoint import read_checkpoint

    config.register()
    cfg = OmegaConf.create(read_checkpoint(path).composed)
    OmegaConf.set_struct(cfg, True)
    for word in overrides:
        key, _, text = word.partition("=")
        try:
            value = OmegaConf.select(
                OmegaConf.create(f"value: {text}"), "value"
            )  # 1e-3 is a number
            old = OmegaConf.select(cfg, key, throw_on_missing=False)
            if isinstance(old, DictConfig) and isinstance(value, str):
                _choose(cfg, key, value)
            else:
                OmegaConf.update(cfg, key, value)
        except yaml.YAMLError as error:
            raise UserError(f"{word}: the value cannot be read as YAML") from error
        except OmegaConfBaseException as error:
            raise UserError(f"{word}: the run's config has no such key") from error
    cfg.resume, cfg.init_from = None, str(path)
    return cfg


def _choose(cfg: DictConfig, group: str, choice: str) -> None:
    """Put another config of a group in place; what it leaves open stays as the run had it."""
    try:
        with initialize_config_dir(config_dir=str(config.config_dir()), version_base="1.3"):
            chosen = compose(config_name=f"{group}/{choice}")
    except HydraException as error:
        raise UserError(f"{group}={choice}: no such choice; see beit train --help") from error
    node = OmegaConf.create(OmegaConf.to_container(chosen[group], resolve=False))
    for key in list(node):
        if OmegaConf.is_missing(node, key) and key in cfg[group]:
            node[key] = cfg[group][key]
    OmegaConf.update(cfg, group, node, merge=False)

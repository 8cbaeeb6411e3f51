"""The configuration: how it is composed, what is settled late, and the checks across fields.

With `schema` and `checks` the only file that knows the keys of the config tree. Everything below
the door takes plain arguments. The nodes with a `_target_` are checked against their constructors
(see `building`).
"""

import functools
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf, open_dict

from beit import checks
from beit.building import check_arguments, check_values, located
from beit.building import instantiate as instantiate
from beit.errors import UserError
from beit.resolvers import RESOLVERS
from beit.schema import EvaluateConfig, TrainConfig
from beit.security import secrets
from beit.security.composing import vetted as vetted
from beit.sizes import patch_grid

PACKAGE_DIR = Path(__file__).resolve().parent

# in a recipe: its `init_from: ???` would be passed over, for the schema's null is there before it
REQUIRED = "REQUIRED"

# built from what stands in the files alone, not from the data or another run's checkpoint
CHECKED_GROUPS = (
    *("trainer", "job", "model", "pyramid", "inference", "optim", "loader", "callbacks", "logger"),
)


def config_dir() -> Path:
    """Folder of the shipped configs: inside the installed package, or beside it in a checkout."""
    for candidate in (PACKAGE_DIR / "configs", PACKAGE_DIR.parent / "configs"):
        if (candidate / "train.yaml").is_file():
            return candidate
    raise UserError(
        f"no configs in {PACKAGE_DIR / 'configs'} nor {PACKAGE_DIR.parent / 'configs'}: "
        "the installation is incomplete, install beit again"
    )


def register() -> None:
    """Make the schema and the resolvers known to Hydra. May be called again."""
    ConfigStore.instance().store(name="train_schema", node=TrainConfig)
    ConfigStore.instance().store(name="evaluate_schema", node=EvaluateConfig)
    for name, function in RESOLVERS.items():
        OmegaConf.register_new_resolver(name, function, replace=True)


def compose(overrides: list[str], *, config_name: str = "train") -> DictConfig:
    """The config that `beit train OVERRIDES` would run, without running it."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir

    register()
    with vetted(), initialize_config_dir(config_dir=str(config_dir()), version_base="1.3"):
        return hydra_compose(config_name=config_name, overrides=overrides)


def compose_within(overrides: list[str], *, config_name: str = "train") -> DictConfig:
    """The same within a command, whose Hydra knows the user's folders of configs."""
    from hydra import compose as hydra_compose
    from hydra.core.global_hydra import GlobalHydra

    if GlobalHydra.instance().is_initialized():
        return hydra_compose(config_name=config_name, overrides=overrides)
    return compose(overrides, config_name=config_name)


def refuse_sweep(words: list[str]) -> None:
    """Raises UserError for a space to search, which a single run would ignore."""
    for word in words:
        if word.startswith("sweep=") and word not in ("sweep=null", "sweep="):
            raise UserError(f"{word} is a space to search: say beit train -m {word} ...")


def plain(cfg: DictConfig) -> dict[str, Any]:
    """The config as dicts, lists and scalars, to be written down: interpolations are resolved.

    But what comes from the environment stays `${oc.env:NAME}`: it may be a secret.
    """
    content: Any = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    text: Any = OmegaConf.to_container(cfg, resolve=False)
    if "oc.env" not in str(text):
        return content
    with secrets.environment_as_text():
        content = secrets.without_environment(cfg)
    return content


def accumulation(*, global_size: int, per_device: int, devices: int) -> int:
    """Micro-batches that one optimizer step accumulates, so that the global batch comes out.

    Raises UserError, with the numbers, where no whole number of them does.
    """
    if min(global_size, per_device, devices) < 1:
        raise UserError(
            f"batch.global_size={global_size}, batch.per_device={per_device} and {devices} "
            "devices: each must be at least 1"
        )
    at_once = per_device * devices
    if global_size % at_once == 0:
        return global_size // at_once
    if global_size % devices:
        mend = f"choose a batch.global_size that {devices} divides"
    else:
        share = global_size // devices
        best = max(d for d in range(1, share + 1) if share % d == 0 and d <= per_device)
        mend = f"batch.per_device={best} would do"
    raise UserError(
        f"batch.global_size={global_size} is not a multiple of {devices} devices x "
        f"batch.per_device={per_device} = {at_once} images at once: {mend}"
    )


def settle_devices(cfg: DictConfig) -> int:
    """Fix `trainer.devices` to a number and work out the accumulation. Returns the world size."""
    devices, world_size = _devices(cfg.trainer)
    accumulate = accumulation(
        global_size=cfg.batch.global_size, per_device=cfg.batch.per_device, devices=world_size
    )
    with open_dict(cfg):
        cfg.trainer.devices = devices
        cfg.trainer.accumulate_grad_batches = accumulate
    return world_size


def _devices(trainer: DictConfig) -> tuple[Any, int]:
    """(`trainer.devices` as a number or a list, the world size)."""
    devices = trainer.get("devices", 1)
    if devices in ("auto", -1):
        import torch

        on_gpu = trainer.get("accelerator") in ("gpu", "cuda", "auto")
        devices = max(1, torch.cuda.device_count()) if on_gpu else 1
    listed = list(devices) if OmegaConf.is_list(devices) else []
    count = len(listed) if listed else devices
    if not all(type(number) is int for number in [count, *listed]) or count < 1:
        raise UserError(
            f"trainer.devices={devices}: expected how many, auto (or -1) for all there are, or a "
            "list such as [0,1]"
        )
    return devices, count * int(trainer.get("num_nodes", 1))


def uses_tokenizer(cfg: DictConfig) -> bool:
    """Whether anything in the config refers to its tokenizer."""
    content: Any = OmegaConf.to_container(cfg, resolve=False)
    return "${tokenizer" in str({key: node for key, node in content.items() if key != "tokenizer"})


def settle_tokenizer(cfg: DictConfig) -> None:
    """Leave out a recipe's tokenizer where the target is pixels: its file need not even exist."""
    if cfg.tokenizer is not None and not uses_tokenizer(cfg):
        cfg.tokenizer = None


def settle_classes(cfg: DictConfig, found: int) -> None:
    """Put the number of classes that the data has in place of `data.num_classes: auto`."""
    if found and OmegaConf.select(cfg, "data.num_classes") == "auto":
        cfg.data.num_classes = found


def dotted_keys(node: Any, prefix: str = "") -> Iterator[tuple[str, bool]]:
    """Every key in order, and whether its value is missing; interpolations are not followed.

    OmegaConf's own search for missing keys stumbles over interpolations.
    """
    for key in node if OmegaConf.is_dict(node) else ():
        missing = OmegaConf.is_missing(node, key)
        yield f"{prefix}{key}", missing
        if not missing and not OmegaConf.is_interpolation(node, key):
            yield from dotted_keys(node[key], f"{prefix}{key}.")


def check_missing(cfg: DictConfig) -> None:
    """Raises UserError that names every key without a value."""
    missing = [key for key, missing in dotted_keys(cfg) if missing]
    if cfg.get("init_from") == REQUIRED:
        missing.append("init_from")
    checks.check_missing(missing)


def check(cfg: DictConfig) -> None:
    """Everything that can be known to be wrong before anything is built."""
    content: Any = OmegaConf.to_container(cfg, resolve=False)
    checks.check_root(content, [entry.name for entry in fields(TrainConfig)])
    check_missing(cfg)
    if cfg.tokenizer is None and uses_tokenizer(cfg):
        raise UserError(
            "tokenizer has no value: give one, as in tokenizer=trained tokenizer.path=PATH, or say "
            "target=pixels"
        )
    checks.check_groups(content)
    check_arguments(content, lambda place: ".".join(map(str, place)))
    for group in CHECKED_GROUPS:
        node = cfg[group]
        if node is not None:
            settled = OmegaConf.to_container(node, resolve=True)
            check_values(settled, functools.partial(located, node))
    if cfg.resume not in (None, "auto") and cfg.init_from:
        raise UserError(
            f"resume={cfg.resume} and init_from={cfg.init_from} exclude each other: resume goes "
            "on with the same run, init_from starts a new run from those weights"
        )
    checks.check_read(content, TrainConfig())
    for key in ("views_per_image", "token_cache"):
        if cfg[key] is not None and not uses_tokenizer(cfg):
            raise UserError(f"{key}={cfg[key]} is of target=tokens alone: pixels are not kept")
    checks.check_seed(cfg.seed)
    checks.check_trainer(dict(cfg.trainer))
    if cfg.normalize is not None:
        normalize: Any = OmegaConf.to_container(cfg.normalize, resolve=True)
        checks.check_normalize(normalize)
    _check_limit(cfg)
    if cfg.model is not None:
        height, width = patch_grid(cfg.model.image_size, cfg.model.patch_size)
        checks.check_positions(dict(cfg.model), height * width + 1)
        checks.check_channels(cfg.model.get("in_channels", 3))


def _check_limit(cfg: DictConfig) -> None:
    """An epoch may not be cut before its first optimizer step is complete."""
    _, world_size = _devices(cfg.trainer)
    sizes = {"global_size": cfg.batch.global_size, "per_device": cfg.batch.per_device}
    accumulate = accumulation(**sizes, devices=world_size)
    limit = cfg.trainer.get("limit_train_batches")
    if isinstance(limit, int) and limit < accumulate:
        raise UserError(
            f"trainer.limit_train_batches={limit} is fewer than the {accumulate} micro-batches of "
            f"one optimizer step (batch.global_size={cfg.batch.global_size}, "
            f"{cfg.batch.per_device * world_size} images at once): give at least {accumulate}"
        )

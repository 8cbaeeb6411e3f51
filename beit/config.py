"""The configuration: its root schema, its resolvers and the checks across fields.

With `checks` the only file that knows the keys of the config tree. Everything below the door takes
plain arguments. Hydra refuses an unknown key in a node that a schema describes; the nodes with a
`_target_` are checked against their constructors (see `building`).
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf, open_dict

from beit import checks
from beit.building import check_arguments, check_values, located
from beit.building import instantiate as instantiate
from beit.errors import UserError
from beit.security import secrets
from beit.security.composing import vetted as vetted
from beit.sizes import height_width, patch_grid

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


@dataclass
class BatchConfig:
    """Sizes of a batch, in images."""

    global_size: int = MISSING  # images in one optimizer step, over all devices
    per_device: int = MISSING  # images in one forward pass of one device


@dataclass
class PathsConfig:
    """Folders. `output_dir` belongs to one run alone."""

    data_dir: str = "data"
    runs_dir: str = "runs"
    output_dir: str = "${paths.runs_dir}/${name}"


@dataclass
class SearchConfig:
    """A search by Optuna, one member after the other."""

    space: dict[str, Any] = MISSING  # key: {low, high, log, step}, or {choices}
    direction: str = "maximize"  # or minimize
    trials: int = 20
    startup_trials: int = 8  # drawn at random before the sampler looks at results
    seed: int = 0


@dataclass
class SweepConfig:
    """What a sweep does beside its members (beit train -m sweep=...)."""

    before: list[str] = field(default_factory=list)  # recipes that they all need, run once
    after: list[str] = field(default_factory=list)  # recipes run from each one's weights
    evaluations: dict[str, Any] = field(default_factory=dict)  # of each one's frozen backbone
    metric: str = "val/loss"  # of a member or what follows it, as finetune/val/acc1
    search: SearchConfig | None = None


@dataclass
class TrainConfig:
    """The root of a training config: a key that is not here is refused."""

    task: Any = MISSING
    datamodule: Any = MISSING
    data: Any = MISSING
    trainer: Any = MISSING
    job: Any = MISSING
    task_name: str = MISSING  # one word, set by the task
    name: str = MISSING  # of the run; its folder under paths.runs_dir
    seed: int = 0
    labels_per_class: Any = "all"  # train on this many labelled images of each class
    views_per_image: int | None = None  # pretraining: so many crops of each, again and again
    token_cache: str | None = None  # pretraining: the folder that keeps those views' tokens
    resume: str | None = None  # the same run goes on: a checkpoint, or 'auto'
    allow_changes: list[str] = field(default_factory=list)  # keys in which a resumed run may differ
    init_from: str | None = None  # a new run starts from the weights of this checkpoint
    compile: bool = False  # the networks by torch.compile: minutes at the start, faster steps
    batch: BatchConfig = field(default_factory=BatchConfig)
    loader: Any = MISSING
    paths: PathsConfig = field(default_factory=PathsConfig)
    model: Any = None
    tokenizer: Any = None
    masking: Any = None
    pyramid: Any = None
    head: Any = None
    inference: Any = None
    views: Any = None
    normalize: Any = None
    mixing: Any = None
    optim: Any = None
    sweep: SweepConfig | None = None  # of the sweep; a member of it has none
    labelled: Any = None  # data with labels for callbacks=online_probe; never trained on
    callbacks: Any = None
    logger: Any = None


@dataclass
class FeaturesConfig:
    """Where features lie."""

    memory_gb: float = 4.0
    folder: str | None = None


@dataclass
class DataPathConfig:
    """The folder that data configs refer to."""

    data_dir: str = "data"


@dataclass
class EvaluateConfig:
    """The root of an evaluation of a frozen backbone: a key that is not here is refused."""

    evaluation: Any = MISSING
    data: Any = MISSING
    trainer: Any = MISSING
    view: Any = MISSING
    loader: Any = MISSING
    seed: int = 0
    labels_per_class: Any = "all"  # learn from this many labelled images of each class
    compare_random: bool = False  # the same of the same network with random weights
    batch: BatchConfig = field(default_factory=BatchConfig)
    features: FeaturesConfig = field(default_factory=FeaturesConfig)
    paths: DataPathConfig = field(default_factory=DataPathConfig)


def _checkpoint_config(path: str) -> dict[str, Any]:
    """The config in a checkpoint; the file is read once for as long as it stays the same."""
    file = Path(path).expanduser()
    written = file.stat().st_mtime_ns if file.is_file() else 0
    return _read_config(str(file), written)


@functools.lru_cache(maxsize=8)
def _read_config(path: str, written: int) -> dict[str, Any]:
    from beit.checkpoints.models import read_checkpoint

    return read_checkpoint(path).config


def _checkpoint_value(path: str, key: str) -> int:
    """A number out of the config that a checkpoint carries: `${checkpoint_value:path,a.b}`.

    A text or a node, of a stranger's perhaps, would come to stand in a config that was checked.
    """
    value: Any = _checkpoint_config(path)
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    if type(value) is not int:
        raise UserError(f"{path} is not a tokenizer's checkpoint: its config has no number {key!r}")
    return value


def register() -> None:
    """Make the schema and the resolvers known to Hydra. May be called again."""
    ConfigStore.instance().store(name="train_schema", node=TrainConfig)
    ConfigStore.instance().store(name="evaluate_schema", node=EvaluateConfig)
    resolvers: dict[str, Callable[..., Any]] = {
        "grid": lambda image, patch: list(patch_grid(image, patch)),
        "token_size": lambda image, patch, stride: [
            side * stride for side in patch_grid(image, patch)
        ],
        "window_stride": lambda window: [side * 2 // 3 for side in height_width(window)],
        "checkpoint_value": _checkpoint_value,
    }
    for name, function in resolvers.items():
        OmegaConf.register_new_resolver(name, function, replace=True)


def compose(overrides: list[str], *, config_name: str = "train") -> DictConfig:
    """The config that `beit train OVERRIDES` would run, without running it."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir

    register()
    with vetted(), initialize_config_dir(config_dir=str(config_dir()), version_base="1.3"):
        return hydra_compose(config_name=config_name, overrides=overrides)


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
    for key in ("views_per_image", "token_cache"):
        if cfg[key] is not None and cfg.task_name != "mim":
            raise UserError(f"{key}={cfg[key]} is of task=mim alone, and this is {cfg.task_name}")
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

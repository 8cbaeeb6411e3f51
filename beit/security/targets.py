"""What a `_target_` of a config may name. Decided from the name, before anything is imported.

A config comes from anywhere: a recipe of a stranger's, the config inside a checkpoint. So it names
classes from a list and nothing else. Only the user extends the list, by `trust=[package.]` on the
command line or BEIT_TRUST in the environment: a file that could would vouch for itself.
"""

import contextlib
import inspect
import os
import re
from collections.abc import Callable, Iterable, Iterator
from importlib import import_module
from typing import Any

from beit.errors import UserError

TRUST = "BEIT_TRUST"  # in the environment: the processes of a job inherit it

# of ours: the public classes of these packages, and the functions below
ROOMS: tuple[str, ...] = (
    "beit.callbacks.",
    "beit.data.",
    "beit.evaluation.",
    "beit.models.",
    "beit.optim.",
    "beit.tasks.",
)
ROOMS += ("beit.loggers.", "beit.tokenizers.", "beit.job.settings.", "beit.checkpoints.keeper.")
CLOSED = ("beit.tokenizers.pickles.",)  # rooms within those that are not for configs
FUNCTIONS = frozenset(
    {
        "beit.data.sources.few_labels",
        "beit.data.segmentation_sources.few_pairs",
        "beit.tokenizers.dvae.load_dvae",
    }
)
# what a checkpoint's config may build when its network, or its transform, alone is asked for
NETWORKS = (
    *("beit.evaluation.", "beit.models.", "beit.optim.", "beit.tasks.", "beit.tokenizers."),
    "torch.nn.",
)
TRANSFORMS = (
    *("beit.data.views.", "beit.data.classification_views.", "beit.data.segmentation_views."),
    "torchvision.transforms.",
)


def _names(module: str, classes: str) -> set[str]:
    return {f"{module}.{name}" for name in classes.split()}


_TRANSFORM_CLASSES = (
    "CenterCrop ColorJitter Compose GaussianBlur Grayscale Normalize Pad PILToTensor RandAugment "
    "RandomApply RandomCrop RandomErasing RandomGrayscale RandomHorizontalFlip RandomResizedCrop "
    "RandomRotation RandomVerticalFlip Resize ToTensor TrivialAugmentWide"
)

# of other packages: classes by name; a prefix would let in torch.load and torch.hub.load
CLASSES = frozenset(
    {"datetime.timedelta", "lightning.Trainer", "lightning.pytorch.Trainer", "timm.data.Mixup"}
    | _names(
        "lightning.pytorch.callbacks",
        "DeviceStatsMonitor EarlyStopping EMAWeightAveraging GradientAccumulationScheduler "
        "LearningRateMonitor ModelCheckpoint ModelSummary RichModelSummary RichProgressBar "
        "SpikeDetection StochasticWeightAveraging Timer TQDMProgressBar WeightAveraging",
    )
    | _names("lightning.pytorch.loggers", "CSVLogger TensorBoardLogger WandbLogger")
    | _names(
        "lightning.pytorch.strategies",
        "DDPStrategy DeepSpeedStrategy FSDPStrategy ModelParallelStrategy SingleDeviceStrategy",
    )
    | _names(
        "torch.nn",
        "AvgPool2d BatchNorm1d BatchNorm2d BCEWithLogitsLoss Conv2d ConvTranspose2d "
        "CrossEntropyLoss Dropout ELU Flatten GELU GroupNorm Identity L1Loss LayerNorm LeakyReLU "
        "Linear MaxPool2d MSELoss MultiheadAttention ReLU RMSNorm Sequential Sigmoid SiLU "
        "SmoothL1Loss Softmax SyncBatchNorm Tanh TransformerEncoder TransformerEncoderLayer "
        "Unflatten Upsample",
    )
    | _names("torch.optim", "Adagrad Adam Adamax AdamW NAdam RAdam RMSprop SGD")
    | _names(
        "torch.optim.lr_scheduler",
        "ConstantLR CosineAnnealingLR ExponentialLR LinearLR MultiStepLR OneCycleLR StepLR",
    )
    | _names("timm.data.mixup", "Mixup FastCollateMixup")
    | _names("timm.data.random_erasing", "RandomErasing")
    | _names("timm.layers", "DropPath LayerNorm2d LayerScale Mlp PatchEmbed SwiGLU")
    | _names("timm.loss", "LabelSmoothingCrossEntropy SoftTargetCrossEntropy")
    | _names(
        "torchmetrics",
        "CosineSimilarity MaxMetric MeanAbsoluteError MeanMetric MeanSquaredError "
        "MetricCollection MinMetric SumMetric",
    )
    | _names(
        "torchmetrics.classification",
        "MulticlassAccuracy MulticlassAUROC MulticlassAveragePrecision MulticlassCalibrationError "
        "MulticlassF1Score MulticlassJaccardIndex MulticlassPrecision MulticlassRecall",
    )
    | _names("torchvision.transforms", _TRANSFORM_CLASSES)
    | _names("torchvision.transforms.v2", _TRANSFORM_CLASSES)
)

# of loggers that take anything: with `settings` a server of the config's choice would get the key
_WANDB = frozenset(
    {"answer_seconds", "finish_seconds", "offline", "save_dir", "log_model"}
    | {"project", "entity", "name", "id", "version", "group", "job_type", "notes", "tags"}
    | {"mode", "anonymous", "prefix", "checkpoint_name", "add_file_policy"}
)
ARGUMENTS = {
    "lightning.pytorch.loggers.WandbLogger": _WANDB,
    "beit.loggers.wandb.BoundedWandbLogger": _WANDB,
    "lightning.pytorch.loggers.TensorBoardLogger": frozenset(
        {"save_dir", "name", "version", "sub_dir", "prefix", "log_graph", "default_hp_metric"}
        | {"max_queue", "flush_secs"}
    ),
}
_KEYS = {"_target_", "_args_", "_partial_", "_convert_", "_recursive_"}  # Hydra's own
_NAME = re.compile(r"[A-Za-z]\w*(\.[A-Za-z]\w*)+")  # no part with an underscore in front


def trusted() -> tuple[str, ...]:
    """The packages (`mypackage.`) and names that the user vouches for."""
    words = [word.strip() for word in os.environ.get(TRUST, "").split(",")]
    return tuple(word for word in words if word)


@contextlib.contextmanager
def trusting(words: Iterable[str]) -> Iterator[list[str]]:
    """Take `trust=[a.,b.C]` out of the words of a command; within, those are trusted too."""
    words = list(words)
    mine = [word for word in words if word.startswith("trust=")]
    names = [name.strip() for word in mine for name in word[6:].strip("[]").split(",")]
    for name in filter(None, names):
        if not re.fullmatch(r"[A-Za-z_][\w.]*", name):
            raise UserError(f"trust={name}: expected a package (mypackage.) or a full name")
    before = os.environ.get(TRUST)
    if names := [name for name in names if name]:
        os.environ[TRUST] = ",".join([*trusted(), *names])
    try:
        yield [word for word in words if word not in mine]
    finally:
        if before is not None:
            os.environ[TRUST] = before
        else:
            os.environ.pop(TRUST, None)


def is_allowed(target: Any) -> bool:
    """Whether a config may name this; says nothing of whether it exists."""
    if not isinstance(target, str) or not _NAME.fullmatch(target):
        return isinstance(target, str) and is_vouched_for(target)
    if target in CLASSES or target in FUNCTIONS or is_vouched_for(target):
        return True
    return target.startswith(ROOMS) and not target.startswith(CLOSED)


def is_vouched_for(name: str) -> bool:
    if not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", name):
        return False
    return any(name == entry or name.startswith(entry.rstrip(".") + ".") for entry in trusted())


def check_nodes(content: Any, where: Callable[[tuple[str | int, ...]], str]) -> None:
    """Raises UserError for every node with a `_target_` that may not be built, unimported.

    Interpolations may stand in the content as text; as a `_target_` they are refused.
    """
    for place, node in nodes(content):
        target = node["_target_"]
        key = where((*place, "_target_"))
        if not is_allowed(target):
            raise _not_allowed(target, key)
        strange = [k for k in node if not isinstance(k, str) or k.startswith("_")]
        strange = [k for k in strange if k not in _KEYS]
        if strange:
            raise UserError(f"{key}={target}: {strange[0]} is not a key that a config may hold")
        for name in set(node) - _KEYS - ARGUMENTS.get(target, set(node)):
            raise UserError(f"{where((*place, name))} may not be set by a config")


def check_only(content: Any, prefixes: tuple[str, ...], what: str) -> None:
    """Raises UserError where a node of a checkpoint's config would build something else."""
    for place, node in nodes(content):
        target = str(node["_target_"])
        if not target.startswith(prefixes) and not is_vouched_for(target):
            key = ".".join(map(str, (*place, "_target_")))
            raise UserError(f"{key}: {target} is not allowed: it is no part of a {what}")


def nodes(
    content: Any, place: tuple[str | int, ...] = ()
) -> Iterator[tuple[tuple[str | int, ...], dict[str, Any]]]:
    """Every dict with a `_target_` and its place, from the outside in."""
    if isinstance(content, dict):
        if "_target_" in content:
            yield place, content
        for key, value in content.items():
            yield from nodes(value, (*place, key))
    elif isinstance(content, list | tuple):
        for index, value in enumerate(content):
            yield from nodes(value, (*place, index))


def resolve(target: Any, key: str = "_target_") -> Callable[..., Any]:
    """The class or function of a name that is allowed; one module is imported, nothing is walked.

    Raises UserError where it is not allowed, does not exist, or turns out to be something else: a
    module, a function of another package, a name that leads out of the package.
    """
    if not is_allowed(target):
        raise _not_allowed(target, key)
    module_name, _, name = target.rpartition(".")
    try:
        module = import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and (module_name + ".").startswith(error.name + "."):
            raise UserError(f"{key}={target}: there is no such class or function") from error
        raise UserError(f"{key}={target} cannot be imported: {error}") from error
    except Exception as error:  # whatever the module of a user's does wrong
        raise UserError(f"{key}={target} cannot be imported: {error}") from error
    found = getattr(module, name, None)
    if found is None:
        raise UserError(f"{key}={target}: there is no such class or function")
    if not _is_what_it_says(target, found):
        raise _not_allowed(target, key)
    return found


def _is_what_it_says(target: str, found: Any) -> bool:
    """By where it is defined, not only by its name: beit.data.x.os leads out of the package."""
    home = f"{getattr(found, '__module__', '')}.{getattr(found, '__qualname__', '')}"
    if target in CLASSES:
        return inspect.isclass(found)
    if is_vouched_for(target):
        return callable(found) and is_vouched_for(home)
    if target in FUNCTIONS:
        return inspect.isfunction(found) and home.startswith("beit.")
    built = inspect.isclass(found) and not issubclass(found, BaseException)
    return built and home.startswith(ROOMS) and not home.startswith(CLOSED)


def _not_allowed(target: Any, key: str) -> UserError:
    shown = str(target) if len(str(target)) < 100 else f"{str(target)[:100]}..."
    return UserError(
        f"{key}: {shown} is not allowed: a config names classes of beit's own rooms and a list of "
        "others; if you trust the package, say trust=[package.] on the command line"
    )

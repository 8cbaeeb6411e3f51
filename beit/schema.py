"""The roots of the configs: which keys there are, what they are and what they mean.

Hydra refuses an unknown key in a node that stands here.
"""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING


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
    labels_per_class: Any = "all"  # classification: on this many labelled images of each class
    labelled_images: Any = "all"  # segmentation: on this many images with label maps
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

"""The verbs of the command line as Python functions."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from beit import config, frozen, networks, runner
from beit.console import log_to_console
from beit.errors import UserError
from beit.explain import explained
from beit.interop import convert as interop
from beit.interop.weights import ReadReport, Settings
from beit.models.pyramid import checked_taps
from beit.predictor import open_predictor
from beit.recorded import from_checkpoint
from beit.security import targets
from beit.sizes import height_width


def train(*overrides: str) -> dict[str, float]:
    """Train as `beit train OVERRIDES` does. Returns the last metrics.

    Raises UserError for what the config gets wrong, before any training.
    """
    log_to_console()
    config.refuse_sweep(list(overrides))
    with targets.trusting(overrides) as words, explained(words):
        return runner.fit(config.compose(words), words)


def tokenize(*overrides: str) -> dict[str, int]:
    """Fill the token cache of the pretraining that `beit train OVERRIDES` would run.

    Returns how many views were worked out, of the training and the validation images, and how many
    were unreadable. What is in the cache stays, so an interrupted call is gone on with by another.

    Raises UserError for what the config gets wrong, and where it names no cache.
    """
    log_to_console()
    config.refuse_sweep(list(overrides))
    with targets.trusting(overrides) as words, explained(words):
        return runner.tokenize(config.compose(words))


def evaluate(
    checkpoint: str | Path,
    *overrides: str,
    output: str | Path | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Validation metrics of a checkpoint; overrides change the config it carries.

    Where the task measures each class by itself, `per_class` has a row for each.

    With `evaluation=linear_probe`, `knn` or `health` among the overrides its backbone is frozen and
    looked at through labelled images that the overrides name (`data=folder paths.data_dir=...`):
    the layer that does best, with what it was chosen on, and `rows` for each. Kept in the folder
    `output` as JSON, CSV and PNG, where nothing is written over without `overwrite`.
    """
    with targets.trusting(overrides) as words:
        if frozen.asked(words):
            with explained(words, config_name=frozen.CONFIG):
                return frozen.evaluate(checkpoint, words, output=output, overwrite=overwrite)
        if output is not None:
            raise UserError(f"output={output} is of evaluation=... alone: see beit evaluate --help")
        with explained(words):
            return runner.evaluate(from_checkpoint(checkpoint, words))


def predict(
    checkpoint: str | Path,
    images: str | Path,
    *changes: str,
    top_k: int = 5,
    batch_size: int = 32,
    output: str | Path | None = None,
    overwrite: bool = False,
    device: str = "auto",
) -> list[dict[str, Any]]:
    """What a checkpoint makes of an image file, or of each in a folder and below it.

    Of a classifier: the path and the `top_k` classes with scores. Of a segmentation: the path and
    the area of each class, with pictures in the folder `output`, where nothing is written over
    without `overwrite`; `changes` as in `inference=multiscale` say how it goes over the image. On
    the `device` of that name, "auto" for a GPU where there is one.
    """
    options: dict[str, Any] = {"top_k": top_k, "batch_size": batch_size}
    options |= {"output": output, "overwrite": overwrite}
    return list(open_predictor(checkpoint, changes, device=device).predict(images, **options))


def load_model(checkpoint: str | Path) -> nn.Module:
    """The trained network of a checkpoint, in eval mode on the CPU.

    A classifier (images -> logits) from fine-tuning, the task with backbone and head from
    pretraining, the tokenizer from tokenizer training. Also of files and folders of the official
    release, timm and Hugging Face; what became of their tensors is told on stderr.
    """
    log_to_console()
    return networks.load_model(checkpoint)


def convert(
    source: str | Path,
    to: str,
    output: str | Path,
    *,
    allow: Sequence[str] = (),
    num_heads: int | None = None,
    image_size: int | Sequence[int] | None = None,
    normalize: str | None = None,
    norm_eps: float | None = None,
    classes: Sequence[str] | None = None,
    taps: Sequence[int] | None = None,
) -> ReadReport:
    """Write the weights of a file or folder in another layout; returns what became of them.

    Args:
        source: ours, or of the official release (unilm), timm or Hugging Face: its content tells.
        to: "ours" (a .safetensors file), "unilm" (a .pth file), "timm" or "huggingface" (folders).
        output: never overwritten.
        allow: names, or beginnings, of tensors that may be left behind.
        num_heads, image_size, normalize ("half" or "imagenet"), norm_eps, classes: what the file
            does not tell, or other than it tells.
        taps: the same of segmentation: the four blocks, counted from 0, that the maps are of.

    Raises UserError for what is damaged, unknown or incomplete, and for what the other layout has
    no place for; nothing is written then.
    """
    settings = Settings(
        num_heads=num_heads,
        image_size=None if image_size is None else height_width(image_size),
        normalize=normalize,
        norm_eps=norm_eps,
        classes=None if classes is None else list(classes),
        taps=None if taps is None else checked_taps(taps),
        allow=tuple(allow),
    )
    return interop.convert(source, to, output, settings).report


def create_model(name: str, **changes: Any) -> nn.Module:
    """A fresh VisionTransformer of configs/model/NAME.yaml, with arguments changed by name.

    Raises UserError for a name that does not exist and for arguments the model does not take.
    """
    overrides = [f"model={name}"]
    with explained(overrides):
        cfg = config.compose(overrides, config_name="model")
        return config.instantiate(cfg.model, **changes)

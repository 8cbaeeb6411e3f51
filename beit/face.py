"""The verbs of the command line as Python functions."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException
from torch import nn

from beit import config, runner
from beit.console import log_to_console
from beit.errors import UserError
from beit.explain import explain
from beit.predictor import ImageClassifier
from beit.recorded import from_checkpoint


def train(*overrides: str) -> dict[str, float]:
    """Train as `beit train OVERRIDES` does. Returns the last metrics.

    Raises UserError for what the config gets wrong, before any training.
    """
    log_to_console()
    try:
        return runner.fit(config.compose(list(overrides)))
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(explain(error, list(overrides))) from error


def evaluate(checkpoint: str | Path, *overrides: str) -> dict[str, float]:
    """Validation metrics of a checkpoint; overrides change the config it carries."""
    return runner.evaluate(from_checkpoint(checkpoint, list(overrides)))


def predict(
    checkpoint: str | Path, images: str | Path, *, top_k: int = 5, batch_size: int = 32
) -> list[dict[str, Any]]:
    """For each image file (or each in a folder): its path and its `top_k` classes with scores."""
    return list(iterate_predictions(checkpoint, images, top_k=top_k, batch_size=batch_size))


def iterate_predictions(
    checkpoint: str | Path, images: str | Path, *, top_k: int, batch_size: int
) -> Iterator[dict[str, Any]]:
    """Like `predict`, one image after the other, for folders of any size."""
    return ImageClassifier.from_checkpoint(checkpoint).predict(
        images, top_k=top_k, batch_size=batch_size
    )


def load_model(checkpoint: str | Path) -> nn.Module:
    """The trained network of a checkpoint, in eval mode on the CPU.

    A classifier (images -> logits) from fine-tuning, the task with backbone and head from
    pretraining, the tokenizer from tokenizer training.
    """
    return runner.load_model(checkpoint)


def create_model(name: str, **changes: Any) -> nn.Module:
    """A fresh VisionTransformer of configs/model/NAME.yaml, with arguments changed by name."""
    overrides = [f"model={name}"]
    cfg = config.compose(overrides, config_name="model")
    return config.instantiate(cfg.model, **changes)

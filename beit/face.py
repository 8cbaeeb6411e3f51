"""The verbs of the command line as Python functions."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from beit import config, runner
from beit.console import log_to_console
from beit.explain import explained
from beit.predictor import ImageClassifier
from beit.recorded import from_checkpoint


def train(*overrides: str) -> dict[str, float]:
    """Train as `beit train OVERRIDES` does. Returns the last metrics.

    Raises UserError for what the config gets wrong, before any training.
    """
    log_to_console()
    config.refuse_sweep(list(overrides))
    with explained(list(overrides)):
        return runner.fit(config.compose(list(overrides)))


def evaluate(checkpoint: str | Path, *overrides: str) -> dict[str, float]:
    """Validation metrics of a checkpoint; overrides change the config it carries."""
    with explained(list(overrides)):
        return runner.evaluate(from_checkpoint(checkpoint, list(overrides)))


def predict(
    checkpoint: str | Path, images: str | Path, *, top_k: int = 5, batch_size: int = 32
) -> list[dict[str, Any]]:
    """For each image file (or each in a folder): its path and its `top_k` classes with scores."""
    return list(iterate_predictions(checkpoint, images, top_k=top_k, batch_size=batch_size))


def iterate_predictions(
    checkpoint: str | Path, images: str | Path, *, top_k: int, batch_size: int
) -> Iterator[dict[str, Any]]:
    """Like `predict`, one image after the other, for folders of any size.

    A checkpoint or images that are not there are refused here, not at the first record.
    """
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
    """A fresh VisionTransformer of configs/model/NAME.yaml, with arguments changed by name.

    Raises UserError for a name that does not exist and for arguments the model does not take.
    """
    overrides = [f"model={name}"]
    with explained(overrides):
        cfg = config.compose(overrides, config_name="model")
        return config.instantiate(cfg.model, **changes)

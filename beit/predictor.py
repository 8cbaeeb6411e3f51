"""A trained network applied to image files; which one, the checkpoint's task says."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from beit import config, networks
from beit.checkpoints.models import Checkpoint
from beit.data.file_sources import find_images, open_image
from beit.data.images import UnreadableImage
from beit.errors import UserError
from beit.interop.convert import any_checkpoint
from beit.security import targets

CPU = torch.device("cpu")


class Predictor(Protocol):
    """One record, of plain data, for each image file."""

    makes_files: bool  # into a folder; else the records are all

    def predict(
        self,
        images: str | Path,
        *,
        top_k: int,
        batch_size: int,
        output: str | Path | None,
        overwrite: bool,
    ) -> Iterator[dict[str, Any]]:
        """Raises UserError, at once and not with the first record, where it cannot begin."""
        ...


def open_predictor(
    path: str | Path, changes: Sequence[str] = (), *, device: str = "auto"
) -> Predictor:
    """What the checkpoint's task makes of images, in float32.

    `changes` are words of a segmentation's config: `inference=multiscale`, `views.eval.KEY=VALUE`.
    `device` is "auto" for a GPU where there is one (not run by us), or torch's name of one.

    Raises UserError for a task that predicts nothing, for changes that it does not know, and for a
    device that is not there.
    """
    from beit.segmenter import CHANGED, ImageSegmenter  # which builds on this module

    place = _device(device)
    checkpoint = any_checkpoint(path, tell="nothing")
    predictors: dict[str, Callable[..., Predictor]] = {
        "classification": ImageClassifier.from_checkpoint,
        "linear_probe": ImageClassifier.from_checkpoint,
        "segmentation": partial(ImageSegmenter.from_checkpoint, changes=changes),
    }
    task = checkpoint.config.get("task_name")
    if task not in predictors:
        raise UserError(
            f"{path} is a checkpoint of task {task}, which has no classes to predict: give one of "
            f"task {' or '.join(predictors)}"
        )
    if changes and task != "segmentation":
        raise UserError(
            f"{changes[0]}: a checkpoint of task {task} has nothing to change here; of a "
            f"segmentation {', '.join(CHANGED)} can be"
        )
    return predictors[task](path, device=place)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"device={name}: expected auto, cpu, or a GPU as in cuda:0 ({reason})"
        ) from error


def transform_of(checkpoint: Checkpoint) -> Any:
    """The transform that the run evaluated with. Raises UserError where the config has none."""
    node = (checkpoint.config.get("views") or {}).get("eval")
    if node is None:
        raise UserError(f"{checkpoint.path}: its config has no views.eval to prepare images by")
    targets.check_only(node, targets.TRANSFORMS, "transform")
    return config.instantiate(node)


class ImageClassifier:
    """Images in, classes with scores out.

    Args:
        model: images (B, 3, H, W), normalised -> logits (B, K).
        transform: PIL image -> (3, H, W) float, the evaluation transform of the training run.
        classes: K names, or None for numbers.
        device: on which the model runs.
    """

    makes_files = False

    def __init__(
        self,
        model: nn.Module,
        transform: Any,
        classes: list[str] | None,
        *,
        device: torch.device = CPU,
    ) -> None:
        self.model, self.device = model.eval().to(device), device
        self.transform = transform
        self.classes = classes

    @classmethod
    def from_checkpoint(cls, path: str | Path, *, device: torch.device = CPU) -> "ImageClassifier":
        """Rebuild the classifier of a fine-tuning run."""
        checkpoint = any_checkpoint(path, tell="nothing")
        transform = transform_of(checkpoint)
        return cls(networks.load_model(path), transform, checkpoint.classes, device=device)

    def predict(
        self,
        images: str | Path,
        *,
        top_k: int,
        batch_size: int,
        output: str | Path | None = None,
        overwrite: bool = False,
    ) -> Iterator[dict[str, Any]]:
        """One record per image: `path`, and `top` of {class, index, score}, the best first.

        An image that cannot be read yields `path` and `error`. Raises UserError, at once and not
        with the first record, where there are no images.
        """
        if output is not None:
            raise UserError(f"output={output}: a classifier makes no files, its records are all")
        return self._records(find_images(images), top_k, batch_size)

    def _records(
        self, paths: Sequence[Path], top_k: int, batch_size: int
    ) -> Iterator[dict[str, Any]]:
        for start in range(0, len(paths), batch_size):
            yield from self._predict_batch(paths[start : start + batch_size], top_k)

    @torch.inference_mode()
    def _predict_batch(self, paths: Sequence[Path], top_k: int) -> list[dict[str, Any]]:
        records: dict[Path, dict[str, Any]] = {}
        readable, tensors = [], []
        for path in paths:
            try:
                tensors.append(self.transform(open_image(path)))
                readable.append(path)
            except UnreadableImage as error:
                records[path] = {"path": str(path), "error": str(error)}
        if tensors:
            scores = self.model(torch.stack(tensors).to(self.device)).float().softmax(dim=-1)
            best = scores.topk(min(top_k, scores.shape[1]), dim=-1)
            for path, values, indices in zip(readable, best.values, best.indices, strict=True):
                top = [
                    {"class": self._name(i), "index": i, "score": round(value, 6)}
                    for value, i in zip(values.tolist(), indices.tolist(), strict=True)
                ]
                records[path] = {"path": str(path), "top": top}
        return [records[path] for path in paths]

    def _name(self, index: int) -> str:
        return self.classes[index] if self.classes else str(index)

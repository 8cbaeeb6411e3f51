"""A trained classifier applied to image files."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from beit import config, runner
from beit.data.file_sources import find_images, open_image
from beit.data.images import UnreadableImage
from beit.errors import UserError
from beit.interop.convert import any_checkpoint
from beit.security import targets


class ImageClassifier:
    """Images in, classes with scores out.

    Args:
        model: images (B, 3, H, W), normalised -> logits (B, K).
        transform: PIL image -> (3, H, W) float, the evaluation transform of the training run.
        classes: K names, or None for numbers.
    """

    def __init__(self, model: nn.Module, transform: Any, classes: list[str] | None) -> None:
        self.model = model.eval()
        self.transform = transform
        self.classes = classes

    @classmethod
    def from_checkpoint(cls, path: str | Path) -> "ImageClassifier":
        """Rebuild the classifier of a fine-tuning run; UserError for any other checkpoint."""
        checkpoint = any_checkpoint(path, tell="nothing")
        views = checkpoint.config.get("views") or {}
        if "eval" not in views:
            raise UserError(
                f"{path} is a checkpoint of task {checkpoint.config.get('task_name')}, which has "
                "no classes to predict: give one of task classification"
            )
        targets.check_only(views["eval"], targets.TRANSFORMS, "transform")
        transform = config.instantiate(views["eval"])
        return cls(runner.load_model(path), transform, checkpoint.classes)

    def predict(
        self, images: str | Path, *, top_k: int, batch_size: int
    ) -> Iterator[dict[str, Any]]:
        """One record per image: `path`, and `top` of {class, index, score}, the best first.

        An image that cannot be read yields `path` and `error`. Raises UserError, at once and not
        with the first record, where there are no images.
        """
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
            scores = self.model(torch.stack(tensors)).float().softmax(dim=-1)
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

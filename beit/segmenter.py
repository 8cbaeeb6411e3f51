"""A trained segmentation network applied to image files: coloured pictures, ids and areas."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from beit import config
from beit.checkpoints.models import Checkpoint
from beit.data.class_sets import checked_colours, voc_palette
from beit.data.file_sources import find_images, open_image
from beit.data.images import UnreadableImage
from beit.data.limits import checked_normalisation
from beit.errors import UserError
from beit.files import explained, replace_text, replacing
from beit.interop.convert import any_checkpoint
from beit.interop.fields import Fields
from beit.networks import network_of
from beit.predictor import CPU, transform_of
from beit.recorded import from_checkpoint

# what `predict` may change of a run's config
CHANGED = ("inference", "views.eval", "model.any_size")
OPACITY = 0.5  # of the classes' colours over the image


class Files(NamedTuple):
    """What is made of an image."""

    overlay: Path
    ids: Path
    areas: Path


class ImageSegmenter:
    """Images in; for each a coloured overlay, its class ids as PNG, and the area of each class.

    Args:
        model: with `predict(image (3, h, w), size) -> ids (H0, W0)`.
        transform: PIL image -> uint8 (3, h, w), the evaluation transform of the training run.
        mean, std: of the normalisation, RGB.
        classes: K names.
        palette: (K, 3) uint8.
        device: on which the model runs.
    """

    makes_files = True

    def __init__(
        self,
        model: nn.Module,
        transform: Any,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        classes: list[str],
        palette: np.ndarray,
        device: torch.device = CPU,
    ) -> None:
        self.model: Any = model.eval().to(device)
        self.device = device
        self.transform = transform
        mean, std = checked_normalisation(mean, std)
        self.mean, self.std = (torch.tensor(x)[:, None, None] for x in (mean, std))
        self.classes = classes
        self.palette = palette
        self._type = np.uint8 if len(classes) <= 256 else np.uint16  # of the ids' pictures

    @classmethod
    def from_checkpoint(
        cls, path: str | Path, changes: Sequence[str] = (), *, device: torch.device = CPU
    ) -> "ImageSegmenter":
        """Rebuild the network of a segmentation run, with the colours that it recorded.

        `changes` are words of its config in the groups `CHANGED`. Raises UserError for others, and
        for windows that the network does not take or that cannot fit into memory.
        """
        checkpoint = any_checkpoint(path, tell="nothing")
        if changes:
            changed = config.plain(from_checkpoint(path, _checked(changes)))
            checkpoint = replace(checkpoint, config=changed)
        transform, model = transform_of(checkpoint), network_of(checkpoint)
        model.check(device)
        normalize = Fields(checkpoint.config, checkpoint.path).inner("normalize")
        count: int = model.head.num_classes
        return cls(
            model,
            transform,
            mean=normalize.numbers("mean", (0.0, 0.0, 0.0)),
            std=normalize.numbers("std", (1.0, 1.0, 1.0)),
            classes=checkpoint.classes or [str(number) for number in range(count)],
            palette=_palette(checkpoint, count),
            device=device,
        )

    def predict(
        self,
        images: str | Path,
        *,
        top_k: int = 0,
        batch_size: int = 1,
        output: str | Path | None,
        overwrite: bool,
    ) -> Iterator[dict[str, Any]]:
        """One record per image: `path`, `files`, and `areas` of {class, index, pixels, share}.

        The files lie in the folder `output`, as the images do in theirs: NAME.overlay.png, NAME.png
        with the ids, NAME.json with the areas, largest first. An image that cannot be read yields
        `path` and `error`. Images are taken one at a time.

        Raises UserError, at once and not with the first record, where there are no images, where a
        file is there already and it was not said to `overwrite`, or where one would be written over
        an image or over another image's.
        """
        if output is None:
            raise UserError("output has no value: give the folder for the pictures, output=FOLDER")
        paths = find_images(images)
        files = _names(paths, Path(images).expanduser(), Path(output).expanduser())
        _check_places(paths, files, output=output, overwrite=overwrite)
        return (self._record(path, place) for path, place in zip(paths, files, strict=True))

    def _record(self, path: Path, files: Files) -> dict[str, Any]:
        try:
            image = open_image(path)
        except UnreadableImage as error:
            return {"path": str(path), "error": str(error)}
        ids = self.ids(image)
        record = {
            "path": str(path),
            "width": image.width,
            "height": image.height,
            "files": {name: str(file) for name, file in files._asdict().items()},
            "areas": self._areas(ids),
        }
        _save(files.overlay, overlay(image, ids, self.palette))
        _save(files.ids, Image.fromarray(ids.astype(self._type)))
        with explained(files.areas):
            replace_text(files.areas, json.dumps(record, indent=2) + "\n")
        return record

    @torch.inference_mode()
    def ids(self, image: Image.Image) -> np.ndarray:
        """Class ids (H, W) int16 of an RGB image."""
        pixels: Tensor = self.transform(image)
        normal = (pixels.float() / 255 - self.mean) / self.std
        ids = self.model.predict(normal.to(self.device), (image.height, image.width))
        return ids.cpu().numpy()

    def _areas(self, ids: np.ndarray) -> list[dict[str, Any]]:
        counts = np.bincount(ids.ravel(), minlength=len(self.classes))
        return [
            {
                "class": self.classes[i],
                "index": i,
                "pixels": int(counts[i]),
                "share": round(counts[i] / ids.size, 6),
            }
            for i in np.argsort(-counts, kind="stable").tolist()
            if counts[i]
        ]


def _checked(changes: Sequence[str]) -> list[str]:
    for word in changes:
        key = word.partition("=")[0]
        if not any(key == group or key.startswith(f"{group}.") for group in CHANGED):
            raise UserError(
                f"{word}: of a segmentation's config {', '.join(CHANGED)} can be changed here, "
                "as in inference=multiscale or inference.stride=128"
            )
    return list(changes)


def overlay(image: Image.Image, ids: np.ndarray, palette: np.ndarray) -> Image.Image:
    """The image with its classes' colours over it."""
    return Image.blend(image, Image.fromarray(palette[ids]), OPACITY)


def _palette(checkpoint: Checkpoint, count: int) -> np.ndarray:
    """(K, 3) uint8, as the run recorded it; VOC's colours where it recorded none."""
    recorded = checkpoint.entry.get("palette")
    if recorded is None:
        return voc_palette(count)
    try:
        palette = checked_colours("palette", recorded)
    except TypeError:
        palette = np.empty((0, 3), dtype=np.uint8)
    if len(palette) != count:
        raise UserError(f"{checkpoint.path}: its palette is not of {count} colours")
    return palette


def _names(paths: Sequence[Path], images: Path, output: Path) -> list[Files]:
    """Where the files of each image go; one that shares its name keeps the ending too."""
    relative = [Path(path.name) if path == images else path.relative_to(images) for path in paths]
    stems = [path.with_suffix("") for path in relative]
    alike, found = Counter(stems), []
    for path, stem in zip(relative, stems, strict=True):
        base = str(output / (stem if alike[stem] == 1 else path))
        found.append(Files(*(Path(base + end) for end in (".overlay.png", ".png", ".json"))))
    return found


def _check_places(
    paths: Sequence[Path], files: Sequence[Files], *, output: str | Path, overwrite: bool
) -> None:
    """Raises UserError where a file would be written over something that is to be kept."""
    counts = Counter(file for one in files for file in one)
    if twice := [file for file, count in counts.items() if count > 1]:
        raise UserError(
            f"output={output}: {twice[0].name} would be made of two images; rename one of them"
        )
    there = [file for file in counts if file.exists()]
    images = {path.resolve() for path in paths} if there else set()
    for file in there:
        if file.resolve() in images:  # whatever may be written over
            raise UserError(
                f"output={output}: {file.name} is one of the images; give a folder apart from them"
            )
    if there and not overwrite:
        raise UserError(
            f"output={output} has {there[0].name} already: give another folder, or say "
            "overwrite=true"
        )


def _save(path: Path, image: Image.Image) -> None:
    with explained(path), replacing(path) as file:
        image.save(file, format="PNG")

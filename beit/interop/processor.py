"""How Hugging Face's BeitImageProcessor and our evaluation transform say the same."""

import math
from typing import Any

from beit.data.pixels import INTERPOLATIONS
from beit.errors import UserError
from beit.interop.fields import Fields
from beit.interop.weights import HALF, NORMALIZATIONS, Preprocessing, Settings, Weights

FILTERS = {int(value): name for name, value in INTERPOLATIONS.items()}  # Pillow's numbers


def preprocessing(
    found: Fields | None, image_size: tuple[int, int], settings: Settings, notes: list[str]
) -> Preprocessing:
    """From preprocessor_config.json; without one the defaults of BeitImageProcessor.

    Raises UserError for steps that our evaluation has no place for.
    """
    if found is None:
        notes.append("no preprocessor_config.json: the defaults of BeitImageProcessor are taken")
        found = Fields({}, "preprocessor_config.json")
    mean, std = found.numbers("image_mean", HALF), found.numbers("image_std", HALF)
    if not found.flag("do_normalize", True):
        mean, std = (0.0,) * 3, (1.0,) * 3
    if settings.normalize:
        mean, std = NORMALIZATIONS[settings.normalize]
    factor = found.number("rescale_factor", 1 / 255)
    if not found.flag("do_rescale", True) or not math.isclose(factor, 1 / 255, rel_tol=1e-3):
        raise found.wrong("rescale_factor", "1/255: pixels of 0 to 255 made 0 to 1")
    if not found.flag("do_resize", True):
        notes.append("the processor does not resize; our evaluation resizes to the model's size")
        return Preprocessing(mean=mean, std=std, crop_pct=1.0, crop_mode="squash")
    number = found.content.get("resample", 3)
    if type(number) is not int or number not in FILTERS:
        raise found.wrong("resample", f"Pillow's number of one of {', '.join(FILTERS.values())}")
    share, squash = _crop(found, image_size, notes)
    return Preprocessing(
        mean=mean,
        std=std,
        interpolation=FILTERS[number],
        crop_pct=share,
        crop_mode="squash" if squash else "center",
    )


def _crop(found: Fields, image_size: tuple[int, int], notes: list[str]) -> tuple[float, bool]:
    """(crop_pct, whether the sides are resized each by itself)."""
    default = {"height": image_size[0], "width": image_size[1]}
    size = found.content.get("size", default)
    squash = not (isinstance(size, dict) and "shortest_edge" in size)
    if squash:
        resized = found.size("size", default)
    else:
        resized = (found.inner("size").whole("shortest_edge"),) * 2
    cropped = found.flag("do_center_crop", False)
    final = found.size("crop_size", default) if cropped else resized
    if final != image_size:
        notes.append(
            f"the processor makes images of {final[0]}x{final[1]}, the model takes "
            f"{image_size[0]}x{image_size[1]}: evaluation takes the model's size"
        )
        return 1.0, squash
    return share_of(final[0], resized[0]), squash


def share_of(size: int, resized: int) -> float:
    """The crop_pct by which `int(size / crop_pct)` is `resized`, exactly."""
    if resized < size:
        raise UserError(
            f"an image of {resized} pixels has no centre of {size}; expected crop <= size"
        )
    share = size / resized
    return share if int(size / share) == resized else math.nextafter(share, 0.0)


def processor(weights: Weights) -> dict[str, Any]:
    """preprocessor_config.json for BeitImageProcessor."""
    plain, (height, width) = weights.preprocessing, weights.architecture.image_size
    squash = plain.crop_mode == "squash"
    tall, wide = int(height / plain.crop_pct), int(width / plain.crop_pct)
    return {
        "image_processor_type": "BeitImageProcessor",
        "do_resize": True,
        "size": {"height": tall, "width": wide} if squash else {"shortest_edge": tall},
        "resample": int(INTERPOLATIONS[plain.interpolation]),
        "do_center_crop": not squash or plain.crop_pct < 1,
        "crop_size": {"height": height, "width": width},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(plain.mean),
        "image_std": list(plain.std),
        "do_reduce_labels": weights.labels.reduce_zero,
    }

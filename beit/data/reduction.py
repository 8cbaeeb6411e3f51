"""Of a JPEG no more pixels than a crop needs: by how many fewer, and where the crop lies then."""

import math
from typing import NamedTuple

from PIL import Image

from beit.data.images import LazyJpeg
from beit.data.pixels import CropBox

REDUCTIONS = (8, 4, 2)  # of each side, in which libjpeg can read


class Part(NamedTuple):
    """A crop and the image that it is to be taken from.

    Of a reduced image a crop may begin and end between two pixels.
    """

    image: Image.Image  # RGB, as a whole
    box: CropBox  # the whole pixels that hold the crop
    inside: tuple[float, float, float, float] | None = None
    """Left, top, right and bottom of the crop within the box; None: it is the box."""


def reduction(box: CropBox, *sizes: tuple[int, int]) -> int:
    """The largest that leaves the box as many pixels as each of `sizes`, (H, W), or more.

    In either direction: no crop is enlarged that would not have been. 1 where there is none.
    """
    height, width = (max(sides) for sides in zip(*sizes, strict=True))
    fitting = (by for by in REDUCTIONS if box.height >= by * height and box.width >= by * width)
    return next(fitting, 1)


def part(image: Image.Image | LazyJpeg, box: CropBox, mirrored: bool, *, reduced_by: int) -> Part:
    """The crop `box` of an image, of the mirrored one if mirrored, in its own full-size pixels.

    An image that was read already is taken as it is. Raises UnreadableImage.
    """
    if isinstance(image, Image.Image):
        return Part(image, box)
    if reduced_by == 1:
        return Part(image.read(), box)
    reduced = image.read(reduced_by)
    x, y = image.origin(reduced_by)
    if mirrored:
        x = reduced.width - image.size[0] / reduced_by - x
    # powers of two: nothing is rounded here
    left, top = x + box.left / reduced_by, y + box.top / reduced_by
    right, bottom = left + box.width / reduced_by, top + box.height / reduced_by
    first = math.floor(left), math.floor(top)
    whole = CropBox(first[1], first[0], math.ceil(bottom) - first[1], math.ceil(right) - first[0])
    inside = left - first[0], top - first[1], right - first[0], bottom - first[1]
    return Part(reduced, whole, inside)

"""Inference on images of any size: sliding windows, the whole image, several scales.

The network answers at its head's own stride, for BEiT a sixteenth of the pixels, and that is what
is kept of a window. Only for the band of rows that is being decided are the windows' logits brought
to pixels, averaged and brought to the original size. So the 7 GB that 150 classes take on a
photograph of 4000x3000 never exist at once.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from beit.errors import UserError
from beit.evaluation.resizing import resized_rows, source_rows
from beit.sizes import height_width

# images (B, 3, h, w) -> logits (B, K, h', w'), at the pixels or at a coarser stride
Network = Callable[[Tensor], Tensor]

BAND_BYTES = 64 * 2**20  # of one float32 (K, rows, W) while a band is decided; a few exist at once


class Inference:
    """From an image to its classes; a subclass says as which views the network sees it."""

    def largest_pass(self) -> tuple[tuple[int, int], int] | None:
        """(H, W) and number of windows in a forward pass; None where the images decide."""
        return None

    def views(self, network: Network, image: Tensor) -> list["Windows"]:
        """The views of an image (3, h, w), normalised."""
        raise NotImplementedError

    def __call__(self, network: Network, image: Tensor, size: tuple[int, int]) -> Tensor:
        """Class ids (H0, W0) int16 of an image (3, h, w), normalised, at its original `size`."""
        return torch.cat(
            [s.argmax(dim=0).to(torch.int16) for s in self.scores(network, image, size)]
        )

    def scores(self, network: Network, image: Tensor, size: tuple[int, int]) -> Iterator[Tensor]:
        """Scores at the original `size` in bands (K, rows, W0) from the top.

        Logits of a single view; of several, the mean of their probabilities.
        """
        views = self.views(network, image)
        for begin, end in _bands(size, views):
            if len(views) == 1:
                yield views[0].resized(begin, end, size)
            else:
                parts = (view.resized(begin, end, size).softmax(dim=0) for view in views)
                yield sum(parts, start=torch.tensor(0.0)) / len(views)


class SlidingWindow(Inference):
    """Windows of one size at a fixed stride, the last ones clamped to the border.

    Where windows overlap their logits are averaged. An image smaller than a window is padded with
    zeros (the mean colour) below and to the right. mmsegmentation's `slide` mode; BEiT's configs
    have 512 with stride 341, and 640 with 426.

    Args:
        window: pixels, one side or (H, W): the model's image size.
        stride: pixels between windows, one number or (vertical, horizontal).
        windows_per_pass: windows in one forward pass.

    Raises:
        UserError: a stride that leaves gaps, or no windows in a pass.
    """

    def __init__(
        self, window: int | Sequence[int], *, stride: int | Sequence[int], windows_per_pass: int
    ) -> None:
        self.window = height_width(window, "window")
        self.stride = height_width(stride, "stride")
        self.windows_per_pass = windows_per_pass
        if any(step > side for step, side in zip(self.stride, self.window)):
            raise UserError(
                f"stride {self.stride} leaves gaps between windows of {self.window}: expected at "
                "most the window"
            )
        if windows_per_pass < 1:
            raise UserError(f"windows_per_pass {windows_per_pass} must be at least 1")

    def largest_pass(self) -> tuple[tuple[int, int], int]:
        return self.window, self.windows_per_pass

    def views(self, network: Network, image: Tensor) -> list["Windows"]:
        return [Windows(network, image, self.window, self.stride, self.windows_per_pass)]

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(window={self.window}, stride={self.stride}, "
            f"{self.windows_per_pass} windows per pass)"
        )


class WholeImage(Inference):
    """The image in one piece, padded with zeros below and to the right to a `multiple` of pixels.

    For a model that takes images of any size (`model.any_size`), or of just this one.

    Args:
        multiple: pixels, the model's patch size.
    """

    def __init__(self, multiple: int) -> None:
        if multiple < 1:
            raise UserError(f"multiple {multiple} must be at least 1")
        self.multiple = multiple

    def views(self, network: Network, image: Tensor) -> list["Windows"]:
        height, width = (-(-side // self.multiple) * self.multiple for side in image.shape[1:])
        return [Windows(network, image, (height, width), (height, width), 1)]

    def __repr__(self) -> str:
        return f"WholeImage(multiple={self.multiple})"


class MultiScale(SlidingWindow):
    """Sliding windows over the image at several scales, and mirrored: the mean of probabilities.

    A scale whose short side would be below the window is lifted to it, as BEiT's configs do
    (`SETR_Resize`): at the usual sizes 0.5 and 0.75 then equal 1, which so counts three times.

    Args:
        window, stride, windows_per_pass: of `SlidingWindow`.
        short_side: pixels of the image's short side at ratio 1; "original": as it is given.
        ratios: 0.5, 0.75, 1, 1.25, 1.5, 1.75 in the original.
        flip: whether each scale is seen mirrored too.

    Raises:
        UserError: no ratios, or one that is not positive; no side; what `SlidingWindow` raises.
    """

    def __init__(
        self,
        window: int | Sequence[int],
        *,
        stride: int | Sequence[int],
        windows_per_pass: int,
        short_side: int | Literal["original"],
        ratios: Sequence[float],
        flip: bool,
    ) -> None:
        super().__init__(window, stride=stride, windows_per_pass=windows_per_pass)
        if not ratios or min(ratios) <= 0:
            raise UserError(f"ratios {list(ratios)} must be positive numbers, at least one")
        if short_side != "original" and short_side < 1:
            raise UserError(f"short_side {short_side!r}: expected pixels, or original")
        self.short_side = short_side
        self.ratios = tuple(ratios)
        self.flip = flip

    def sizes(self, height: int, width: int) -> list[tuple[int, int]]:
        """(H, W) of each scale of an image."""
        short = min(height, width)
        base = short if isinstance(self.short_side, str) else self.short_side
        scales = [max(min(self.window), ratio * base) / short for ratio in self.ratios]
        return [(int(height * scale + 0.5), int(width * scale + 0.5)) for scale in scales]

    def views(self, network: Network, image: Tensor) -> list["Windows"]:
        sizes = self.sizes(*image.shape[1:])
        # what is enlarged is so strip by strip, what is made smaller at once: its filter is wider
        pictures = [(_shrunk(image, size), size) for size in sizes]
        options = (self.window, self.stride, self.windows_per_pass)
        return [
            Windows(network, picture, *options, size=size, mirrored=mirrored)
            for mirrored in ((False, True) if self.flip else (False,))
            for picture, size in pictures
        ]

    def __repr__(self) -> str:
        return (
            f"{super().__repr__()[:-1]}, short_side={self.short_side}, ratios={self.ratios}, "
            f"flip={self.flip})"
        )


class Windows:
    """One view of an image: averaged logits of any of its rows, worked out as they are asked for.

    Asked for from the top down, each window is seen once, and no more rows of windows are kept than
    the rows asked for lie in.

    Args:
        image: (3, h, w).
        size: (H, W) of the view, to which the image is enlarged as its strips are needed; None:
            the image's own. Smaller than a window the view is padded with zeros.
        mirrored: the network sees the mirror image; `resized` mirrors back.
    """

    def __init__(
        self,
        network: Network,
        image: Tensor,
        window: tuple[int, int],
        stride: tuple[int, int],
        per_pass: int,
        *,
        size: tuple[int, int] | None = None,
        mirrored: bool = False,
    ) -> None:
        self.network, self.image, self.window, self.per_pass = network, image, window, per_pass
        self.mirrored = mirrored
        self.height, self.width = size or image.shape[1:]
        padded = max(self.height, window[0]), max(self.width, window[1])
        self.padded_width = padded[1]
        self.tops, self.lefts = (offsets(*sides) for sides in zip(padded, window, stride))
        self._kept: dict[int, Tensor] = {}  # row of windows -> logits (windows, K, h', w')

    @property
    def num_classes(self) -> int:
        kept = self._kept or {0: self._logits(0)}
        return next(iter(kept.values())).shape[1]

    def resized(self, begin: int, end: int, size: tuple[int, int]) -> Tensor:
        """Rows begin ... end-1 (K, rows, W0) of the logits at the original size, unmirrored."""
        first, after = source_rows(begin, end, height=self.height, target=size[0])
        part = self.rows(first, after)
        found = resized_rows(part, first, begin, end, height=self.height, target=size)
        return found.flip(-1) if self.mirrored else found

    def rows(self, begin: int, end: int) -> Tensor:
        """Rows begin ... end-1 (K, rows, w) of the logits at the view's own size, float32."""
        height, width = self.window
        tops = [(i, top) for i, top in enumerate(self.tops) if top < end and top + height > begin]
        self._kept = {i: self._logits(i) for i, _ in tops}  # what lies above is let go
        device = self.image.device
        total = torch.zeros(self.num_classes, end - begin, self.padded_width, device=device)
        over_row = torch.zeros(end - begin, 1, device=device)  # windows that a row lies in
        over_column = torch.zeros(self.padded_width, device=device)
        for left in self.lefts:
            over_column[left : left + width] += 1
        for i, top in tops:
            first, after = max(begin, top), min(end, top + height)
            over_row[first - begin : after - begin] += 1
            for left, logits in zip(self.lefts, self._kept[i]):
                part = _pixels(logits, first - top, after - top, self.window)
                total[:, first - begin : after - begin, left : left + width] += part
        return total.div_(over_row * over_column)[:, :, : self.width]

    def _logits(self, row: int) -> Tensor:
        """Logits (windows, K, h', w') of a row of windows, as the network gives them."""
        if row not in self._kept:
            width, strip = self.window[1], self._strip(self.tops[row])
            windows = [strip[:, :, left : left + width] for left in self.lefts]
            passes = [
                self.network(torch.stack(windows[i : i + self.per_pass]))
                for i in range(0, len(windows), self.per_pass)
            ]
            self._kept[row] = torch.cat(passes)
        return self._kept[row]

    def _strip(self, top: int) -> Tensor:
        """The view's rows (3, window, padded width) from `top` on, as the network sees them."""
        end, own = min(top + self.window[0], self.height), self.image.shape[1]
        first, after = source_rows(top, end, height=own, target=self.height)
        part, size = self.image[:, first:after], (self.height, self.width)
        rows = resized_rows(part, first, top, end, height=own, target=size)
        rows = rows.flip(-1) if self.mirrored else rows
        missing = self.padded_width - self.width, self.window[0] - rows.shape[1]
        return F.pad(rows, (0, missing[0], 0, missing[1]))


def offsets(length: int, window: int, stride: int) -> list[int]:
    """Where windows begin along a side of at least a window: every stride, the last at the end."""
    count = max(0, length - window + stride - 1) // stride + 1
    return [min(i * stride, length - window) for i in range(count)]


def _pixels(logits: Tensor, begin: int, end: int, window: tuple[int, int]) -> Tensor:
    """Rows begin ... end-1 of a window's logits (K, h', w'), at the window's pixels."""
    height = logits.shape[1]
    first, after = source_rows(begin, end, height=height, target=window[0])
    part = logits[:, first:after].float()
    return resized_rows(part, first, begin, end, height=height, target=window)


def _bands(size: tuple[int, int], views: Sequence[Windows]) -> Iterator[tuple[int, int]]:
    """Rows of the original size that are decided together."""
    # a band costs its rows at the original size and those of the view it is made of
    row = size[1] + max(view.padded_width * view.height / size[0] for view in views)
    count = max(1, int(BAND_BYTES / (4 * views[0].num_classes * row)))
    return ((begin, min(begin + count, size[0])) for begin in range(0, size[0], count))


def _shrunk(image: Tensor, size: tuple[int, int]) -> Tensor:
    """The image (3, h, w) at `size`, or as it is where that is no smaller."""
    if size[0] >= image.shape[1] and size[1] >= image.shape[2]:
        return image
    return F.interpolate(
        image[None], size=size, mode="bilinear", align_corners=False, antialias=True
    )[0]

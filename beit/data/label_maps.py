"""Label maps: from the values that files hold to classes 0..K-1 and IGNORED.

Inside the program a label map is int16 (H, W). What the files hold instead (255 for pixels that do
not count, 0 for "other", Cityscapes' own numbers, colours) is turned into that where they are read.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageFile, ImageOps

from beit.data.class_sets import checked_colours, class_set
from beit.data.images import named_if_broken
from beit.data.limits import whole_number
from beit.data.opening import decode, open_header, read_file
from beit.errors import UserError

IGNORED = -1  # no class: takes no part in loss or metrics
MAX_ID = 65535  # of a 16-bit file
_UNKNOWN = -2  # in the table alone: a value that is an error

LabelMap = Any  # np.ndarray int16 (H, W); to KeyedDataset it is one kind of label among others


class LabelIds:
    """What the values in label files mean.

    Read as numbers: grey files of 1 to 16 bits, the indices of palette files, RGB files whose three
    channels are the same. Alpha is dropped. Other RGB files are refused, unless `colors` says what
    number each colour stands for; then all RGB files are read by it, and palette files by the
    colours of their palettes.

    Args:
        classes, palette: names and colours, see `class_sets.class_set`.
        ignore: values of pixels that do not count.
        reduce_zero_label: 0 does not count and 1..K are the classes 0..K-1 (ADE20K); 255 goes on to
            be ignored, as in mmsegmentation. `ignore` are the values in the files, not one less.
        id_map: value in the file -> class; None: the values are the classes.
        unlisted: what becomes of a value that `id_map` does not list: "ignored" or "error".
        colors: the colour [red, green, blue] that stands for 0, 1, 2, ... in files with colours.

    Raises:
        UserError: see `class_sets`; values that mean two things, or classes that do not exist.
    """

    def __init__(
        self,
        classes: str | int | Sequence[str],
        *,
        palette: str | Sequence[Sequence[int]] = "auto",
        ignore: int | Sequence[int] = (255,),
        reduce_zero_label: bool = False,
        id_map: Mapping[int, int] | None = None,
        unlisted: Literal["ignored", "error"] = "ignored",
        colors: Sequence[Sequence[int]] = (),
    ) -> None:
        self.classes, self.palette = class_set(classes, palette)
        ignore = [ignore] if isinstance(ignore, int) else list(ignore)
        self.ignore = [_checked_id("ignore", value) for value in ignore]
        self.reduce_zero_label = reduce_zero_label
        self.id_map = {_checked_id("id_map", value): to for value, to in (id_map or {}).items()}
        self.unlisted = unlisted
        self._table = self._make_table()
        self._colors = [_packed(color) for color in checked_colours("colors", colors).tolist()]
        if len(set(self._colors)) < len(self._colors):
            raise UserError("colors: the same colour stands for two numbers")

    @property
    def by_color(self) -> bool:
        """Whether colours stand for the numbers."""
        return bool(self._colors)

    def _make_table(self) -> np.ndarray:
        """(MAX_ID + 1,) int16: the class of each value, IGNORED or _UNKNOWN."""
        count = len(self.classes)
        table = np.full(MAX_ID + 1, _UNKNOWN, dtype=np.int16)
        if self.unlisted not in ("ignored", "error"):
            raise UserError(f"unlisted {self.unlisted!r}: expected ignored or error")
        if self.id_map and self.reduce_zero_label:
            raise UserError("reduce_zero_label and id_map exclude each other: say it in the id_map")
        if self.id_map and self.unlisted == "ignored":
            table[:] = IGNORED
        first = 1 if self.reduce_zero_label else 0
        for value, number in (self.id_map or {first + k: k for k in range(count)}).items():
            if isinstance(number, bool) or number not in range(count):
                raise UserError(
                    f"id_map {value}: {number!r}; the {count} classes are 0 to {count - 1}"
                )
            table[value] = number
        # 255 is the 255th of more than 254 classes, unless it was said to be ignored
        ignored = [*self.ignore, *([0] if self.reduce_zero_label else [])]
        for value in ignored:
            if self.id_map and value in self.id_map:
                raise UserError(f"id_map {value}: {self.id_map[value]}; but {value} is ignored")
            if not self.id_map and table[value] >= 0:
                name = self.classes[table[value]]
                raise UserError(
                    f"ignore {value}: it is class {table[value]} ('{name}') of {count}; leave it "
                    "out of ignore, or say in id_map which values are which classes"
                )
            table[value] = IGNORED
        return table

    def __call__(self, values: np.ndarray, name: str) -> LabelMap:
        """Values of a file, (H, W) or (H, W, 3) for colours -> int16 (H, W).

        Raises UserError that names the file and the values that are no class.
        """
        if values.ndim == 3:
            values = self._from_colors(values, name)
        if values.dtype != np.uint8 and (values.min() < 0 or values.max() > MAX_ID):
            raise UserError(f"label map {name}: values {_some(np.unique(values))}; {self._known()}")
        labels = self._table[values]
        if labels.min() == _UNKNOWN:
            wrong = np.unique(values[labels == _UNKNOWN])
            raise UserError(f"label map {name}: value {_some(wrong)}; {self._known()}")
        return labels

    def _from_colors(self, values: np.ndarray, name: str) -> np.ndarray:
        same = (values == values[..., :1]).all()
        if not self._colors:
            if same:
                return values[..., 0]
            raise UserError(
                f"label map {name}: colours where numbers are expected ({_colors_in(values)}); "
                "say in data.ids.colors which colour stands for 0, 1, 2, ..., or save the numbers"
            )
        packed = values.astype(np.int32) @ np.array([65536, 256, 1], dtype=np.int32)
        known = np.array(self._colors, dtype=np.int32)
        order = np.argsort(known)
        places = np.searchsorted(known[order], packed).clip(max=len(known) - 1)
        numbers = order[places]
        wrong = known[numbers] != packed
        if wrong.any():
            raise UserError(
                f"label map {name}: colours that data.ids.colors does not list: "
                f"{_colors_in(values[wrong])}"
            )
        return numbers

    def _known(self) -> str:
        values = np.flatnonzero(self._table >= 0)
        told = _some(values) if self.id_map else f"{values[0]} to {values[-1]}"
        ignored = "" if self.id_map else f", and {_some(np.flatnonzero(self._table == IGNORED))}"
        mend = "more classes, or data.ids.ignore, id_map or reduce_zero_label, would mend it"
        return (
            f"the {len(self.classes)} classes are {told}{ignored and ignored + ' ignored'}; {mend}"
        )

    def identity(self) -> bytes:
        """What the numbers of a label map depend on, besides its file."""
        return self._table.tobytes() + repr((self.classes, self._colors)).encode()

    def __repr__(self) -> str:
        parts = [f"{len(self.classes)} classes", f"ignore={self.ignore}"]
        if self.reduce_zero_label:
            parts.append("reduce_zero_label")
        if self.id_map:
            parts.append(f"id_map={self.id_map}, others {self.unlisted}")
        if self._colors:
            parts.append(f"{len(self._colors)} colors")
        return f"LabelIds({', '.join(parts)})"


def read_label_map(file: str | Path | bytes, name: str, ids: LabelIds) -> LabelMap:
    """A label file or its bytes as int16 (H, W), turned by its own EXIF orientation if it has one.

    Raises:
        UnreadableImage: missing, broken, truncated, or beyond the limits of `opening`.
        UserError: readable, but not a label map of these classes.
    """
    with named_if_broken(name):
        with open_header(file if isinstance(file, bytes) else read_file(file)) as opened:
            kind, stretch = opened.format, _stretch(opened)
            decode(opened)
            ImageOps.exif_transpose(opened, in_place=True)
            by_color = ids.by_color and opened.mode in ("P", "PA")
            values = _values(opened.convert("RGB") if by_color else opened)
    if kind == "JPEG":
        raise UserError(f"label map {name}: a JPEG, which does not keep numbers; save it as PNG")
    if isinstance(values, str):
        raise UserError(f"label map {name}: {values}; expected whole numbers, one a pixel")
    return ids(values // stretch if stretch > 1 else values, name)


def _stretch(opened: ImageFile.ImageFile) -> int:
    """What Pillow multiplies grey values of 2 and 4 bits by, to make 255 of the highest."""
    # programs that make PNGs small save label maps of few classes so
    modes = str(opened.tile[0][3]) if opened.tile else ""
    return next((by for mode, by in (("L;2", 85), ("L;4", 17)) if mode in modes), 1)


def _values(image: Image.Image) -> np.ndarray | str:
    """(H, W) numbers, (H, W, 3) colours, or what it is instead."""
    if image.mode in ("RGBA", "RGBX"):
        image = image.convert("RGB")
    if image.mode in ("LA", "PA"):
        return np.asarray(image)[..., 0]
    if image.mode in ("1", "L", "P"):
        return np.asarray(image).astype(np.uint8)
    if image.mode == "RGB" or image.mode == "I" or image.mode.startswith("I;16"):
        return np.asarray(image)
    if image.mode == "F":
        levels = np.asarray(image)
        if np.isfinite(levels).all() and (levels == levels.round()).all():
            return levels.clip(-1, MAX_ID + 1).astype(np.int32)
        return "fractions"
    return f"pixels of mode {image.mode}"


def check_sizes(image: tuple[int, int], image_name: str, labels: Any, label_name: str) -> None:
    """Raises UserError unless image and label map have the same (H, W)."""
    if image == labels:
        return
    turned = ""
    if image == labels[::-1]:
        turned = "; one of them is turned (an image is shown upright, as its EXIF orientation says)"
    raise UserError(
        f"image {image_name} is {image[1]}x{image[0]} and its label map {label_name} "
        f"{labels[1]}x{labels[0]} pixels{turned}: both must be of one size"
    )


def _checked_id(name: str, value: Any) -> int:
    if whole_number(name, value, at_least=0) > MAX_ID:
        raise UserError(f"{name} {value}: values of label files go up to {MAX_ID}")
    return int(value)


def _packed(color: Sequence[int]) -> int:
    return color[0] * 65536 + color[1] * 256 + color[2]


def _some(values: np.ndarray) -> str:
    told = ", ".join(str(value) for value in values[:8].tolist())
    return f"{told}, ... ({len(values)} in all)" if len(values) > 8 else told


def _colors_in(values: np.ndarray) -> str:
    colors = np.unique(values.reshape(-1, 3), axis=0)
    return _some_colors(colors[:3].tolist(), len(colors))


def _some_colors(colors: list[list[int]], count: int) -> str:
    return ", ".join(map(str, colors)) + (f", ... ({count} in all)" if count > 3 else "")

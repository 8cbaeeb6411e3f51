"""What a segmentation model has behind its backbone, and how the labels it was trained on are read.

Tensors are under the names of our task's children: `pyramid.*`, `head.*`, `auxiliary.0.*`.
"""

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from beit.interop.fields import LARGEST, Fields
from beit.models.pyramid import FeaturePyramid, PlainMaps
from beit.models.segmentation import FCNHead, LinearHead, SETRPUPHead, UPerNetHead

LAST = "conv_seg.weight"  # of every head: classes by channels
HEADS: dict[str, type[nn.Module]] = {
    kind.__name__: kind for kind in (UPerNetHead, FCNHead, SETRPUPHead, LinearHead)
}
# what each is built from besides width and number of classes
_ARGUMENTS = {
    "UPerNetHead": ("channels", "dropout", "pool_scales"),
    "FCNHead": ("channels", "num_convs", "map_index", "dropout"),
    "SETRPUPHead": ("channels", "num_upsamples", "scale", "map_index", "dropout"),
    "LinearHead": ("map_index",),
}
ADE20K = 150  # classes; its files count from 1, and 0 is none of them
IGNORED = 255  # in files of labels, by mmseg's and transformers' convention


@dataclass(frozen=True)
class Head:
    """A head of beit.models.segmentation by its name, and what it is built from."""

    name: str
    arguments: dict[str, Any]  # all of them but the width and the number of classes

    @classmethod
    def of(cls, name: str, **told: Any) -> "Head":
        """With the head's own defaults for what is not told."""
        known = inspect.signature(HEADS[name]).parameters
        found = {key: told.get(key, known[key].default) for key in _ARGUMENTS[name]}
        return cls(name, {k: list(v) if isinstance(v, tuple) else v for k, v in found.items()})

    def build(self, width: int, num_classes: int) -> nn.Module:
        return HEADS[self.name](width, num_classes, **self.arguments)


@dataclass(frozen=True)
class Decoder:
    """Pyramid and heads. `taps` are the blocks, counted from 0, that the four maps are of."""

    head: Head
    auxiliary: tuple[Head, ...]
    taps: tuple[int, ...]
    pyramid: bool  # False: the four maps stay at the patch's stride
    auxiliary_weight: float = 0.4

    def build(self, width: int, patch_size: int, num_classes: int) -> nn.ModuleDict:
        """Modules whose keys are those of the tensors."""
        kind = FeaturePyramid if self.pyramid else PlainMaps
        return nn.ModuleDict(
            {
                "pyramid": kind(width, taps=self.taps, patch_size=patch_size),
                "head": self.head.build(width, num_classes),
                "auxiliary": nn.ModuleList(
                    head.build(width, num_classes) for head in self.auxiliary
                ),
            }
        )


@dataclass(frozen=True)
class Labels:
    """How files of labels are read, and shown.

    Attributes:
        reduce_zero: 0 in a file is no class, and class k stands as k + 1.
        ignore_index: the value that is left out of the loss; a negative one is in no file.
        palette: K colours [red, green, blue] of 0 to 255, or None.
    """

    reduce_zero: bool = False
    ignore_index: int = IGNORED
    palette: list[list[int]] | None = None


def described(tensors: Mapping[str, Tensor], taps: tuple[int, ...]) -> Decoder:
    """What the tensors are of, as far as they tell; the rest is as the release has it."""
    numbers = {int(n[1]) for key in tensors if (n := re.match(r"auxiliary\.(\d{1,3})\.", key))}
    return Decoder(
        head=_described_head(tensors, "head."),
        auxiliary=tuple(_described_head(tensors, f"auxiliary.{i}.") for i in sorted(numbers)),
        taps=taps,
        pyramid=any(key.startswith("pyramid.") for key in tensors),
    )


def _described_head(tensors: Mapping[str, Tensor], prefix: str) -> Head:
    """By what there is before its last layer."""
    inner = [key[len(prefix) :].split(".") for key in tensors if key.startswith(prefix)]
    last = tensors.get(prefix + LAST)
    told = {"channels": 1 if last is None or last.ndim < 2 else last.shape[1]}

    def count(name: str) -> int:
        return len({part[1] for part in inner if part[0] == name})

    if count("psp_modules"):
        return Head.of("UPerNetHead", **told)
    if number := count("up_convs"):
        scale = 2 if number > 1 else 4  # as mmseg builds the main and the auxiliary one
        return Head.of("SETRPUPHead", **told, num_upsamples=number, scale=scale)
    if number := count("convs"):
        return Head.of("FCNHead", **told, num_convs=number)
    return Head.of("LinearHead")


def usual_taps(depth: int, notes: list[str]) -> tuple[int, ...]:
    """After a third, half, two thirds and all of the blocks, as base and large have them."""
    taps = tuple(max(depth * part // 6 - 1, 0) for part in (2, 3, 4, 6))
    if depth not in (12, 24):
        notes.append(
            "the file does not tell which blocks the maps are of: "
            f"{','.join(map(str, taps))} are taken, counted from 0; say taps= for others"
        )
    return taps


def decoder_in(found: Fields) -> Decoder:
    """Out of `asdict` of one."""
    nodes = (found.inner("head"), *found.several("auxiliary"))
    heads = [head_in(node.word("name", HEADS), node.inner("arguments")) for node in nodes]
    return Decoder(
        head=heads[0],
        auxiliary=tuple(heads[1:]),
        taps=found.wholes("taps"),
        pyramid=found.flag("pyramid"),
        auxiliary_weight=found.number("auxiliary_weight", 0.4, high=1e3),
    )


def head_in(name: str, found: Fields) -> Head:
    """A head with those of its arguments that are told."""
    arguments: dict[str, Any] = {}
    for key in _ARGUMENTS[name]:
        if key not in found:
            continue
        if key == "pool_scales":
            arguments[key] = list(found.wholes(key))
        elif key == "dropout":
            arguments[key] = found.number(key)
        else:
            arguments[key] = found.whole(key, at_least=0 if key == "map_index" else 1)
    return Head.of(name, **arguments)


def labels_in(found: Fields) -> Labels:
    """Out of `asdict` of one; what is not there is the default."""
    return Labels(
        reduce_zero=found.flag("reduce_zero", False),
        ignore_index=found.whole("ignore_index", IGNORED, at_least=-LARGEST),
        palette=palette_in(found, "palette"),
    )


def palette_in(found: Fields, key: str) -> list[list[int]] | None:
    """A list of colours. Raises UserError for what is none."""
    colours = found.content.get(key)
    if colours is None:
        return None
    if not isinstance(colours, list | tuple) or not all(map(_is_colour, colours)):
        raise found.wrong(key, "a list of [red, green, blue], each 0 to 255")
    return [list(colour) for colour in colours]


def _is_colour(value: Any) -> bool:
    three = isinstance(value, list | tuple) and len(value) == 3
    return three and all(type(part) is int and 0 <= part <= 255 for part in value)

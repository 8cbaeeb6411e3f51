"""The form between the layouts: tensors under the released names, and what they are of."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import Tensor

from beit.interop.decoder import LAST, Decoder, Labels
from beit.models.layers import NORM_EPS, RelativePosition
from beit.models.transfer import INDEX, TransferReport, abbreviate
from beit.printable import printable

Kind = Literal["mim", "classification", "segmentation", "backbone"]
Pooling = Literal["mean", "cls", "none"]

HALF = (0.5, 0.5, 0.5)  # what the released ImageNet-22k weights were trained with
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
NORMALIZATIONS = {"half": (HALF, HALF), "imagenet": (IMAGENET_MEAN, IMAGENET_STD)}
# what is no part of the backbone, in released names and, of segmentation, in ours
HEADS = ("lm_head.", "fc_norm.", "head.", "pyramid.", "auxiliary.")


@dataclass(frozen=True)
class Architecture:
    """The network as `VisionTransformer` takes it; `mlp_hidden` is the MLP's inner width."""

    image_size: tuple[int, int]
    patch_size: int
    width: int
    depth: int
    num_heads: int
    mlp_hidden: int
    absolute_position: bool
    relative_position: RelativePosition
    layer_scale: float  # the first value; what was learned is in the tensors
    mask_token: bool
    final_norm: bool
    in_channels: int = 3
    norm_eps: float = NORM_EPS
    drop_rate: float = 0.0
    attention_drop_rate: float = 0.0
    drop_path_rate: float = 0.0

    @property
    def grid(self) -> tuple[int, int]:
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size

    @property
    def is_square(self) -> bool:
        return self.image_size[0] == self.image_size[1]

    def arguments(self) -> dict[str, Any]:
        """What `VisionTransformer` is called with, as plain data."""
        height, width = self.image_size
        ratio = self.mlp_hidden / self.width
        if int(self.width * ratio) != self.mlp_hidden:
            ratio = math.nextafter(ratio, math.inf)
        found: dict[str, Any] = {
            "image_size": height if height == width else [height, width],
            "patch_size": self.patch_size,
            "in_channels": self.in_channels,
            "width": self.width,
            "depth": self.depth,
            "num_heads": self.num_heads,
            "mlp_ratio": ratio,
            "absolute_position": self.absolute_position,
            "relative_position": self.relative_position,
            "layer_scale": self.layer_scale,
            "drop_rate": self.drop_rate,
            "attention_drop_rate": self.attention_drop_rate,
            "drop_path_rate": self.drop_path_rate,
            "mask_token": self.mask_token,
            "final_norm": self.final_norm,
        }
        if self.norm_eps != NORM_EPS:
            found["norm_eps"] = self.norm_eps
        return found


@dataclass(frozen=True)
class Preprocessing:
    """How images were prepared: normalisation on [0, 1], resize, crop.

    The image is resized so that size / crop_pct is covered, by its tighter side ("center") or each
    side by itself ("squash"), and the centre is cut out.
    """

    mean: tuple[float, ...] = HALF
    std: tuple[float, ...] = HALF
    interpolation: str = "bicubic"
    crop_pct: float = 0.875
    crop_mode: Literal["center", "squash"] = "center"


@dataclass(frozen=True)
class Settings:
    """What the user says where a file is silent; None is: not said."""

    num_heads: int | None = None
    image_size: tuple[int, int] | None = None
    normalize: str | None = None
    norm_eps: float | None = None
    classes: list[str] | None = None
    taps: tuple[int, ...] | None = None  # of segmentation: blocks from 0
    allow: tuple[str, ...] = ()  # names, or beginnings of names, of tensors that may stay behind


@dataclass
class ReadReport(TransferReport):
    """A transfer report of a file: also what is worked out anew, and what was assumed.

    Attributes:
        layout: where the tensors come from.
        recomputed: index buffers, worked out from the grid.
        left: reason -> tensors that are known and not carried.
        notes: what the file does not tell and was assumed.
        warnings: what is there and should not be.
    """

    layout: str = ""
    recomputed: list[str] = field(default_factory=list)
    left: dict[str, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def rows(self) -> list[tuple[str, str, str]]:
        rows = [("read as", "", self.layout), *super().rows()]
        if self.recomputed:
            which = "index buffers, worked out from the grid"
            rows.append(("recomputed", str(len(self.recomputed)), which))
        return [(a, b, printable(text, limit=4000)) for a, b, text in rows + self._said()]

    def remarks(self) -> list[str]:
        """One line for the layout, each assumption, and each part that stays behind."""
        lines = [f"{kind}: {printable(text, limit=4000)}" for kind, _, text in self._said()]
        return [f"read as {self.layout}", *lines]

    def _said(self) -> list[tuple[str, str, str]]:
        rows = []
        for reason, keys in self.left.items():
            rows.append(("left behind", str(len(keys)), f"{abbreviate(keys)}: {reason}"))
        rows += [("note", "", note) for note in self.notes]
        return rows + [("warning", "", warning) for warning in self.warnings]


@dataclass
class Weights:
    """What a file holds, in no layout in particular.

    Attributes:
        backbone, head: tensors under the names that `VisionTransformer` and our heads have; of
            segmentation `head` has all that is behind the backbone, see `decoder`.
        pooling: "none" for `kind` "mim" and "segmentation".
        classes: K names, or None.
        decoder: of segmentation alone.
    """

    kind: Kind
    architecture: Architecture
    backbone: dict[str, Tensor]
    head: dict[str, Tensor]
    pooling: Pooling
    preprocessing: Preprocessing = field(default_factory=Preprocessing)
    classes: list[str] | None = None
    report: ReadReport = field(default_factory=ReadReport)
    decoder: Decoder | None = None
    labels: Labels = field(default_factory=Labels)

    @classmethod
    def of(
        cls,
        tensors: Mapping[str, Tensor],
        kind: Kind,
        architecture: Architecture,
        pooling: Pooling,
        preprocessing: Preprocessing,
        report: ReadReport,
        classes: list[str] | None = None,
    ) -> "Weights":
        """Of all tensors under the released names; index buffers are counted and left out."""
        kept = {key: value for key, value in tensors.items() if not key.endswith(INDEX)}
        report.recomputed = [key for key in tensors if key not in kept]
        backbone, head = split_head(kept)
        return cls(kind, architecture, backbone, head, pooling, preprocessing, classes, report)

    @property
    def num_outputs(self) -> int:
        """V of a MIM head, K of a classifier and of segmentation, 0 of a backbone."""
        keys = {
            "mim": "lm_head.weight",
            "classification": "head.weight",
            "segmentation": f"head.{LAST}",
        }
        return len(self.head[keys[self.kind]]) if self.kind in keys else 0

    def released(self) -> dict[str, Tensor]:
        """All tensors in one dict: these names do not collide."""
        return {**self.backbone, **self.head}

    def changed(self, **changes: Any) -> "Weights":
        return replace(self, **changes)


def shown(keys: list[str]) -> str:
    """Names out of a foreign file, in one line that a terminal can be given."""
    return printable(abbreviate(keys), limit=1000)


def split_head(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(backbone, head) of tensors under the released names."""
    head = {key: value for key, value in tensors.items() if key.startswith(HEADS)}
    return {key: value for key, value in tensors.items() if key not in head}, head

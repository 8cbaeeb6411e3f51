"""The form between the layouts: tensors under the released names, and what they are of."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from beit.errors import UserError
from beit.models.encoder import Encoder
from beit.models.heads import ClassificationHead, MIMHead
from beit.models.layers import NORM_EPS, RelativePosition
from beit.models.transfer import TransferReport, abbreviate
from beit.models.vit import VisionTransformer
from beit.printable import printable

Kind = Literal["mim", "classification", "backbone"]
Pooling = Literal["mean", "cls", "none"]

HALF = (0.5, 0.5, 0.5)  # what the released ImageNet-22k weights were trained with
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
NORMALIZATIONS = {"half": (HALF, HALF), "imagenet": (IMAGENET_MEAN, IMAGENET_STD)}
HEADS = ("lm_head.", "fc_norm.", "head.")  # what is no part of the backbone, in released names
WHAT = {
    "mim": "a model of masked image modelling",
    "classification": "a classifier",
    "backbone": "a backbone",
}


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
    allow: tuple[str, ...] = ()  # names, or beginnings of names, of tensors that may stay behind


@dataclass
class ReadReport(TransferReport):
    """A transfer report of a file: also what is worked out anew, and what was assumed.

    Attributes:
        layout: where the tensors come from.
        recomputed: index buffers, worked out from the grid.
        left: reason -> tensors that are known and not carried.
        notes: what the file does not tell and was assumed.
    """

    layout: str = ""
    recomputed: list[str] = field(default_factory=list)
    left: dict[str, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

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
        return rows + [("note", "", note) for note in self.notes]


@dataclass
class Weights:
    """What a file holds, in no layout in particular.

    Attributes:
        backbone, head: tensors under the names that `VisionTransformer` and our heads have.
        pooling: "none" for `kind` "mim".
        classes: K names, or None.
    """

    kind: Kind
    architecture: Architecture
    backbone: dict[str, Tensor]
    head: dict[str, Tensor]
    pooling: Pooling
    preprocessing: Preprocessing = field(default_factory=Preprocessing)
    classes: list[str] | None = None
    report: ReadReport = field(default_factory=ReadReport)

    @property
    def num_outputs(self) -> int:
        """V of a MIM head, K of a classifier, 0 of a backbone."""
        keys = {"mim": "lm_head.weight", "classification": "head.weight"}
        return len(self.head[keys[self.kind]]) if self.kind in keys else 0

    def released(self) -> dict[str, Tensor]:
        """All tensors in one dict: these names do not collide."""
        return {**self.backbone, **self.head}

    def changed(self, **changes: Any) -> "Weights":
        return replace(self, **changes)


def networks(weights: Weights) -> tuple[VisionTransformer, nn.Module]:
    """Backbone and head that the weights say they are of; on the meta device under torch.device."""
    arch = weights.architecture
    backbone = VisionTransformer(**arch.arguments(), init_cut=0.02)
    if weights.kind == "mim":
        return backbone, MIMHead(arch.width, weights.num_outputs)
    if weights.kind == "backbone":
        return backbone, Encoder(backbone, pooling=weights.pooling, norm_eps=arch.norm_eps).head
    pooling = weights.pooling
    assert pooling != "none"
    eps = arch.norm_eps
    head = ClassificationHead(arch.width, weights.num_outputs, pooling=pooling, norm_eps=eps)
    return backbone, head


def checked(weights: Weights, path: Any, allow: tuple[str, ...]) -> Weights:
    """The weights with every tensor accounted for.

    Raises:
        UserError: a tensor missing, of another shape, or unexpected and not allowed to stay behind;
            another number of class names than classes.
    """
    with torch.device("meta"):
        backbone, head = networks(weights)
    expected = {**backbone.state_dict(), **head.state_dict()}
    found = weights.released()
    missing = [key for key in expected if key not in found]
    unexpected = [key for key in found if key not in expected]
    refused = [key for key in unexpected if not is_allowed(key, allow)]
    if missing:
        raise UserError(
            f"{path}: {WHAT[weights.kind]} of this layout lacks {shown(missing)}; the file is "
            "incomplete, or of another architecture than its other tensors say"
        )
    if refused:
        raise UserError(
            f"{path}: nothing here explains {shown(refused)}; to leave such tensors behind say "
            f"allow={printable(refused[0].split('.')[0])}"
        )
    for key, value in expected.items():
        if found[key].shape != value.shape:
            raise UserError(
                f"{path}: {key} has shape {list(found[key].shape)}, and the rest of the file says "
                f"{list(value.shape)}"
            )
    if weights.classes is not None and len(weights.classes) != weights.num_outputs:
        raise UserError(
            f"{path}: {len(weights.classes)} class names for a head of {weights.num_outputs} "
            "classes; give the list of names that belongs to these weights"
        )
    weights.report.loaded, weights.report.unexpected = list(expected), unexpected
    parts = split_head({key: value for key, value in found.items() if key in expected})
    return weights.changed(backbone=parts[0], head=parts[1])


def without(weights: Weights, allow: tuple[str, ...]) -> Weights:
    """The weights without the parts that are allowed to stay behind: mask token, heads."""
    named = [key for key in weights.released() if is_allowed(key, allow)]
    if not named:
        return weights
    kind, pooling, arch = weights.kind, weights.pooling, weights.architecture
    if any(key.startswith(("lm_head.", "head.")) for key in named):
        kind = "backbone"
        if weights.kind == "mim":
            pooling = "cls"
    if "mask_token" in named:
        arch = replace(arch, mask_token=False)
    kept = weights.changed(
        kind=kind,
        pooling=pooling,
        architecture=arch,
        classes=weights.classes if kind == "classification" else None,
        backbone={k: v for k, v in weights.backbone.items() if k not in named},
        head={k: v for k, v in weights.head.items() if k not in named},
    )
    kept.report.left["as allowed"] = named
    return kept


def shown(keys: list[str]) -> str:
    """Names out of a foreign file, in one line that a terminal can be given."""
    return printable(abbreviate(keys), limit=1000)


def is_allowed(key: str, allow: Iterable[str]) -> bool:
    return any(key == name or key.startswith(name.rstrip(".") + ".") for name in allow)


def split_head(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(backbone, head) of tensors under the released names."""
    head = {key: value for key, value in tensors.items() if key.startswith(HEADS)}
    return {key: value for key, value in tensors.items() if key not in head}, head


def check_one_norm(weights: Weights, layout: str) -> None:
    """Raises UserError where the norms are not where every other layout has them.

    With mean pooling fc_norm and no norm, else norm and no fc_norm.
    """
    norm, mean = weights.architecture.final_norm, weights.pooling == "mean"
    if norm == mean:
        has = "both norm and fc_norm" if norm else "neither norm nor fc_norm"
        raise UserError(
            f"{layout} cannot hold this model: it has {has}, and there a model has fc_norm with "
            "mean pooling and norm without"
        )


def check_released_eps(weights: Weights, layout: str) -> None:
    """Raises UserError for another epsilon than the one that the layout's model has built in."""
    if weights.architecture.norm_eps != NORM_EPS:
        raise UserError(
            f"{layout} cannot hold norm_eps={weights.architecture.norm_eps:g}: its model has "
            f"{NORM_EPS:g} built in; say norm_eps=1e-6 for weights that were trained with it, as "
            "all released BEiT weights were whatever their config.json says"
        )

"""What weights must be like: every tensor accounted for, and no more than a layout can hold."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from beit.errors import UserError
from beit.interop.weights import Settings, Weights, shown, split_head
from beit.models.encoder import Encoder
from beit.models.heads import ClassificationHead, MIMHead
from beit.models.layers import NORM_EPS
from beit.models.vit import VisionTransformer
from beit.printable import printable

WHAT = {
    "mim": "a model of masked image modelling",
    "classification": "a classifier",
    "segmentation": "a segmentation model",
    "backbone": "a backbone",
}


def networks(weights: Weights) -> tuple[VisionTransformer, nn.Module]:
    """Backbone and head that the weights say they are of; on the meta device under torch.device."""
    arch = weights.architecture
    backbone = VisionTransformer(**arch.arguments(), init_cut=0.02)
    if weights.kind == "mim":
        return backbone, MIMHead(arch.width, weights.num_outputs)
    if weights.decoder is not None:
        return backbone, weights.decoder.build(arch.width, arch.patch_size, weights.num_outputs)
    if weights.kind == "backbone":
        return backbone, Encoder(backbone, pooling=weights.pooling, norm_eps=arch.norm_eps).head
    pooling = weights.pooling
    assert pooling != "none"
    eps = arch.norm_eps
    head = ClassificationHead(arch.width, weights.num_outputs, pooling=pooling, norm_eps=eps)
    return backbone, head


def checked(weights: Weights, path: Any, settings: Settings) -> Weights:
    """The weights with every tensor accounted for.

    Raises:
        UserError: a tensor missing, of another shape or kind, or unexpected and not allowed to stay
            behind; another number of class names than classes; settings that contradict the file.
    """
    if weights.kind == "classification" and weights.pooling == "none":
        raise UserError(
            f"{path}: {WHAT['classification']} lacks fc_norm (mean pooling) or norm (CLS); the "
            "file is incomplete"
        )
    with torch.device("meta"):
        backbone, head = networks(weights)
    expected = {**backbone.state_dict(), **head.state_dict()}
    found = weights.released()
    unexpected = [key for key in found if key not in expected]
    if missing := [key for key in expected if key not in found]:
        raise UserError(
            f"{path}: {WHAT[weights.kind]} of this layout lacks {shown(missing)}; the file is "
            "incomplete, or of another architecture than its other tensors say"
        )
    if refused := [key for key in unexpected if not is_allowed(key, settings.allow)]:
        raise UserError(
            f"{path}: nothing here explains {shown(refused)}; to leave such tensors behind say "
            f"allow={printable(refused[0].split('.')[0])}"
        )
    for key, value in expected.items():
        _check_tensor(key, found[key], value, path)
    _check_said(weights, path, settings)
    if odd := [key for key in expected if not torch.isfinite(found[key]).all()]:
        more = f" and {len(odd) - 6} more" if len(odd) > 6 else ""
        weights.report.warnings.append(f"NaN or infinite numbers in {', '.join(odd[:6])}{more}")
    weights.report.loaded, weights.report.unexpected = list(expected), unexpected
    parts = split_head({key: value for key, value in found.items() if key in expected})
    return weights.changed(backbone=parts[0], head=parts[1])


def _check_tensor(key: str, found: Tensor, expected: Tensor, path: Any) -> None:
    if found.shape != expected.shape:
        raise UserError(
            f"{path}: {key} has shape {list(found.shape)}, and the rest of the file says "
            f"{list(expected.shape)}"
        )
    counter = not expected.is_floating_point() and found.dtype == expected.dtype
    if not (counter or found.is_floating_point()) or found.layout is not torch.strided:
        raise UserError(
            f"{path}: {key} is {found.dtype}, {found.layout}; expected dense numbers with a "
            "fraction: quantised and sparse weights are not read"
        )


def _check_said(weights: Weights, path: Any, settings: Settings) -> None:
    """What the user says, or a config: it must be of the tensors."""
    if weights.classes is not None and len(weights.classes) != weights.num_outputs:
        raise UserError(
            f"{path}: {len(weights.classes)} class names for a head of {weights.num_outputs} "
            "classes; give the list of names that belongs to these weights"
        )
    depth = weights.architecture.depth
    if weights.decoder is not None and max(weights.decoder.taps) >= depth:
        raise UserError(
            f"{path}: its maps are said to be of blocks {list(weights.decoder.taps)}, and its "
            f"blocks are 0 to {depth - 1}: say taps= with four of them"
        )
    for name in ("num_heads", "image_size"):
        said, found = getattr(settings, name), getattr(weights.architecture, name)
        if said not in (None, found):
            raise UserError(
                f"{path}: {name}={said}, and the file says {found}; the setting is for files that "
                "do not tell"
            )


def without(weights: Weights, allow: tuple[str, ...]) -> Weights:
    """The weights without the parts that are allowed to stay behind: mask token, heads."""
    named = _named(weights, allow)
    if not named:
        return weights
    kind, pooling, arch = weights.kind, weights.pooling, weights.architecture
    decoder = weights.decoder
    if any(key.startswith(("lm_head.", "head.")) for key in named):
        kind = "backbone"
        decoder = None
        if weights.kind == "mim":
            pooling = "cls"
    elif decoder and any(key.startswith("auxiliary.") for key in named):
        decoder = replace(decoder, auxiliary=())
    if "mask_token" in named:
        arch = replace(arch, mask_token=False)
    kept = weights.changed(
        kind=kind,
        pooling=pooling,
        architecture=arch,
        decoder=decoder,
        classes=None if kind == "backbone" else weights.classes,
        backbone={k: v for k, v in weights.backbone.items() if k not in named},
        head={k: v for k, v in weights.head.items() if k not in named},
    )
    kept.report.left["as allowed"] = named
    return kept


def _named(weights: Weights, allow: tuple[str, ...]) -> list[str]:
    """The allowed; of segmentation whole heads, and with pyramid or head both and all others."""
    named = [key for key in weights.released() if is_allowed(key, allow)]
    if weights.decoder is None:
        return named
    parts = {key.partition(".")[0] for key in named if key in weights.head}
    if parts & {"head", "pyramid"}:
        parts = {"head", "pyramid", "auxiliary"}
    whole = [key for key in weights.head if key.partition(".")[0] in parts]
    return [key for key in named if key in weights.backbone] + whole


def is_allowed(key: str, allow: Iterable[str]) -> bool:
    return any(key == name or key.startswith(name.rstrip(".") + ".") for name in allow)


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

"""The official layout (microsoft/unilm): `{"model": tensors}`, the names ours are taken from.

Pretraining: `rel_pos_bias.*` shared, `mask_token`, `norm`, `lm_head`. Fine-tuned: a table in each
block, `fc_norm` (mean pooling) or `norm` (CLS), `head`. Segmentation, as OpenMMLab saves it:
`{"state_dict", "meta": {"CLASSES", "PALETTE"}}`, see `segmentation` for the names.
What we write has one more entry, `beit`, plain data that their loader does not look at.
"""

import re
from dataclasses import replace
from typing import Any

from torch import Tensor

from beit.errors import UserError
from beit.interop.checks import check_one_norm, check_released_eps
from beit.interop.decoder import ADE20K, Labels, described, palette_in, usual_taps
from beit.interop.facts import ENTRY, facts, facts_in, restored, settings_with
from beit.interop.fields import Fields
from beit.interop.released import assumed_preprocessing, describe, kind_of
from beit.interop.segmentation import check_unilm, from_unilm, to_unilm
from beit.interop.weights import ReadReport, Settings, Weights
from beit.models.position import relative_position_index
from beit.models.transfer import INDEX
from beit.tokenizers.pickles import InertNamespace


def read(tensors: dict[str, Tensor], content: Any, path: Any, settings: Settings) -> Weights:
    """Tensors under the released names; `content` is what the file held around them."""
    return _read(tensors, content, path, settings, ReadReport(layout="unilm (official)"))


def read_segmentation(
    tensors: dict[str, Tensor], content: Any, path: Any, settings: Settings
) -> Weights:
    """A segmentation model; without a head it is a backbone."""
    report = ReadReport(layout="unilm (official), segmentation")
    ours = {from_unilm(key): value for key, value in tensors.items()}
    if len(ours) < len(tensors):
        raise UserError(f"{path}: some of its tensors are there twice, with and without a prefix")
    return _read(ours, content, path, settings, report)


def _read(
    tensors: dict[str, Tensor], content: Any, path: Any, settings: Settings, report: ReadReport
) -> Weights:
    entry = facts_in(content, path)
    settings = settings_with(entry, settings)
    arch = describe(tensors, path, settings, report.notes)
    kind, pooling = kind_of(tensors, path)
    notes: list[str] = [] if entry else report.notes
    told = "imagenet" if kind == "segmentation" else _told_normalisation(content)
    preprocessing = assumed_preprocessing(settings, arch.image_size, notes, told)
    weights = Weights.of(tensors, kind, arch, pooling, preprocessing, report)
    if kind == "segmentation":
        weights = _with_decoder(weights, content, Fields(_meta(content), path), settings, notes)
    return restored(weights, entry)


def _with_decoder(
    weights: Weights, content: Any, meta: Fields, settings: Settings, notes: list[str]
) -> Weights:
    """What the shapes tell, and OpenMMLab's entry `meta`; the rest as the release was trained."""
    taps = settings.taps or _told_taps(meta) or usual_taps(weights.architecture.depth, notes)
    ade20k = weights.num_outputs == ADE20K
    if settings.normalize is None:
        notes.append("the file has no mean and std: ImageNet's are taken, as in the release")
    if ade20k:
        notes.append(f"{ADE20K} classes: in files of labels 0 is taken for none, as in ADE20K's")
    return weights.changed(
        decoder=described(weights.head, taps),
        labels=Labels(reduce_zero=ade20k, palette=palette_in(meta, "PALETTE")),
        classes=meta.names("CLASSES"),
        # each image is resized as a whole there, and covered by windows of this size
        preprocessing=replace(
            weights.preprocessing, interpolation="bilinear", crop_pct=1.0, crop_mode="squash"
        ),
    )


def content(weights: Weights) -> dict[str, Any]:
    """What a file in the official layout holds. Raises UserError for what it has no name for."""
    if weights.decoder is not None:
        check_unilm(weights.decoder)
    if weights.kind == "mim":
        if not weights.architecture.final_norm:
            raise UserError("unilm cannot hold this model: its pretraining model ends with a norm")
    elif weights.pooling != "none":
        check_one_norm(weights, "unilm")
    elif weights.architecture.final_norm:
        raise UserError("unilm cannot hold a final norm that nothing pools from")
    check_released_eps(weights, "unilm")
    if weights.kind in ("classification", "segmentation") and weights.architecture.mask_token:
        raise UserError(
            "unilm's fine-tuning model has no mask_token: to leave it behind say allow=mask_token"
        )
    if weights.decoder is None:
        return {"model": _tensors(weights), ENTRY: facts(weights)}
    auxiliary = len(weights.decoder.auxiliary)
    tensors = {to_unilm(k, auxiliary=auxiliary): v for k, v in _tensors(weights).items()}
    meta = {"CLASSES": weights.classes, "PALETTE": weights.labels.palette}
    told = {key: value for key, value in meta.items() if value is not None}
    return {"state_dict": tensors, "meta": told, ENTRY: facts(weights)}


def _tensors(weights: Weights) -> dict[str, Tensor]:
    found = {key: value.contiguous() for key, value in weights.released().items()}
    arch = weights.architecture
    index = relative_position_index(arch.grid)
    if arch.relative_position == "shared":
        found[f"rel_pos_bias.{INDEX}"] = index
    elif arch.relative_position == "per_block":
        for i in range(arch.depth):
            found[f"blocks.{i}.attn.{INDEX}"] = index.clone()
    return found


def _meta(content: Any) -> dict[str, Any]:
    """What OpenMMLab's training writes beside the tensors."""
    meta = content.get("meta") if isinstance(content, dict) else None
    return meta if isinstance(meta, dict) else {}


def _told_taps(meta: Fields) -> tuple[int, ...] | None:
    """Out of the text of the training's config, where it is there."""
    text = str(meta.content.get("config", ""))
    found = re.search(r"\bout_indices\s*=\s*[\[(]([\d\s,]{1,80})[\])]", text)
    return tuple(int(part) for part in re.findall(r"\d{1,6}", found[1])) if found else None


def _told_normalisation(content: Any) -> str | None:
    """From the settings of their training script, which its own checkpoints carry."""
    args = content.get("args") if isinstance(content, dict) else None
    if not isinstance(args, InertNamespace):
        return None
    imagenet = args.values.get("imagenet_default_mean_and_std")
    return {True: "imagenet", False: "half"}.get(imagenet) if isinstance(imagenet, bool) else None

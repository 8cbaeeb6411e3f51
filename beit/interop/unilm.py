"""The official layout (microsoft/unilm): `{"model": tensors}`, the names ours are taken from.

Pretraining: `rel_pos_bias.*` shared, `mask_token`, `norm`, `lm_head`. Fine-tuned: a table in each
block, `fc_norm` (mean pooling) or `norm` (CLS), `head`. Segmentation, as OpenMMLab saves it:
`{"state_dict", "meta"}` with `backbone.*`, `decode_head.*`, `auxiliary_head.*`.
What we write has one more entry, `beit`, plain data that their loader does not look at.
"""

from typing import Any

from torch import Tensor

from beit.errors import UserError
from beit.interop.checks import check_one_norm, check_released_eps
from beit.interop.facts import ENTRY, facts, facts_in, restored, settings_with
from beit.interop.released import assumed_preprocessing, describe, kind_of
from beit.interop.segmentation import UNILM_HEADS, set_aside
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
    """The backbone of a segmentation model; its heads are named in the report and left."""
    report = ReadReport(layout="unilm (official), segmentation")
    rest = set_aside(tensors, UNILM_HEADS, report)
    inner = {key.removeprefix("backbone."): value for key, value in rest.items()}
    return _read(inner, content, path, settings, report)


def _read(
    tensors: dict[str, Tensor], content: Any, path: Any, settings: Settings, report: ReadReport
) -> Weights:
    entry = facts_in(content, path)
    settings = settings_with(entry, settings)
    arch = describe(tensors, path, settings, report.notes)
    kind, pooling = kind_of(tensors, path)
    notes: list[str] = [] if entry else report.notes
    told = _told_normalisation(content)
    preprocessing = assumed_preprocessing(settings, arch.image_size, notes, told)
    weights = Weights.of(tensors, kind, arch, pooling, preprocessing, report)
    return restored(weights, entry)


def content(weights: Weights) -> dict[str, Any]:
    """What a file in the official layout holds. Raises UserError for what it has no name for."""
    if weights.kind == "mim":
        if not weights.architecture.final_norm:
            raise UserError("unilm cannot hold this model: its pretraining model ends with a norm")
    elif weights.pooling != "none":
        check_one_norm(weights, "unilm")
    elif weights.architecture.final_norm:
        raise UserError("unilm cannot hold a final norm that nothing pools from")
    check_released_eps(weights, "unilm")
    if weights.kind == "classification" and weights.architecture.mask_token:
        raise UserError(
            "unilm's fine-tuning model has no mask_token: to leave it behind say allow=mask_token"
        )
    return {"model": _tensors(weights), ENTRY: facts(weights)}


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


def _told_normalisation(content: Any) -> str | None:
    """From the settings of their training script, which its own checkpoints carry."""
    args = content.get("args") if isinstance(content, dict) else None
    if not isinstance(args, InertNamespace):
        return None
    imagenet = args.values.get("imagenet_default_mean_and_std")
    return {True: "imagenet", False: "half"}.get(imagenet) if isinstance(imagenet, bool) else None

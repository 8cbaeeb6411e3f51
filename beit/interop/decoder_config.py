"""How the config of a run says what is behind the backbone of a segmentation model."""

from dataclasses import replace
from typing import Any

from beit.checkpoints.models import Checkpoint
from beit.interop.decoder import (
    HEADS,
    IGNORED,
    Decoder,
    Head,
    Labels,
    head_in,
    labels_in,
    palette_in,
)
from beit.interop.fields import Fields
from beit.interop.weights import Weights

_MODULE = "beit.models.segmentation."  # followed by the name of a head
_PYRAMIDS = {
    "beit.models.pyramid.PlainMaps": False,
    "beit.models.pyramid.FeaturePyramid": True,
}


def has_decoder(task: Fields) -> bool:
    """Whether the task's head is one of segmentation."""
    target = str(task.inner("head").content.get("_target_"))
    return target.removeprefix(_MODULE) in HEADS


def decoder_of(task: Fields) -> Decoder:
    """Of the node `task`. Raises UserError for parts that are not ours."""
    pyramid = task.inner("pyramid")
    return Decoder(
        head=_head(task.inner("head")),
        auxiliary=tuple(_head(node) for node in task.several("auxiliary")),
        taps=pyramid.wholes("taps"),
        pyramid=_PYRAMIDS[pyramid.word("_target_", _PYRAMIDS)],
        auxiliary_weight=task.number("auxiliary_weight", 0.4, high=1e3),
    )


def _head(node: Fields) -> Head:
    target = node.word("_target_", [f"{_MODULE}{name}" for name in HEADS])
    return head_in(target.removeprefix(_MODULE), node)


def labels_of(checkpoint: Checkpoint) -> Labels:
    """What a converted file says, else the run's data."""
    entry = Fields(checkpoint.entry, checkpoint.path)
    palette = palette_in(entry, "palette")
    if "labels" in entry:
        return replace(labels_in(entry.inner("labels")), palette=palette)
    ids = Fields(checkpoint.config, checkpoint.path).inner("data").inner("ids")
    ignored = ids.wholes("ignore", (IGNORED,)) if ids.content.get("ignore") != [] else ()
    return Labels(
        reduce_zero=ids.flag("reduce_zero_label", False),
        ignore_index=(*ignored, IGNORED)[0],
        palette=palette,
    )


def decoder_changes(weights: Weights, decoder: Decoder) -> dict[str, Any]:
    """Changes to the config of the task: whole nodes, so that nothing of the default's stays."""
    sizes = {"width": "${model.width}", "num_classes": "${data.num_classes}"}
    heads = [
        {"_target_": f"{_MODULE}{head.name}", **sizes, **head.arguments}
        for head in (decoder.head, *decoder.auxiliary)
    ]
    pyramid = next(target for target, has in _PYRAMIDS.items() if has == decoder.pyramid)
    names, labels = weights.classes or [], weights.labels
    named = len(set(names)) == len(names) > 0  # the data take no name twice
    return {
        "pyramid": {
            "_target_": pyramid,
            "width": "${model.width}",
            "patch_size": "${model.patch_size}",
            "taps": list(decoder.taps),
        },
        "head": {"main": heads[0], "auxiliary": heads[1:]},
        "task.auxiliary_weight": decoder.auxiliary_weight,
        "data.num_classes": weights.num_outputs,
        "data.classes": names if named else weights.num_outputs,
        "data.ids.palette": labels.palette or "auto",
        "data.ids.ignore": [labels.ignore_index] if labels.ignore_index >= 0 else [],
        "data.ids.reduce_zero_label": labels.reduce_zero,
        "views.eval.interpolation": weights.preprocessing.interpolation,
    }

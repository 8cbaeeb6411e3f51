"""Names of the parts of a segmentation model in each layout, and ours, both ways.

unilm's are OpenMMLab's: `backbone.fpn1`, `decode_head`, `auxiliary_head`, or `auxiliary_head.0` and
`.1` where there are several. Hugging Face's of version 4 differ in the name of the last layer
(`classifier` for `conv_seg`) and in where the pyramid is (`fpn1`); those of version 5's own modules
in the names of all layers. Ours are those of the task: `pyramid.fpn1`, `head`, `auxiliary.0`.
"""

import re

from beit.errors import UserError
from beit.interop.decoder import Decoder, Head

_UNILM = (
    (r"backbone\.(fpn\d)\.", r"pyramid.\1."),
    (r"decode_head\.", "head."),
    (r"auxiliary_head\.(\d+)\.", r"auxiliary.\1."),
    (r"auxiliary_head\.", "auxiliary.0."),
    (r"backbone\.", ""),
)
_HEADS = r"(?:decode_head|auxiliary_head)\..*"
# of Hugging Face: both versions to OpenMMLab's, one after the other
_HUGGINGFACE = (
    (r"fpn\.fpn1\.conv_transpose1\.", "fpn1.0."),
    (r"fpn\.fpn1\.normalization\.", "fpn1.1."),
    (r"fpn\.fpn1\.conv_transpose2\.", "fpn1.3."),
    (r"fpn\.fpn2\.", "fpn2.0."),
    (r"(fpn\d)\.", r"backbone.\1."),
    (r"(decode_head\.psp_modules)\.blocks\.(\d+)\.conv\.", r"\1.\2.1."),
    (r"decode_head\.psp_bottleneck\.", "decode_head.bottleneck."),
    (rf"({_HEADS}\.)convolution\.", r"\1conv."),
    (rf"({_HEADS}\.)normalization\.", r"\1bn."),
    (r"(decode_head|auxiliary_head)\.classifier\.", r"\1.conv_seg."),
)
_OF_HUGGINGFACE = ("decode_head.", "auxiliary_head.", "fpn.", "fpn1.", "fpn2.")


def from_unilm(key: str) -> str:
    """Our name; of the backbone the released one, without prefix."""
    for theirs, ours in _UNILM:
        changed, found = re.subn(rf"^{theirs}", ours, key)
        if found:
            return changed
    return key


def to_unilm(key: str, *, auxiliary: int) -> str:
    """Their name of a tensor of ours, of a model with so many auxiliary heads."""
    if key.startswith("pyramid."):
        return key.replace("pyramid.", "backbone.", 1)
    if key.startswith("head."):
        return f"decode_{key}"
    if key.startswith("auxiliary."):
        return key.replace("auxiliary.0." if auxiliary == 1 else "auxiliary.", "auxiliary_head.", 1)
    return f"backbone.{key}"


def from_huggingface(key: str) -> str | None:
    """Our name of a part that is not of the backbone, by either version's; None for others."""
    if not key.startswith(_OF_HUGGINGFACE):
        return None
    for theirs, unilm in _HUGGINGFACE:
        key = re.sub(rf"^{theirs}", unilm, key)
    return from_unilm(key)


def is_behind(key: str) -> bool:
    """Whether a tensor of ours is of the pyramid or a head of segmentation."""
    classifier = key in ("head.weight", "head.bias")
    return key.startswith(("pyramid.", "head.", "auxiliary.")) and not classifier


def to_huggingface(key: str) -> str:
    """Version 4's name of a part that is not of the backbone."""
    theirs = to_unilm(key, auxiliary=1).removeprefix("backbone.")
    return theirs.replace("_head.conv_seg.", "_head.classifier.")


POOL_SCALES = (1, 2, 3, 6)  # of UPerNet in the release
_ALONE = "; to write the backbone alone say allow=head"


def check_unilm(decoder: Decoder) -> None:
    """Raises UserError for what the released code and OpenMMLab's heads have no place for."""
    if not decoder.pyramid:
        raise UserError(
            "unilm cannot hold a model without a pyramid (PlainMaps): its backbone has one built "
            f"in{_ALONE}"
        )
    for head in (decoder.head, *decoder.auxiliary):
        if head.name == "LinearHead":
            raise UserError(f"unilm cannot hold LinearHead: OpenMMLab has no such head{_ALONE}")


def check_huggingface(decoder: Decoder, width: int) -> None:
    """Raises UserError for what BeitForSemanticSegmentation has no place for.

    It has the pyramid, UPerNet with as many channels as the backbone, and at most one FCN.
    """
    head, others = decoder.head, decoder.auxiliary
    reason = ""
    if not decoder.pyramid:
        reason = "has the pyramid built in, and this model has none (PlainMaps)"
    elif head.name != "UPerNetHead":
        reason = f"has UPerNet as its head, and this model {head.name}"
    elif head.arguments["channels"] != width:
        reason = f"has UPerNet of the backbone's {width} channels, not {head.arguments['channels']}"
    elif head.arguments["pool_scales"] != list(POOL_SCALES):
        reason = f"pools to {list(POOL_SCALES)}, not {head.arguments['pool_scales']}"
    elif len(others) > 1 or any(not _is_their_auxiliary(other) for other in others):
        reason = (
            "has one auxiliary head, an FCN on the third map; leave others with allow=auxiliary"
        )
    elif len(set(decoder.taps)) < len(decoder.taps):
        reason = f"takes no block twice, and the maps are of {list(decoder.taps)}"
    if reason:
        raise UserError(
            f"huggingface cannot hold this model: BeitForSemanticSegmentation {reason}{_ALONE}"
        )


def _is_their_auxiliary(head: Head) -> bool:
    return head.name == "FCNHead" and head.arguments["map_index"] == 2

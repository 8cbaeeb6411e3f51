"""The parts of a segmentation model that are not its backbone, by the names of each layout.

They are not carried yet. unilm's are OpenMMLab's; Hugging Face's differ in the name of the last
layer (`classifier` for `conv_seg`) and in where the pyramid is: `fpn1` in version 4, `fpn.fpn1` in
version 5, `backbone.fpn1` in unilm.
"""

from torch import Tensor

from beit.interop.weights import ReadReport

NOT_YET = "heads of segmentation are not carried, the backbone is"
UNILM_HEADS = ("decode_head.", "auxiliary_head.", "backbone.fpn")
HUGGINGFACE_HEADS = ("decode_head.", "auxiliary_head.", "fpn.", "fpn1.", "fpn2.")


def set_aside(
    tensors: dict[str, Tensor], heads: tuple[str, ...], report: ReadReport
) -> dict[str, Tensor]:
    """The tensors without those whose names begin with one of `heads`; the report names these."""
    aside = [key for key in tensors if key.startswith(heads)]
    if aside:
        report.left[NOT_YET] = aside
    return {key: value for key, value in tensors.items() if not key.startswith(heads)}

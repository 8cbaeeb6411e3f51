"""The backbone for torchvision's detectors: Mask R-CNN, Faster R-CNN, RetinaNet and their kin."""

from collections import OrderedDict

from torch import Tensor, nn
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool

from beit.errors import UserError
from beit.models.pyramid import NUM_MAPS, FeaturePyramid
from beit.models.vit import VisionTransformer


class DetectionBackbone(nn.Module):
    """ViT, the pyramid of its four taps, torchvision's FPN: what `MaskRCNN(backbone, ...)` takes.

    As torchvision's own ResNets with FPN it yields the maps "0" to "3" and "pool", of which anchors
    and region pooling read strides by themselves: 4, 8, 16, 32 and 64 pixels for patches of 16.

    Args:
        backbone: built with `any_size=True`, as a detector's images differ in size.
        pyramid: of the same width and patch size.
        out_channels: of every map.

    Attributes: `out_channels`, which detectors ask for; `size_divisible`, what they must pad images
    to (`MaskRCNN(..., size_divisible=backbone.size_divisible)`; their default is 32).

    Raises:
        UserError: a backbone of one size, or a patch size that is no power of two: torchvision
            takes every stride for one.
    """

    def __init__(
        self, backbone: VisionTransformer, pyramid: FeaturePyramid, *, out_channels: int = 256
    ) -> None:
        super().__init__()
        if not backbone.any_size:
            raise UserError(
                "a detector's images differ in size: build the model with any_size=True"
            )
        patch = backbone.patch_size
        if patch < 4 or patch & (patch - 1):
            raise UserError(
                f"patch_size {patch}: torchvision's region pooling takes every stride for a power"
                " of two; use a model with patches of 4, 8, 16 or 32 pixels"
            )
        self.backbone = backbone
        self.pyramid = pyramid
        self.fpn = FeaturePyramidNetwork(
            [backbone.width] * NUM_MAPS, out_channels, extra_blocks=LastLevelMaxPool()
        )
        self.out_channels = out_channels
        self.size_divisible = 2 * patch

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        """Images (B,3,H,W), padded to multiples of `size_divisible` -> maps (B,C,hi,wi) by name.

        Raises:
            UserError: a size that doesn't divide.
        """
        height, width = images.shape[2:]
        if height % self.size_divisible or width % self.size_divisible:
            raise UserError(
                f"images of {height}x{width} pixels do not divide by {self.size_divisible}: build"
                f" the detector with size_divisible={self.size_divisible}"
            )
        patch = self.backbone.patch_size
        tokens = self.backbone.forward_blocks(images, taps=self.pyramid.taps)
        maps = self.pyramid(tokens, (height // patch, width // patch))
        return self.fpn(OrderedDict((str(i), level) for i, level in enumerate(maps)))

"""Heads of segmentation: four maps in, class logits at the head's own stride out.

Written after OpenMMLab's mmsegmentation, whose parameter names and initialisation they have: He's
normal for convolutions with BatchNorm, normal with deviation 0.01 and no bias for `conv_seg`.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beit.errors import UserError
from beit.models.convolution import ConvNormReLU, FusingConv
from beit.models.layers import NORM_EPS
from beit.models.pyramid import NUM_MAPS


class PixelClassifier(nn.Module):
    """What all heads end with: whole channels dropped out, then `conv_seg`, class logits."""

    def __init__(self, channels: int, num_classes: int, *, dropout: float) -> None:
        super().__init__()
        if num_classes < 2:
            raise UserError(f"num_classes {num_classes} must be at least 2")
        if not 0 <= dropout < 1:
            raise UserError(f"dropout {dropout} must lie in [0, 1)")
        self.num_classes = num_classes
        self.dropout = nn.Dropout2d(dropout)
        self.conv_seg = nn.Conv2d(channels, num_classes, kernel_size=1)
        nn.init.normal_(self.conv_seg.weight, std=0.01)
        assert self.conv_seg.bias is not None
        nn.init.zeros_(self.conv_seg.bias)

    def classify(self, x: Tensor) -> Tensor:
        """x (B,C,h,w) -> logits (B,K,h,w)."""
        return self.conv_seg(self.dropout(x))


class UPerNetHead(PixelClassifier):
    """UPerNet (arXiv 1807.10221): pooled context on the last map, then top-down to the first's.

    Args:
        width: D, channels of every map.
        num_classes: K.
        channels: inside; BEiT has the width.
        dropout: of whole channels before the logits.
        pool_scales: sides of the grids that the last map is pooled to.
    """

    def __init__(
        self,
        width: int,
        num_classes: int,
        *,
        channels: int,
        dropout: float = 0.1,
        pool_scales: Sequence[int] = (1, 2, 3, 6),
    ) -> None:
        super().__init__(channels, num_classes, dropout=dropout)
        self.psp_modules = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(scale), ConvNormReLU(width, channels, kernel_size=1))
            for scale in pool_scales
        )
        self.bottleneck = FusingConv(width + len(pool_scales) * channels, channels)
        lower = range(NUM_MAPS - 1)
        self.lateral_convs = nn.ModuleList(
            ConvNormReLU(width, channels, kernel_size=1) for _ in lower
        )
        self.fpn_convs = nn.ModuleList(
            ConvNormReLU(channels, channels, kernel_size=3) for _ in lower
        )
        self.fpn_bottleneck = FusingConv(NUM_MAPS * channels, channels)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps (B,D,hi,wi), the largest first -> logits (B,K,h0,w0).

        Raises:
            UserError: one image alone in training, of which a pooled map has a single value.
        """
        if self.training and type(self.bottleneck.bn) is nn.BatchNorm2d:
            self.check_images(len(maps[0]))  # SyncBatchNorm sees those of the other processes too
        levels = [lateral(x) for lateral, x in zip(self.lateral_convs, maps[:-1], strict=True)]
        levels.append(self.bottleneck([maps[-1], *(pool(maps[-1]) for pool in self.psp_modules)]))
        for i in reversed(range(NUM_MAPS - 1)):
            levels[i] = levels[i] + resize(levels[i + 1], levels[i].shape[2:])
        smooth = [conv(x) for conv, x in zip(self.fpn_convs, levels[:-1], strict=True)]
        return self.classify(self.fpn_bottleneck([*smooth, levels[-1]]))

    def check_images(self, count: int) -> None:
        """Raises UserError where BatchNorm is to see `count` images in training, and that is 1."""
        if count == 1:
            raise UserError(
                "UPerNet cannot train on one image at a time, BatchNorm needs two of a process:"
                " batch.per_device=2, or trainer.sync_batchnorm=true with several processes"
            )


class FCNHead(PixelClassifier):
    """3x3 convolutions on one map: the auxiliary head beside UPerNet.

    Args:
        width: D, channels of every map.
        num_classes: K.
        channels: of the convolutions; BEiT has 256.
        num_convs: at least 1.
        map_index: which of the four maps, counted from 0.
        dropout: of whole channels before the logits.
    """

    def __init__(
        self,
        width: int,
        num_classes: int,
        *,
        channels: int = 256,
        num_convs: int = 1,
        map_index: int = 2,
        dropout: float = 0.1,
    ) -> None:
        super().__init__(channels, num_classes, dropout=dropout)
        self.map_index = _checked_index(map_index)
        self.convs = nn.Sequential(
            *(
                ConvNormReLU(channels if i else width, channels, kernel_size=3)
                for i in range(num_convs)
            )
        )

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps (B,D,hi,wi) -> logits (B,K,h,w) at the size of the map it reads."""
        return self.classify(self.convs(maps[self.map_index]))


class SETRPUPHead(PixelClassifier):
    """Progressive upsampling (SETR, arXiv 2012.15840): convolve and enlarge, again and again.

    The head of the BEiT paper's table 14, which was never released; this is mmsegmentation's,
    LayerNorm on the map included. There the main head has four convolutions and enlarges twofold
    after each; an auxiliary head has one and enlarges fourfold. Both have 256 channels.

    Args:
        width: D, channels of every map.
        num_classes: K.
        channels: of the convolutions.
        num_upsamples: how many times.
        scale: by how much each time.
        map_index: which of the four maps, counted from 0.
        dropout: of whole channels before the logits; mmsegmentation has none.
    """

    def __init__(
        self,
        width: int,
        num_classes: int,
        *,
        channels: int = 256,
        num_upsamples: int = 4,
        scale: int = 2,
        map_index: int = 3,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(channels, num_classes, dropout=dropout)
        if num_upsamples < 1 or scale < 1:
            raise UserError(f"num_upsamples {num_upsamples} and scale {scale} must be at least 1")
        self.map_index = _checked_index(map_index)
        self.scale = scale
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.up_convs = nn.ModuleList(
            # in a list, as the enlarging follows it there
            nn.ModuleList([ConvNormReLU(channels if i else width, channels, kernel_size=3)])
            for i in range(num_upsamples)
        )

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps (B,D,h,w) -> logits (B,K,h·S,w·S), S = scale ** num_upsamples."""
        x = self.norm(maps[self.map_index].permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        size = x.shape[2:]
        for layer in self.up_convs.modules():
            if isinstance(layer, ConvNormReLU):
                x = layer.resized(x, size)  # what is enlarged is what came before
                size = torch.Size(self.scale * side for side in size)
        return resize(self.classify(x), size)  # the 1x1 convolution may as well come first


class LinearHead(PixelClassifier):
    """BatchNorm and a 1x1 convolution on one map, as DINOv2 (arXiv 2304.07193) measures features.

    Args:
        width: D, channels of every map.
        num_classes: K.
        map_index: which of the four maps, counted from 0.
    """

    def __init__(self, width: int, num_classes: int, *, map_index: int = 3) -> None:
        super().__init__(width, num_classes, dropout=0.0)
        self.map_index = _checked_index(map_index)
        self.bn = nn.BatchNorm2d(width)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps (B,D,hi,wi) -> logits (B,K,h,w) at the size of the map it reads."""
        return self.classify(self.bn(maps[self.map_index]))


def resize(x: Tensor, size: Sequence[int]) -> Tensor:
    """x (B,C,h,w) -> (B,C,H,W), bilinear by the pixels' areas (`align_corners=False`)."""
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


def _checked_index(index: int) -> int:
    if not 0 <= index < NUM_MAPS:
        raise UserError(f"map_index {index} must be one of the maps 0 to {NUM_MAPS - 1}")
    return index

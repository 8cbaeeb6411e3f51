"""Semantic segmentation: a class for every pixel, from maps of four of the backbone's blocks."""

import logging
from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beit.data.batches import SegmentationBatch
from beit.data.label_maps import IGNORED
from beit.data.limits import not_negative
from beit.data.pixels import by
from beit.errors import UserError
from beit.evaluation.memory import check_forward, told_if_memory_ends
from beit.evaluation.segmentation_metrics import PixelConfusion, SegmentationScores
from beit.evaluation.windows import Inference
from beit.models.pyramid import FeaturePyramid, PlainMaps
from beit.models.segmentation import UPerNetHead, resize
from beit.models.vit import VisionTransformer
from beit.optim.recipe import AdamWRecipe
from beit.tasks.accounting import MeanOverGlobalBatch
from beit.tasks.planning import configure_adamw

log = logging.getLogger(__name__)


class Segmentation(L.LightningModule):
    """Cross-entropy of each pixel, and `auxiliary_weight` times the same for each auxiliary head.

    Summed over the labelled pixels and divided by all pixels of the global batch, as mmsegmentation
    did when BEiT was measured: an image with few labelled pixels weighs less. However the global
    batch is spread, the loss is the same; what BatchNorm normalises by is of a micro-batch, or with
    `trainer.sync_batchnorm` of all ranks' micro-batches, as in the original.

    Args:
        backbone: yields tokens (B, 1+N, D) of the pyramid's taps.
        pyramid: yields four maps from them.
        head: yields logits (B, K, h', w') from the maps.
        auxiliary: heads that are trained beside it and do not predict.
        optim: the optimizer's recipe.
        num_classes: K.
        auxiliary_weight: 0.4 in the original.
        class_weights: K numbers, by which a pixel's loss is multiplied according to its label, so
            that rare classes count for more; None for 1 each, as in the original.
        inference: from an image of any size to its classes (see `beit.evaluation.windows`).

    Raises:
        UserError: a negative weight, class weights of another number than the classes or all 0, a
            tap that the backbone does not have, images of too few patches for the pyramid, or an
            inference that shows the backbone other images than it takes.
    """

    def __init__(
        self,
        backbone: VisionTransformer,
        pyramid: FeaturePyramid | PlainMaps,
        head: nn.Module,
        auxiliary: Sequence[nn.Module],
        *,
        optim: AdamWRecipe,
        num_classes: int,
        auxiliary_weight: float,
        inference: Inference,
        class_weights: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self.auxiliary_weight = not_negative("auxiliary_weight", auxiliary_weight)
        weights = None if class_weights is None else _checked_weights(class_weights, num_classes)
        self.register_buffer("class_weights", weights, persistent=False)
        self.backbone = backbone
        self.pyramid = pyramid
        self.head = head
        self.auxiliary = nn.ModuleList(auxiliary)
        self.optim = optim
        self.inference = inference
        self.average = MeanOverGlobalBatch()
        self.val_confusion = PixelConfusion(num_classes)
        self.scores: SegmentationScores | None = None  # of the latest validation
        _check_taps(pyramid.taps, backbone.depth)
        pyramid.check_grid(backbone.grid)
        _check_inference(inference, backbone)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W), normalised -> logits (B, K, H, W)."""
        return resize(self.coarse_logits(images).float(), images.shape[2:])

    def coarse_logits(self, images: Tensor) -> Tensor:
        """Logits (B, K, h', w') at the head's own stride."""
        return self.head(self.maps(images))

    def maps(self, images: Tensor) -> list[Tensor]:
        """The pyramid's four maps (B, D, hi, wi)."""
        tokens = self.backbone.forward_blocks(images, taps=self.pyramid.taps)
        height, width = (side // self.backbone.patch_size for side in images.shape[2:])
        return self.pyramid(tokens, (height, width))

    def predict(self, image: Tensor, size: tuple[int, int]) -> Tensor:
        """Class ids (H0, W0) int16 of one image (3, h, w), normalised, at its original `size`.

        Raises UserError where a window does not fit into the device's memory.
        """
        return self.inference(self._fitting_logits, image, size)

    def training_step(self, batch: SegmentationBatch, batch_idx: int) -> Tensor:
        maps = self.maps(batch.images)
        logits = resize(self.head(maps).float(), batch.labels.shape[1:])
        main = pixel_loss(logits, batch.labels, self.class_weights)
        total = main
        for head in self.auxiliary:
            beside = resize(head(maps).float(), batch.labels.shape[1:])
            added = pixel_loss(beside, batch.labels, self.class_weights)
            total = total + self.auxiliary_weight * added
        loss = self.average(self, total, batch.labels.numel(), batch_idx)
        with torch.no_grad():
            known = (batch.labels != IGNORED).sum().clamp(min=1)
            hits = (logits.argmax(dim=1) == batch.labels).sum() / known
            share = main.detach() / batch.labels.numel()
        self.log("train/loss", self.average.mean, prog_bar=True, sync_dist=True)
        self.log("train/head_loss", share, sync_dist=True)
        self.log("train/pixel_acc", hits, prog_bar=True, sync_dist=True)
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.average.correct_gradients(self)

    def setup(self, stage: str) -> None:
        if self.trainer.is_global_zero:
            log.info("inference %r", self.inference)

    def on_fit_start(self) -> None:
        self.check(self.device)

    def validation_step(self, batch: SegmentationBatch, batch_idx: int) -> None:
        for image, labels in zip(batch.images, batch.labels, strict=True):
            height, width = labels.shape
            self.val_confusion.update(self.predict(image, (height, width)), labels)

    def on_validation_epoch_end(self) -> None:
        self.scores = SegmentationScores.of(self.val_confusion.compute())
        self.val_confusion.reset()
        # the counts were summed over the ranks: all have the same numbers
        self.log("val/miou", self.scores.mean_iou, prog_bar=True, sync_dist=True)
        self.log("val/mean_acc", self.scores.mean_accuracy, sync_dist=True)
        self.log("val/pixel_acc", self.scores.pixel_accuracy, prog_bar=True, sync_dist=True)

    def table(self, classes: list[str] | None) -> list[dict[str, str | int | float | None]]:
        """The latest validation class by class (see `SegmentationScores.table`)."""
        return [] if self.scores is None else self.scores.table(classes)

    def configure_optimizers(self) -> Any:
        return configure_adamw(
            self,
            self.optim,
            backbone=self.backbone,
            pyramid=self.pyramid,
            head=self.head,
            auxiliary=self.auxiliary,
        )

    def check(self, device: torch.device, *, normalised_together: int = 0) -> None:
        """Raises UserError for what validation cannot do: it would tell an epoch later.

        And where so many images as BatchNorm sees in training are too few; 0: not known.
        """
        if isinstance(self.head, UPerNetHead):
            self.head.check_images(normalised_together)
        if known := self.inference.largest_pass():
            check_forward(self.backbone, *known, device)

    def _fitting_logits(self, windows: Tensor) -> Tensor:
        count, _, height, width = windows.shape
        check_forward(self.backbone, (height, width), count, windows.device)
        with told_if_memory_ends((height, width), count):
            return self.coarse_logits(windows)


def pixel_loss(logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
    """Cross-entropy of logits (B, K, H, W) summed over the labelled pixels of labels (B, H, W).

    Each pixel's is multiplied by that of `weights` (K,) which its label has.
    """
    # a pixel's classes lie side by side, as the heads leave them: half the time of (B, K, H, W)
    rows = logits.permute(0, 2, 3, 1).flatten(0, 2)
    return F.cross_entropy(
        rows, labels.flatten(), weight=weights, ignore_index=IGNORED, reduction="sum"
    )


def _checked_weights(weights: Sequence[float], num_classes: int) -> Tensor:
    values = [not_negative(f"class_weights[{i}]", value) for i, value in enumerate(weights)]
    if len(values) != num_classes or not any(values):
        raise UserError(
            f"class_weights {values}: expected {num_classes} numbers, one a class in the data's "
            "order, not all 0"
        )
    return torch.tensor(values, dtype=torch.float32)


def _check_taps(taps: Sequence[int], depth: int) -> None:
    if max(taps) >= depth:
        raise UserError(
            f"pyramid.taps={list(taps)}: a model of {depth} blocks has blocks 0 to {depth - 1}; "
            "choose another pyramid, or model.depth"
        )


def _check_inference(inference: Inference, backbone: VisionTransformer) -> None:
    """Raises UserError for windows, or whole images, that the backbone would not take."""
    known, own = inference.largest_pass(), by(backbone.image_size)
    if known is None and not backbone.any_size:
        raise UserError(
            f"inference {inference!r} takes images as they come, and this model those of {own} px "
            "alone: say model.any_size=true, or inference=sliding"
        )
    if known is None:
        return
    window = known[0]
    if window != backbone.image_size and not backbone.any_size:
        raise UserError(
            f"inference.window {by(window)}: this model takes windows of {own} px alone; leave "
            "inference.window out, or say model.any_size=true"
        )
    if any(side % backbone.patch_size for side in window):
        raise UserError(
            f"inference.window {by(window)}: expected multiples of the model's patches of "
            f"{backbone.patch_size} px"
        )

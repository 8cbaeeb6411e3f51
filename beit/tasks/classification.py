"""Image classification: fine-tuning a pretrained backbone, or training one from scratch."""

from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from beit.data.batches import LabelledBatch
from beit.errors import UserError
from beit.optim.recipe import AdamWRecipe
from beit.tasks.accounting import MeanOverGlobalBatch
from beit.tasks.planning import configure_adamw


class Classification(L.LightningModule):
    """Cross-entropy with label smoothing, or with the soft targets that mixing made.

    The loss is the mean over the images of the global batch, however they are spread; the last
    batch of an epoch may be smaller.

    Args:
        backbone: yields features (B, 1+N, D) from images (B, 3, H, W).
        head: yields logits (B, K) from features.
        optim: the optimizer's recipe.
        num_classes: K.
        label_smoothing: in [0, 1); mixed targets (B, K) carry theirs already.

    Raises:
        UserError: a label smoothing outside [0, 1).
    """

    def __init__(
        self,
        backbone: nn.Module,
        head: nn.Module,
        *,
        optim: AdamWRecipe,
        num_classes: int,
        label_smoothing: float,
    ) -> None:
        super().__init__()
        if not 0 <= label_smoothing < 1:
            raise UserError(f"label_smoothing {label_smoothing} must lie in [0, 1); 0 is off")
        self.backbone = backbone
        self.head = head
        self.optim = optim
        self.label_smoothing = label_smoothing
        self.average = MeanOverGlobalBatch()
        self.val_acc1 = MulticlassAccuracy(num_classes, top_k=1, average="micro")
        self.val_acc5 = MulticlassAccuracy(num_classes, top_k=min(5, num_classes), average="micro")

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, K)."""
        return self.head(self.backbone(images))

    def training_step(self, batch: LabelledBatch, batch_idx: int) -> Tensor:
        logits = self(batch.images).float()
        soft = batch.targets.ndim == 2
        smoothing = 0.0 if soft else self.label_smoothing
        total = F.cross_entropy(logits, batch.targets, label_smoothing=smoothing, reduction="sum")
        loss = self.average(self, total, len(logits), batch_idx)
        labels = batch.targets.argmax(dim=-1) if soft else batch.targets
        with torch.no_grad():
            hits = (logits.argmax(dim=-1) == labels).float().mean()
        self.log("train/loss", self.average.mean, prog_bar=True, sync_dist=True)
        # under mixing: agreement with the stronger of the two labels
        self.log("train/acc1", hits, sync_dist=True)
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.average.correct_gradients(self)

    def validation_step(self, batch: LabelledBatch, batch_idx: int) -> None:
        logits = self(batch.images).float()
        loss = F.cross_entropy(logits, batch.targets)
        self.val_acc1.update(logits, batch.targets)
        self.val_acc5.update(logits, batch.targets)
        size = batch.targets.numel()
        self.log("val/loss", loss, batch_size=size, sync_dist=True, prog_bar=True)
        self.log("val/acc1", self.val_acc1, batch_size=size, prog_bar=True)
        self.log("val/acc5", self.val_acc5, batch_size=size)

    def configure_optimizers(self) -> Any:
        return configure_adamw(self, self.optim, backbone=self.backbone, head=self.head)

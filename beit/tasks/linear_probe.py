"""Linear probes trained by gradient descent, as in the paper.

`evaluation=linear_probe` solves them instead. The backbone is frozen, and its mode with it.
"""

from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from beit.data.batches import LabelledBatch
from beit.models.probes import LayerProbes
from beit.models.vit import VisionTransformer
from beit.optim.recipe import AdamWRecipe
from beit.tasks.accounting import MeanOverGlobalBatch
from beit.tasks.planning import configure_adamw


class LinearProbing(L.LightningModule):
    """The sum of the layers' cross-entropies; no gradient passes from one layer to another.

    `val/acc1` is the best layer's, which the validation images themselves choose, as in the paper;
    each layer's stands beside it. The backbone is in evaluation mode throughout.

    Args:
        backbone: its block outputs are looked at.
        head: a probe for each layer.
        optim: of the probes alone.
        num_classes: K.
    """

    def __init__(
        self,
        backbone: VisionTransformer,
        head: LayerProbes,
        *,
        optim: AdamWRecipe,
        num_classes: int,
    ) -> None:
        super().__init__()
        # Lightning leaves every module in the mode that it finds
        self.backbone = backbone.requires_grad_(False).eval()
        self.head = head
        self.optim = optim
        self.average = MeanOverGlobalBatch()
        self.val_acc1 = nn.ModuleList(
            MulticlassAccuracy(num_classes, top_k=1, average="micro") for _ in head.layers
        )

    def train(self, mode: bool = True) -> "LinearProbing":
        super().train(mode)
        self.backbone.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B,K) of the layer that did best in the last validation."""
        return self._logits(images)[self.head.best]

    def _logits(self, images: Tensor) -> Tensor:
        """(L,B,K)."""
        with torch.no_grad():
            outputs = self.backbone.forward_blocks(
                images, taps=[layer - 1 for layer in self.head.layers]
            )
        return self.head(outputs).float()

    def training_step(self, batch: LabelledBatch, batch_idx: int) -> Tensor:
        logits = self._logits(batch.images)
        targets = batch.targets.expand(len(logits), -1)
        total = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
        loss = self.average(self, total, len(batch.targets), batch_idx)
        self.log("train/loss", self.average.mean, prog_bar=True, sync_dist=True)
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.average.correct_gradients(self)

    def validation_step(self, batch: LabelledBatch, batch_idx: int) -> None:
        logits = self._logits(batch.images)
        targets = batch.targets.expand(len(logits), -1)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten()) * len(logits)
        size = batch.targets.numel()
        self.log("val/loss", loss, batch_size=size, sync_dist=True, prog_bar=True)
        for accuracy, of_layer in zip(self.val_acc1, logits, strict=True):
            accuracy.update(of_layer, batch.targets)  # type: ignore[operator]

    def on_validation_epoch_end(self) -> None:
        found = torch.stack([accuracy.compute() for accuracy in self.val_acc1])  # type: ignore[operator]
        for layer, accuracy, share in zip(self.head.layers, self.val_acc1, found, strict=True):
            self.log(f"val/acc1_layer_{layer:02d}", share)
            accuracy.reset()  # type: ignore[operator]
        self.head.best.fill_(int(found.argmax()))
        self.log("val/acc1", found.max(), prog_bar=True)
        self.log("val/best_layer", float(self.head.layers[int(self.head.best)]))

    def configure_optimizers(self) -> Any:
        return configure_adamw(self, self.optim, head=self.head)

"""Masked image modelling: predict the visual tokens of the hidden patches (BEiT, section 2.3)."""

from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beit.data.batches import MIMBatch
from beit.models.heads import MIMHead
from beit.optim.recipe import AdamWRecipe
from beit.tasks.accounting import MeanOverGlobalBatch, TokenHistogram
from beit.tasks.planning import configure_adamw


class MaskedImageModeling(L.LightningModule):
    """Cross-entropy of the hidden patches' visual tokens.

    The loss is the mean over all masked patches of the global batch, however it is spread over
    devices and accumulated micro-batches, so that the same global batch gives the same gradient
    anywhere. (The original takes the mean within each GPU.)

    Args:
        backbone: yields features (B, 1+N, D) from images (B, 3, H, W) and mask (B, h, w).
        head: yields logits (M, V) of the masked patches, row-major over the batch.
        optim: the optimizer's recipe.
    """

    def __init__(self, backbone: nn.Module, head: MIMHead, *, optim: AdamWRecipe) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.optim = optim
        self.average = MeanOverGlobalBatch()
        self.train_tokens = TokenHistogram(head.vocab_size)
        self.val_tokens = TokenHistogram(head.vocab_size)

    def forward(self, images: Tensor, mask: Tensor) -> Tensor:
        """Logits (M, V) of the masked patches."""
        return self.head(self.backbone(images, mask), mask)

    @torch.no_grad()
    def predict_tokens(self, images: Tensor, mask: Tensor) -> Tensor:
        """Predicted token ids (B, h, w) at every patch; only the masked ones were asked for."""
        everywhere = torch.ones_like(mask)
        logits = self.head(self.backbone(images, mask), everywhere)
        return logits.argmax(dim=-1).view(mask.shape)

    def training_step(self, batch: MIMBatch, batch_idx: int) -> Tensor:
        logits, targets = self._predict(batch)
        total = F.cross_entropy(logits.float(), targets, reduction="sum")
        loss = self.average(self, total, targets.numel(), batch_idx)
        with torch.no_grad():
            self.train_tokens.update(targets)
            hits = (logits.argmax(dim=-1) == targets).float().mean()
        self.log("train/loss", self.average.mean, prog_bar=True, sync_dist=True)
        self.log("train/mim_acc", hits, prog_bar=True, sync_dist=True)
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.average.correct_gradients(self)

    def on_train_epoch_end(self) -> None:
        self._log_histogram("train", self.train_tokens)

    def validation_step(self, batch: MIMBatch, batch_idx: int) -> None:
        logits, targets = self._predict(batch)
        loss = F.cross_entropy(logits.float(), targets)
        hits = (logits.argmax(dim=-1) == targets).float().mean()
        self.val_tokens.update(targets)
        # weighted by the masked patches, so that the epoch's mean is the mean over patches
        size = targets.numel()
        self.log("val/loss", loss, batch_size=size, sync_dist=True, prog_bar=True)
        self.log("val/mim_acc", hits, batch_size=size, sync_dist=True, prog_bar=True)

    def on_validation_epoch_end(self) -> None:
        self._log_histogram("val", self.val_tokens)

    def configure_optimizers(self) -> Any:
        return configure_adamw(self, self.optim, backbone=self.backbone, head=self.head)

    def _predict(self, batch: MIMBatch) -> tuple[Tensor, Tensor]:
        return self(batch.images, batch.mask), batch.token_ids[batch.mask]

    def _log_histogram(self, stage: str, tokens: TokenHistogram) -> None:
        """How good is an accuracy? Beside it stands that of always guessing the commonest token."""
        self.log(f"{stage}/commonest_token_acc", tokens.commonest_share(), sync_dist=False)
        self.log(f"{stage}/token_perplexity", tokens.perplexity(), sync_dist=False)
        tokens.reset()

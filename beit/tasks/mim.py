"""Masked image modelling: predict what hidden patches show (BEiT, section 2.3 and table 4)."""

from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor, nn
from torchmetrics import Metric

from beit.errors import UserError
from beit.models.heads import MIMHead, PixelHead
from beit.optim.recipe import AdamWRecipe
from beit.tasks.accounting import MeanOverGlobalBatch
from beit.tasks.planning import configure_adamw
from beit.tasks.targets import TOKENS, Target


class MaskedImageModeling(L.LightningModule):
    """Predicts the hidden patches' visual tokens, or another target of them.

    The loss is the mean over all chosen patches of the global batch, however it is spread over
    devices and accumulated micro-batches, so that the same global batch gives the same gradient
    anywhere. (The original takes the mean within each GPU.)

    Args:
        backbone: yields features (B, 1+N, D) from images (B, 3, H, W) and mask (B, h, w).
        head: yields outputs (P, O) of the P chosen patches, row-major over the batch.
        optim: the optimizer's recipe.
        target: what the head is to predict.
        predict: the patches that enter the loss: "masked" ones, or "all" of them.
        mask_input: whether the backbone sees mask tokens in place of the masked patches.

    Raises UserError for another `predict`.
    """

    def __init__(
        self,
        backbone: nn.Module,
        head: MIMHead | PixelHead,
        *,
        optim: AdamWRecipe,
        target: Target = TOKENS,
        predict: Literal["masked", "all"] = "masked",
        mask_input: bool = True,
    ) -> None:
        super().__init__()
        if predict not in ("masked", "all"):
            raise UserError(f"task.predict={predict}: expected masked or all")
        self.backbone = backbone
        self.head = head
        self.optim = optim
        self.target = target
        self.predict = predict
        self.mask_input = mask_input
        self.average = MeanOverGlobalBatch()
        self.train_targets = target.meter(head)
        self.val_targets = target.meter(head)

    def forward(self, images: Tensor, mask: Tensor) -> Tensor:
        """Outputs (P, O) of the chosen patches: logits (M, V) of the masked ones, say."""
        return self.head(self._features(images, mask), self.chosen(mask))

    def chosen(self, mask: Tensor) -> Tensor:
        """(B, h, w) bool: the patches that enter the loss."""
        return mask if self.predict == "masked" else torch.ones_like(mask)

    def hidden(self, mask: Tensor) -> Tensor:
        """(B, h, w) bool: the patches that the backbone does not see."""
        return mask if self.mask_input else torch.zeros_like(mask)

    @torch.no_grad()
    def predict_everywhere(self, images: Tensor, mask: Tensor) -> Tensor:
        """Outputs (B, h, w, O) at every patch; only the chosen ones were asked for."""
        outputs = self.head(self._features(images, mask), torch.ones_like(mask))
        return outputs.view(*mask.shape, -1)

    def predict_tokens(self, images: Tensor, mask: Tensor) -> Tensor:
        """Predicted token ids (B, h, w) at every patch."""
        return self.predict_everywhere(images, mask).argmax(dim=-1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        predicted, wanted = self._predict(batch)
        total = self.target.loss(predicted, wanted, reduction="sum")
        loss = self.average(self, total, len(wanted), batch_idx)
        with torch.no_grad():
            self.train_targets.update(wanted)
            measures = self.target.measures(predicted, wanted)
        self.log("train/loss", self.average.mean, prog_bar=True, sync_dist=True)
        for name, value in measures.items():
            self.log(f"train/{name}", value, prog_bar=True, sync_dist=True)
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.average.correct_gradients(self)

    def on_train_epoch_end(self) -> None:
        self._log_guesses("train", self.train_targets)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        predicted, wanted = self._predict(batch)
        measures = {"loss": self.target.loss(predicted, wanted, reduction="mean")}
        measures |= self.target.measures(predicted, wanted)
        self.val_targets.update(wanted)
        # weighted by the chosen patches, so that the epoch's mean is the mean over patches
        weight = {"batch_size": len(wanted)}
        for name, value in measures.items():
            self.log(f"val/{name}", value, **weight, sync_dist=True, prog_bar=True)

    def on_validation_epoch_end(self) -> None:
        self._log_guesses("val", self.val_targets)

    def configure_optimizers(self) -> Any:
        return configure_adamw(self, self.optim, backbone=self.backbone, head=self.head)

    def _features(self, images: Tensor, mask: Tensor) -> Tensor:
        # where nothing is hidden a mask is given all the same: under DDP every weight is used
        return self.backbone(images, self.hidden(mask))

    def _predict(self, batch: Any) -> tuple[Tensor, Tensor]:
        wanted = self.target.wanted(batch, self.chosen(batch.mask))
        return self(batch.images, batch.mask), wanted

    def _log_guesses(self, stage: str, seen: Metric) -> None:
        """How good is an accuracy? Beside it stands that of always guessing the same."""
        guesses: Any = seen
        for name, value in guesses.named().items():
            self.log(f"{stage}/{name}", value, sync_dist=False)
        seen.reset()

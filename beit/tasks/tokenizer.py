"""Training a discrete VAE: reconstruction through Gumbel-softmax samples of a codebook."""

import logging
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from torchmetrics import MeanMetric

from beit.data.batches import PixelBatch
from beit.data.randomness import sample_key
from beit.errors import UserError
from beit.optim.recipe import AdamWRecipe
from beit.tasks.accounting import TokenHistogram, sum_over_ranks
from beit.tasks.planning import configure_adamw, planned_steps
from beit.tokenizers.base import to_value_range
from beit.tokenizers.codebook import CodeRevival, feature_sums, imbalance, kl_to_uniform
from beit.tokenizers.dvae import DiscreteVAE, DVAEOutput

log = logging.getLogger(__name__)


class DiscreteVAETraining(L.LightningModule):
    """Mean squared error + kl_weight · KL(q ‖ uniform) + balance_weight · KL(mean q ‖ uniform).

    Both divergences are in nats; q is a position's distribution over the codes, mean q that of the
    micro-batch. Neither the paper nor the reference says how its tokenizer was trained; what was
    tried here is in docs/tokenizer.md.

    Args:
        tokenizer: the dVAE.
        optim: the optimizer's recipe.
        seed: of the Gumbel noise, which depends on (seed, step, micro-batch, rank) alone.
        start_temperature, end_temperature: of the Gumbel-softmax; geometric in between.
        temperature_anneal_share: share of the run over which the temperature falls.
        kl_weight: reached linearly over the first `kl_warmup_share` of the run.
        balance_weight: keeps the codes in use from the first step on; 0 is off.
        revival: splits busy codes into dead ones; None is off.
        min_used_share: below this share of used codes on held-out images a warning is logged.
    """

    recent_counts: Tensor

    def __init__(
        self,
        tokenizer: DiscreteVAE,
        *,
        optim: AdamWRecipe,
        seed: int,
        start_temperature: float,
        end_temperature: float,
        temperature_anneal_share: float,
        kl_weight: float,
        kl_warmup_share: float,
        balance_weight: float,
        revival: CodeRevival | None,
        min_used_share: float,
    ) -> None:
        super().__init__()
        if not 0 < end_temperature <= start_temperature:
            raise UserError(
                f"end_temperature {end_temperature}, start_temperature {start_temperature}: "
                "expected 0 < end <= start"
            )
        shares = {
            "temperature_anneal_share": temperature_anneal_share,
            "kl_warmup_share": kl_warmup_share,
            "min_used_share": min_used_share,
        }
        for name, share in shares.items():
            if not 0 <= share <= 1:
                raise UserError(f"{name} {share}: must lie in [0, 1]")
        if kl_weight < 0 or balance_weight < 0:
            raise UserError(
                f"kl_weight {kl_weight}, balance_weight {balance_weight}: must not be negative"
            )
        self.tokenizer = tokenizer
        self.optim = optim
        self.seed = seed
        self.start_temperature = start_temperature
        self.end_temperature = end_temperature
        self.temperature_anneal_share = temperature_anneal_share
        self.kl_weight = kl_weight
        self.kl_warmup_share = kl_warmup_share
        self.balance_weight = balance_weight
        self.revival = revival
        self.min_used_share = min_used_share
        self.val_mse, self.val_mae = MeanMetric(), MeanMetric()
        self.val_tokens = TokenHistogram(tokenizer.vocab_size)
        self._best_perplexity = 0.0
        self._revived: int | None = None  # by the latest step, until it is logged
        # of all ranks since the last revival; in the checkpoint, so that a resumed run is the same
        counts = torch.zeros(tokenizer.vocab_size, dtype=torch.int64)
        self.register_buffer("recent_counts", counts)

    def temperature_at(self, progress: float) -> float:
        """Gumbel-softmax temperature after a share `progress` of the run."""
        share = ramp(progress, self.temperature_anneal_share)
        return self.start_temperature * (self.end_temperature / self.start_temperature) ** share

    def kl_weight_at(self, progress: float) -> float:
        """Weight of the KL term after a share `progress` of the run."""
        return self.kl_weight * ramp(progress, self.kl_warmup_share)

    def training_step(self, batch: PixelBatch, batch_idx: int) -> Tensor:
        progress = self.global_step / planned_steps(self.trainer)[1]
        temperature, kl_weight = self.temperature_at(progress), self.kl_weight_at(progress)
        images = to_value_range(batch.images, self.tokenizer.value_range)
        position = batch_idx * self.trainer.world_size + self.global_rank
        generator = self._generator("gumbel", position, self.global_step)
        output = self.tokenizer(images, temperature=temperature, generator=generator)
        parts = {"reconstruction": F.mse_loss(output.reconstructions, images)}
        loss = parts["reconstruction"]
        if self.kl_weight > 0:
            parts["kl"] = kl_to_uniform(output.logits)
            loss = loss + kl_weight * parts["kl"]
        if self.balance_weight > 0:
            parts["imbalance"] = imbalance(output.logits)
            loss = loss + self.balance_weight * parts["imbalance"]
        if self.revival is not None:
            self._count(output)
        self.log("train/loss", loss, prog_bar=True, sync_dist=True)
        self.log_dict({f"train/{name}": part for name, part in parts.items()}, sync_dist=True)
        self.log_dict({"train/temperature": temperature, "train/kl_weight": kl_weight})
        return loss

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None
    ) -> None:
        """The step, and what is due after it: no checkpoint may come between the two."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        step = self.global_step + 1  # it is counted once this returns
        if self.revival and self.revival.is_due(step, planned_steps(self.trainer)[1]):
            raw: Any = self.optimizers(use_pl_optimizer=False)
            self._revived = self.revival(
                self.tokenizer,
                self.recent_counts,
                centres=self._centres(),
                state=raw.state,
                generator=self._generator("revival", 0, step),  # the same on all ranks
            )
            self.recent_counts.zero_()

    def on_train_batch_end(self, outputs: Any, batch: PixelBatch, batch_idx: int) -> None:
        if self._revived is not None:
            self.log("train/revived_codes", float(self._revived))
            self._revived = None

    def validation_step(self, batch: PixelBatch, batch_idx: int) -> None:
        images = batch.images
        token_ids = self.tokenizer.encode(to_value_range(images, self.tokenizer.value_range))
        decoded = self.tokenizer.decode(token_ids)
        self.val_mse.update(F.mse_loss(decoded, images), len(images))
        self.val_mae.update(F.l1_loss(decoded, images), len(images))
        self.val_tokens.update(token_ids)

    def on_validation_epoch_end(self) -> None:
        mse, mae = self.val_mse.compute(), self.val_mae.compute()
        used, perplexity = self.val_tokens.used_share(), self.val_tokens.perplexity()
        self.log("val/mse", mse, prog_bar=True)  # of pixels in [0, 1], through the likeliest codes
        self.log("val/mae", mae)
        self.log("val/psnr", -10 * mse.clamp_min(1e-12).log10())  # dB
        self.log("val/used_share", used, prog_bar=True)
        self.log("val/perplexity", perplexity, prog_bar=True)
        if not self.trainer.sanity_checking and self.trainer.is_global_zero:
            self._warn_if_dying(float(used), float(perplexity))
        for metric in (self.val_mse, self.val_mae, self.val_tokens):
            metric.reset()

    def configure_optimizers(self) -> Any:
        return configure_adamw(self, self.optim, tokenizer=self.tokenizer)

    def _generator(self, stream: str, index: int, step: int) -> Generator:
        key = sample_key(self.seed, step, index, stream)
        return Generator(self.device).manual_seed(key & 0x7FFFFFFFFFFFFFFF)

    def _count(self, output: DVAEOutput) -> None:
        token_ids = output.logits.detach().argmax(dim=-1)
        self._latest = output.features.detach(), token_ids
        counts = torch.bincount(token_ids.flatten(), minlength=self.tokenizer.vocab_size)
        self.recent_counts += sum_over_ranks(counts)

    def _centres(self) -> Tensor:
        """(V, D): mean feature of each code in the latest micro-batch; of all where unused."""
        sums, counts = feature_sums(*self._latest, self.tokenizer.vocab_size)
        sums, counts = sum_over_ranks(sums), sum_over_ranks(counts)
        everywhere = sums.sum(dim=0) / counts.sum()
        means = sums / counts.clamp_min(1)[:, None]
        return torch.where(counts[:, None] > 0, means, everywhere)

    def _warn_if_dying(self, used: float, perplexity: float) -> None:
        vocab_size = self.tokenizer.vocab_size
        mend = "raise task.balance_weight, let task.revival work more often, or take fewer codes"
        if used < self.min_used_share:
            log.warning(
                "the codebook is dying: %.1f %% of %d codes are used on held-out images "
                "(perplexity %.0f), expected at least %.0f %%; %s",
                *(100 * used, vocab_size, perplexity, 100 * self.min_used_share, mend),
            )
        elif perplexity < 0.5 * self._best_perplexity:
            log.warning(
                "the codebook is dying: perplexity on held-out images fell from %.0f to %.0f of %d "
                "codes; %s",
                *(self._best_perplexity, perplexity, vocab_size, mend),
            )
        self._best_perplexity = max(self._best_perplexity, perplexity)


def ramp(progress: float, share: float) -> float:
    """From 0 to 1, linearly, while `progress` goes from 0 to `share`; 1 afterwards."""
    return min(1.0, progress / share) if share > 0 else 1.0

"""Health of a backbone without labels: the rank of its patch features, where attention looks.

And how many different visual tokens it predicts, where it has a head for them.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from beit.data.dataset import Masking
from beit.data.labelled import LabelledData, LabelledImages
from beit.data.randomness import sample_rng
from beit.errors import UserError
from beit.evaluation.choosing import Report, by_layer
from beit.evaluation.features import Compute, Layers, checked_layers, evaluating
from beit.models.heads import MIMHead
from beit.models.vit import VisionTransformer
from beit.tasks.accounting import TokenHistogram

RANKME_EPS = 1e-7  # Garrido et al., arXiv 2210.02885, equation 1


def entropy(shares: Tensor) -> Tensor:
    """-Σ p ln p over the last dimension, in nats; 0 ln 0 is 0."""
    return torch.special.entr(shares).sum(dim=-1)


class FeatureMoments:
    """Sum and second moments of features, in float64, from which the ranks follow.

    So the n x D matrix of all patches' features need never exist.
    """

    def __init__(self, width: int, device: torch.device) -> None:
        self.count = 0
        options: dict[str, Any] = {"dtype": torch.float64, "device": device}
        self.total = torch.zeros(width, **options)
        self.products = torch.zeros(width, width, **options)

    def add(self, features: Tensor) -> None:
        """Features (n, D)."""
        features = features.double()
        self.count += len(features)
        self.total += features.sum(dim=0)
        self.products.addmm_(features.T, features)

    def rankme(self) -> float:
        """exp of the entropy of the singular values' shares, in [1, D], smoothed as in RankMe.

        Not centred, as in the paper: a large common vector lowers it.
        """
        values = _roots(self.products)
        return entropy(values / values.sum() + RANKME_EPS).exp().item()

    def effective_rank(self) -> float:
        """The same of the centred features, without the smoothing (Roy and Vetterli, 2007)."""
        mean = self.total / self.count
        values = _roots(self.products - self.count * torch.outer(mean, mean))
        return entropy(values / values.sum()).exp().item()


def _roots(products: Tensor) -> Tensor:
    """Singular values of the matrix whose second moments these are."""
    return torch.linalg.eigvalsh(products).clamp(min=0).sqrt()


class AttentionEntropy:
    """Mean entropy of where a block's queries look, by head, over all images and queries.

    Of the probabilities that the block's own attention works out from what it is given.
    """

    def __init__(self, attention: Any) -> None:
        self.attention = attention
        self.total: Tensor | float = 0.0
        self.count = 0
        self.tokens = 0
        # kept while it is registered; removed with the handle
        self.handle = attention.register_forward_hook(self._look)

    def _look(self, attention: Any, arguments: tuple[Any, ...], output: Tensor) -> None:
        found = attention.probabilities(*arguments).float()
        self.total = self.total + entropy(found).sum(dim=(0, 2), dtype=torch.float64)
        self.count += found.shape[0] * found.shape[2]
        self.tokens = found.shape[3]

    def mean(self) -> Tensor:
        """(heads,), in nats, in [0, ln(1+N)]."""
        return torch.as_tensor(self.total / self.count).cpu()


class Health:
    """Rank of the patch features and attention entropy of each layer; perplexity of the tokens.

    On validation images, drawn once from the seed; labels are not needed.

    Args:
        layers: counted from 1, or "all".
        images: at most so many.
        masking: draws the hidden patches of the images whose tokens are predicted; None: tokens are
            not. Only networks with a head for visual tokens (masked image modelling) predict them.
        seed: of the masks.
    """

    name = "health"
    needs_labels = False

    def __init__(
        self,
        *,
        layers: Layers = "all",
        images: int = 1000,
        masking: Masking | None = None,
        seed: int = 0,
    ) -> None:
        if images < 1:
            raise UserError(f"images {images} must be at least 1")
        self.layers, self.images, self.masking, self.seed = layers, images, masking, seed

    def check(self, backbone: VisionTransformer, data: LabelledData) -> None:
        """Raises UserError for what can be known before any feature is."""
        checked_layers(self.layers, backbone.depth)

    def __call__(self, network: nn.Module, data: LabelledData, compute: Compute) -> Report:
        images = data.val.part(self.images, seed=self.seed)
        backbone: VisionTransformer = network.backbone  # type: ignore[assignment]
        layers = checked_layers(self.layers, backbone.depth)
        rows = self._layers(backbone, images, compute, layers)
        series = {
            "RankMe of the patch features": by_layer(rows, "rankme", ""),
            "attention entropy, share of ln(1+N)": by_layer(rows, "attention_share", ""),
        }
        found = self._tokens(network, images, compute)
        summary: dict[str, Any] = {"measured_on": f"{len(images)} {images.role} images", **found}
        return Report(self.name, rows, summary, series)

    def _layers(
        self,
        backbone: VisionTransformer,
        images: LabelledImages,
        compute: Compute,
        layers: Sequence[int],
    ) -> list[dict[str, Any]]:
        taps = [layer - 1 for layer in layers]
        blocks: Any = backbone.blocks
        moments = [FeatureMoments(backbone.width, compute.device) for _ in layers]
        looks = [AttentionEntropy(blocks[tap].attn) for tap in taps]
        try:
            for batch in images.batches():
                with evaluating(backbone), compute.autocast():
                    tokens = backbone.forward_blocks(batch.images.to(compute.device), taps=taps)
                for found, x in zip(moments, tokens, strict=True):
                    found.add(x[:, 1:].flatten(0, 1))
        finally:
            for look in looks:
                look.handle.remove()
        return [_row(*of) for of in zip(layers, moments, looks, strict=True)]

    def _tokens(
        self, network: nn.Module, images: LabelledImages, compute: Compute
    ) -> dict[str, Any]:
        """Perplexity of the tokens predicted at the hidden patches, and how many there are.

        Empty without a head for tokens, or without a masking.
        """
        head: Any = getattr(network, "head", None)
        if self.masking is None or not isinstance(head, MIMHead):
            return {}
        backbone: Any = network.backbone
        histogram = TokenHistogram(head.vocab_size).to(compute.device)
        for batch in images.batches():
            mask = self._masks(batch.indices).to(compute.device)
            with evaluating(network), compute.autocast():
                features = backbone(batch.images.to(compute.device), mask)
                histogram.update(head(features, mask).argmax(dim=-1))
        return {
            "predicted_token_perplexity": histogram.perplexity().item(),
            "predicted_tokens": int((histogram.counts > 0).sum()),
            "vocab_size": head.vocab_size,
        }

    def _masks(self, indices: Tensor) -> Tensor:
        """(B,h,w) bool, a function of the seed and the indices."""
        assert self.masking is not None
        drawn = [self.masking(sample_rng(self.seed, 0, i, "mask")) for i in indices.tolist()]
        return torch.from_numpy(np.stack(drawn))


def _row(layer: int, moments: FeatureMoments, look: AttentionEntropy) -> dict[str, Any]:
    by_head = look.mean()
    most = torch.tensor(float(look.tokens)).log().item()
    return {
        "layer": layer,
        "rankme": moments.rankme(),
        "effective_rank": moments.effective_rank(),
        "attention_entropy": by_head.mean().item(),
        "attention_share": by_head.mean().item() / most,
        "lowest_head": by_head.min().item() / most,
        "highest_head": by_head.max().item() / most,
    }

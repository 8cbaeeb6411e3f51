"""Linear probes: how far the classes can be told apart by a plane in a frozen feature space."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from beit.data.labelled import LabelledData
from beit.errors import UserError
from beit.evaluation import choosing
from beit.evaluation.choosing import HELD_OUT, MEASURED, Report
from beit.evaluation.features import (
    Compute,
    Features,
    Layers,
    Pooling,
    checked_layers,
    checked_poolings,
    extract,
    full_precision,
)
from beit.models.vit import VisionTransformer

log = logging.getLogger(__name__)

_ROWS = 1 << 16  # whose logits exist at a time


@dataclass(frozen=True)
class Standardised:
    """Features of mean 0 and deviation 1 in each dimension, by the statistics of the fitted ones.

    A dimension that never changes is only centred.
    """

    mean: Tensor
    scale: Tensor

    @classmethod
    def by(cls, features: Tensor) -> "Standardised":
        deviation, mean = torch.std_mean(features, dim=0, correction=0)
        return cls(mean, torch.where(deviation > 0, deviation, 1.0))

    def __call__(self, features: Tensor) -> Tensor:
        return (features - self.mean) / self.scale


@dataclass(frozen=True)
class Logistic:
    """A fitted multinomial logistic regression on standardised features.

    `weight` (F, C), `bias` (C,), of the C classes (numbers) that the fitted labels have.
    """

    weight: Tensor
    bias: Tensor
    classes: Tensor
    finished: bool  # before the iterations were used up

    def predict(self, features: Tensor) -> Tensor:
        """Standardised features (n, F) -> class numbers (n,)."""
        return self.classes[torch.addmm(self.bias, features, self.weight).argmax(dim=1)]


def fit(
    features: Tensor,
    labels: Tensor,
    *,
    l2: float,
    max_iterations: int,
    tolerance: float,
    start: Logistic | None = None,
) -> Logistic:
    """Minimise mean cross-entropy + l2/2 · |weight|² by L-BFGS; the bias is not penalised.

    scikit-learn's LogisticRegression with C = 1 / (l2 · n) has the same minimum.

    Args:
        features: (n, F), standardised; their type is that of the arithmetic.
        labels: (n,) int64.
        tolerance: of the largest part of the gradient; it ends, too, where the loss stands still.
        start: where to begin.
    """
    classes, targets = labels.unique(return_inverse=True)
    count, width, num_classes = *features.shape, len(classes)
    if start is None:
        weight, bias = features.new_zeros(width, num_classes), features.new_zeros(num_classes)
    else:
        weight, bias = start.weight.clone(), start.bias.clone()
    max_evaluations = 2 * max_iterations  # of the loss: a line search may take many
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=max_iterations,
        max_eval=max_evaluations,
        tolerance_grad=tolerance,
        tolerance_change=torch.finfo(features.dtype).eps / 100,  # of a loss that stands still
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        loss = l2 / 2 * weight.square().sum()
        weight.grad, bias.grad = l2 * weight, torch.zeros_like(bias)
        for begin in range(0, count, _ROWS):
            rows, wanted = features[begin : begin + _ROWS], targets[begin : begin + _ROWS]
            logits = torch.addmm(bias, rows, weight).log_softmax(dim=1)
            loss = loss + F.nll_loss(logits, wanted, reduction="sum") / count
            slopes = logits.exp_()
            slopes[torch.arange(len(wanted), device=wanted.device), wanted] -= 1
            weight.grad.addmm_(rows.T, slopes, alpha=1 / count)
            bias.grad.add_(slopes.sum(dim=0), alpha=1 / count)
        return loss

    with torch.no_grad():
        optimizer.step(closure)
    state = optimizer.state[weight]
    finished = state["n_iter"] < max_iterations and state["func_evals"] < max_evaluations
    return Logistic(weight, bias, classes, finished)


class LinearProbe:
    """Multinomial logistic regression on the features of every layer.

    A part of the training images is held out: by it the strength of the l2 penalty is chosen for
    each layer and pooling, and the best layer. Then each is fitted to all training images and
    measured on the validation images, which have had no say.

    Args:
        layers: counted from 1, or "all".
        poolings: "cls", "mean" of the patch tokens, "both" side by side.
        l2: strengths, relative to the mean cross-entropy of standardised features.
        held_out: share of each class.
        max_iterations, tolerance: of L-BFGS.
        seed: of the choice of what is held out.
    """

    name = "linear_probe"
    needs_labels = True

    def __init__(
        self,
        *,
        layers: Layers = "all",
        poolings: Sequence[str] = ("cls", "mean", "both"),
        l2: Sequence[float] = (1e-2, 1e-3, 1e-4, 1e-5),
        held_out: float = 0.2,
        max_iterations: int = 500,
        tolerance: float = 1e-5,
        seed: int = 0,
    ) -> None:
        self.layers, self.seed = layers, seed
        self.poolings = checked_poolings(poolings)
        self.l2 = sorted(set(l2), reverse=True)  # each fit begins where a stiffer one ended
        if not self.l2 or min(self.l2) <= 0:
            raise UserError(f"l2 {list(l2)}: expected numbers above 0")
        if max_iterations < 1 or not tolerance > 0:
            raise UserError(
                f"max_iterations {max_iterations} and tolerance {tolerance} must be above 0"
            )
        self.held_out = choosing.check_share(held_out)
        self.max_iterations, self.tolerance = max_iterations, tolerance

    def check(self, backbone: VisionTransformer, data: LabelledData) -> None:
        """Raises UserError for what can be known before any feature is."""
        checked_layers(self.layers, backbone.depth)
        labels = torch.from_numpy(data.train.labels)
        choosing.held_out(labels, self.held_out, seed=self.seed)

    def __call__(self, network: torch.nn.Module, data: LabelledData, compute: Compute) -> Report:
        backbone: VisionTransformer = network.backbone  # type: ignore[assignment]
        train, val = (
            extract(backbone, images, compute, layers=self.layers)
            for images in (data.train, data.val)
        )
        return self.measure(train, val, compute.device)

    def measure(self, train: Features, val: Features, device: torch.device) -> Report:
        """The report of features that are there."""
        mask = choosing.held_out(train.labels, self.held_out, seed=self.seed)
        self._unfinished = 0
        with full_precision(), torch.no_grad():
            rows = [
                {"layer": layer, "pooling": pooling}
                | self._probe(train, val, mask, layer, pooling, device)
                for pooling in self.poolings
                for layer in train.layers
            ]
        if self._unfinished:
            log.warning(
                "%d of %d fits were stopped by max_iterations=%d, short of tolerance=%g",
                *(self._unfinished, len(rows) * (len(self.l2) + 1)),
                *(self.max_iterations, self.tolerance),
            )
        series = {
            "validation accuracy of a linear probe": choosing.by_layer(rows, MEASURED, "pooling")
        }
        return Report(self.name, rows, choosing.summary(rows, mask, len(val.labels)), series)

    def _probe(
        self,
        train: Features,
        val: Features,
        mask: Tensor,
        layer: int,
        pooling: Pooling,
        device: torch.device,
    ) -> dict[str, float]:
        features, labels = train.of(layer, pooling), train.labels
        found, l2 = -1.0, 0.0
        to = Standardised.by(fitted := features[~mask].to(device))
        fitted, others = to(fitted), to(features[mask].to(device))
        probe: Logistic | None = None
        for strength in self.l2:
            probe = self._fit(fitted, labels[~mask].to(device), strength, probe)
            share = choosing.accuracy(probe.predict(others), labels[mask])
            if share > found:
                found, l2 = share, strength
        del fitted, others
        to = Standardised.by(everything := features.to(device))
        everything = to(everything)
        probe = self._fit(everything, labels.to(device), l2, None)
        predicted = probe.predict(to(val.of(layer, pooling).to(device)))
        return {
            "l2": l2,
            HELD_OUT: found,
            "train_acc": choosing.accuracy(probe.predict(everything), labels),
            MEASURED: choosing.accuracy(predicted, val.labels),
        }

    def _fit(self, features: Tensor, labels: Tensor, l2: float, start: Logistic | None) -> Logistic:
        options = {"max_iterations": self.max_iterations, "tolerance": self.tolerance}
        probe = fit(features, labels, l2=l2, start=start, **options)  # type: ignore[arg-type]
        self._unfinished += not probe.finished
        return probe

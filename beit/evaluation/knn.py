"""k nearest neighbours by cosine, exactly: what a feature space is like without any training."""

from collections.abc import Sequence

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
    checked_layers,
    checked_poolings,
    extract,
    full_precision,
)
from beit.models.vit import VisionTransformer

_QUERIES, _BANK = 1024, 1 << 16  # whose similarities exist at a time


def nearest(
    queries: Tensor, bank: Tensor, k: int, *, rows: int = _QUERIES, columns: int = _BANK
) -> tuple[Tensor, Tensor]:
    """The k most similar rows of `bank` (n, F) to each of `queries` (m, F), by cosine.

    Returns similarities and indices (m, k), the nearest first; of equally near ones that with the
    lower index. All pairs are compared, `rows` times `columns` at a time.
    """
    assert k <= len(bank)
    queries, bank = F.normalize(queries, dim=1), F.normalize(bank, dim=1)
    found = [_nearest(part, bank, k, columns) for part in queries.split(rows)]
    values, indices = zip(*found, strict=True)
    return torch.cat(values), torch.cat(indices)


def _nearest(queries: Tensor, bank: Tensor, k: int, columns: int) -> tuple[Tensor, Tensor]:
    values = queries.new_empty(len(queries), 0)
    indices = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
    for begin in range(0, len(bank), columns):
        part = bank[begin : begin + columns]
        new, places = _highest(queries @ part.T, min(k, len(part)))
        # those of before come first: of equals they are preferred
        values, indices = torch.cat([values, new], 1), torch.cat([indices, places + begin], 1)
        values, order = values.sort(dim=1, descending=True, stable=True)
        values, indices = values[:, :k], indices.gather(1, order)[:, :k]
    return values, indices


def _highest(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k highest of each row, in descending order; of equals the first ones."""
    found, places = values.topk(k, dim=1)
    # which of several equals topk takes at its end is anybody's guess
    unsure = (values >= found[:, -1:]).sum(dim=1) > k
    if bool(unsure.any()):
        places[unsure] = values[unsure].sort(dim=1, descending=True, stable=True)[1][:, :k]
    places = places.sort(dim=1)[0]
    found, order = values.gather(1, places).sort(dim=1, descending=True, stable=True)
    return found, places.gather(1, order)


def vote(
    similarities: Tensor, labels: Tensor, k: int, *, num_classes: int, temperature: float
) -> Tensor:
    """Class numbers (m,) by the votes exp(similarity / temperature) of the k nearest.

    Similarities and labels are (m, K) with K of at least k. Of equal votes the lower number wins.
    """
    similarities, labels = similarities[:, :k].double(), labels[:, :k]
    # relative to the nearest: a low temperature would overflow
    weights = ((similarities - similarities[:, :1]) / temperature).exp()
    votes = weights.new_zeros(len(labels), num_classes).scatter_add_(1, labels, weights)
    return votes.argmax(dim=1)


class KNN:
    """Weighted k nearest neighbours in the features of every layer.

    As in the linear probe a part of the training images is held out, and classified by the rest:
    by it the best layer, pooling and k are chosen. The validation images are classified by all.

    Args:
        layers: counted from 1, or "all".
        poolings: "cls", "mean" of the patch tokens, "both" side by side.
        k: how many neighbours vote; each is tried.
        temperature: of the votes; 0.07 is usual (Wu et al., arXiv 1805.01978).
        centred: compare features less the mean of those that vote, where a large common part hides
            the rest; otherwise as they are, which is usual.
        held_out: share of each class.
        seed: of the choice of what is held out.
    """

    name = "knn"
    needs_labels = True

    def __init__(
        self,
        *,
        layers: Layers = "all",
        poolings: Sequence[str] = ("cls", "mean", "both"),
        k: Sequence[int] = (5, 20, 100),
        temperature: float = 0.07,
        centred: bool = False,
        held_out: float = 0.2,
        seed: int = 0,
    ) -> None:
        self.layers, self.seed = layers, seed
        self.poolings = checked_poolings(poolings)
        self.k = sorted(set(k))
        if not self.k or self.k[0] < 1:
            raise UserError(f"k {list(k)}: expected whole numbers of at least 1")
        if not temperature > 0:
            raise UserError(f"temperature {temperature} must be above 0")
        self.temperature, self.centred = temperature, centred
        self.held_out = choosing.check_share(held_out)

    def check(self, backbone: VisionTransformer, data: LabelledData) -> None:
        """Raises UserError for what can be known before any feature is."""
        checked_layers(self.layers, backbone.depth)
        labels = torch.from_numpy(data.train.labels)
        mask = choosing.held_out(labels, self.held_out, seed=self.seed)
        if self.k[-1] > (rest := int((~mask).sum())):
            raise UserError(
                f"k {self.k[-1]} is larger than the {rest} labelled images that may vote "
                f"({len(mask)} less the {int(mask.sum())} held out): choose a smaller k"
            )

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
        labels, kept = train.labels, ~mask
        rows = []
        with full_precision(), torch.no_grad():
            for pooling in self.poolings:
                for layer in train.layers:
                    bank = train.of(layer, pooling).to(device)
                    queries = val.of(layer, pooling).to(device)
                    chosen = self._accuracies(bank[mask], labels[mask], bank[kept], labels[kept])
                    measured = self._accuracies(queries, val.labels, bank, labels)
                    rows += [
                        {"layer": layer, "pooling": pooling, "k": k}
                        | {HELD_OUT: chosen[k], MEASURED: measured[k]}
                        for k in self.k
                    ]
        series = {
            f"validation accuracy of k-NN, {pooling}": choosing.by_layer(
                [{**row, "k": f"k={row['k']}"} for row in rows if row["pooling"] == pooling],
                *(MEASURED, "k"),
            )
            for pooling in self.poolings
        }
        return Report(self.name, rows, choosing.summary(rows, mask, len(val.labels)), series)

    def _accuracies(
        self, queries: Tensor, truth: Tensor, bank: Tensor, labels: Tensor
    ) -> dict[int, float]:
        """Accuracy for each k."""
        if self.centred:
            mean = bank.mean(dim=0)
            queries, bank = queries - mean, bank - mean
        similarities, indices = nearest(queries, bank, self.k[-1])
        around = labels.to(indices.device)[indices]
        options = {"num_classes": int(labels.max()) + 1, "temperature": self.temperature}
        return {
            k: choosing.accuracy(vote(similarities, around, k, **options), truth)  # type: ignore[arg-type]
            for k in self.k
        }

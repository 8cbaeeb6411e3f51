"""k-NN against loops over all pairs, and scikit-learn's."""

import math

import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from beit.errors import UserError
from beit.evaluation.choosing import held_out
from beit.evaluation.features import Features
from beit.evaluation.knn import KNN, nearest, vote

CPU = torch.device("cpu")


def brute_force(queries, bank, labels, k, temperature, num_classes):
    """(indices of the k nearest, class) of each query, by loops; ties to the lower index."""
    found = []
    for query in queries.tolist():
        pairs = []
        for index, row in enumerate(bank.tolist()):
            product = sum(a * b for a, b in zip(query, row))
            norms = math.hypot(*query) * math.hypot(*row)
            pairs.append((-product / norms, index))
        pairs.sort()
        votes = [0.0] * num_classes
        for similarity, index in pairs[:k]:
            votes[labels[index]] += math.exp(-similarity / temperature)
        found.append(([index for _, index in pairs[:k]], votes.index(max(votes))))
    return found


@pytest.mark.parametrize(("rows", "columns"), [(1024, 65536), (4, 5), (3, 2)])
@pytest.mark.parametrize("k", [1, 3, 7])
def test_it_is_brute_force(rows, columns, k):
    torch.manual_seed(k)
    queries, bank = torch.randn(11, 5, dtype=torch.float64), torch.randn(23, 5).double()
    labels = torch.randint(4, (23,))
    similarities, indices = nearest(queries, bank, k, rows=rows, columns=columns)
    classes = vote(similarities, labels[indices], k, num_classes=4, temperature=0.07)
    expected = brute_force(queries, bank, labels.tolist(), k, 0.07, 4)
    assert indices.tolist() == [places for places, _ in expected]
    assert classes.tolist() == [number for _, number in expected]


@pytest.mark.parametrize("columns", [65536, 4, 1])
def test_equals_are_taken_in_order(columns):
    bank = torch.eye(2).repeat_interleave(6, dim=0).repeat(3, 1)  # 18 of each, in runs of 6
    _, indices = nearest(torch.tensor([[1.0, 0.0]]), bank, 9, columns=columns)
    assert indices.tolist() == [[0, 1, 2, 3, 4, 5, 12, 13, 14]]


def test_fewer_votes_are_those_of_the_nearest():
    similarities = torch.tensor([[0.9, 0.5, 0.5, 0.5]])
    labels = torch.tensor([[2, 1, 1, 1]])
    options = {"num_classes": 3, "temperature": 1.0}
    assert vote(similarities, labels, 1, **options).tolist() == [2]
    assert vote(similarities, labels, 2, **options).tolist() == [2]
    assert vote(similarities, labels, 4, **options).tolist() == [1]
    assert vote(similarities, labels, 4, num_classes=3, temperature=0.1).tolist() == [2]
    # exp(0.9 / 0.0005) is beyond any float
    assert vote(similarities, labels, 4, num_classes=3, temperature=0.0005).tolist() == [2]


def features(n, seed):
    draw = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 3
    centres = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(2, n, 8, generator=draw)
    scale = torch.tensor([3.0, 0.8])[:, None, None]
    return Features(centres[labels] + scale * noise, labels, (1, 2))


def test_every_row_is_scikit_learns():
    train, val = features(60, 1), features(40, 2)
    report = KNN(k=[9, 1, 4]).measure(train, val, CPU)
    mask = held_out(train.labels, 0.2, seed=0)
    assert len(report.rows) == 2 * 3 * 3
    for row in report.rows:
        x, other = (part.of(row["layer"], row["pooling"]) for part in (train, val))
        for fitted, truth, asked, labels, key in [
            (x, train.labels, other, val.labels, "val_acc"),
            (x[~mask], train.labels[~mask], x[mask], train.labels[mask], "held_out_acc"),
        ]:
            model = KNeighborsClassifier(
                row["k"],
                metric="cosine",
                algorithm="brute",
                weights=lambda distances: torch.exp(torch.as_tensor(1 - distances) / 0.07).numpy(),
            )
            model.fit(fitted.numpy(), truth.numpy())
            hits = model.predict(asked.numpy()) == labels.numpy()
            assert row[key] == pytest.approx(hits.mean(), abs=1e-9)


def test_the_best_is_chosen_without_the_validation_images():
    train, val = features(90, 1), features(40, 2)
    report = KNN(k=[5]).measure(train, val, CPU)
    assert report.summary["layer"] == 2
    shuffled = Features(val.stored, val.labels.flip(0), val.layers)
    other = KNN(k=[5]).measure(train, shuffled, CPU).summary
    assert other["held_out_acc"] == report.summary["held_out_acc"]
    assert other["layer"] == 2
    assert list(report.series) == [
        f"validation accuracy of k-NN, {pooling}" for pooling in ("cls", "mean", "both")
    ]


def test_centred_features_have_no_common_part():
    train, val = features(60, 1), features(40, 2)
    common = torch.full((8,), 1000.0)
    moved = [Features(part.stored + common, part.labels, part.layers) for part in (train, val)]
    plain = KNN(k=[5], centred=True).measure(train, val, CPU).rows
    shifted = KNN(k=[5], centred=True).measure(*moved, CPU).rows
    for row, other in zip(plain, shifted, strict=True):
        assert row["val_acc"] == pytest.approx(other["val_acc"], abs=0.03)
    mean = train.of(2, "mean").mean(0)
    by_hand = brute_force(
        (val.of(2, "mean") - mean).double(), (train.of(2, "mean") - mean).double(),
        *(train.labels.tolist(), 5, 0.07, 3),
    )  # fmt: skip
    hits = [number == label for (_, number), label in zip(by_hand, val.labels.tolist())]
    row = next(row for row in plain if (row["layer"], row["pooling"]) == (2, "mean"))
    assert row["val_acc"] == pytest.approx(sum(hits) / 40)


def test_what_is_refused(backbone, noise, labelled):
    for wrong in ({"k": []}, {"k": [0, 3]}, {"temperature": 0.0}, {"held_out": 1.0}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            KNN(**wrong)
    data = labelled(noise(12), noise(9))
    with pytest.raises(UserError, match=r"k 10 is larger than the 9 labelled images .* 3 held out"):
        KNN(k=[3, 10]).check(backbone(), data)
    KNN(k=[9]).check(backbone(), data)
    with pytest.raises(UserError, match="layers 1 to 4"):
        KNN(k=[3], layers=[0]).check(backbone(), data)

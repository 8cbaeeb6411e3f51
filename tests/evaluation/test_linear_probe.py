"""Linear probes against scikit-learn's logistic regression on the same features."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from beit.errors import UserError
from beit.evaluation.choosing import held_out
from beit.evaluation.features import Features
from beit.evaluation.linear_probe import LinearProbe, Standardised, fit

WIDTH, CPU = 6, torch.device("cpu")


def blobs(n, seed, *, width=WIDTH, classes=3, spread=1.5):
    """Overlapping clouds of 0.1 to 10 in deviation and far from the origin."""
    centres = np.random.default_rng(0).normal(size=(classes, width))
    draw = np.random.default_rng(seed)
    labels = np.arange(n) % classes
    points = centres[labels] + spread * draw.normal(size=(n, width))
    scales = np.geomspace(0.1, 10, width)
    return torch.from_numpy(points * scales + 7.0), torch.from_numpy(labels)


def peer(x, y, l2):
    model = LogisticRegression(C=1 / (l2 * len(x)), tol=1e-10, max_iter=10_000)
    return model.fit(x.numpy(), y.numpy())


@pytest.mark.parametrize("l2", [1e-1, 1e-3])
@pytest.mark.parametrize("classes", [2, 3, 5])
def test_the_minimum_is_scikit_learns(l2, classes):
    x, y = blobs(150, 1, classes=classes)
    scaler = StandardScaler().fit(x.numpy())
    to = Standardised.by(x)
    np.testing.assert_allclose(to(x).numpy(), scaler.transform(x.numpy()), atol=1e-12)
    ours = fit(to(x), y, l2=l2, max_iterations=500, tolerance=1e-9)
    theirs = peer(to(x), y, l2)
    probabilities = torch.addmm(ours.bias, to(x), ours.weight).softmax(1)
    if classes == 2:  # scikit-learn has one weight for two classes, and half the penalty for it
        theirs = peer(to(x), y, l2 / 2)
    np.testing.assert_allclose(
        probabilities.numpy(), theirs.predict_proba(to(x).numpy()), atol=1e-4
    )
    if classes > 2:
        np.testing.assert_allclose(ours.weight.numpy().T, theirs.coef_, atol=2e-4)
    assert ours.finished


def test_rows_in_parts_are_rows_at_once(monkeypatch):
    x, y = blobs(50, 2)
    options = {"l2": 1e-2, "max_iterations": 300, "tolerance": 1e-9}
    whole = fit(Standardised.by(x)(x), y, **options)
    monkeypatch.setattr("beit.evaluation.linear_probe._ROWS", 7)
    parts = fit(Standardised.by(x)(x), y, **options)
    torch.testing.assert_close(parts.weight, whole.weight, rtol=0, atol=1e-7)


def test_classes_without_images_are_never_predicted():
    x, y = blobs(60, 3)
    probe = fit(x, torch.tensor([1, 4, 7])[y], l2=1e-2, max_iterations=200, tolerance=1e-6)
    assert set(probe.predict(x).tolist()) == {1, 4, 7}


def features(n, seed, layers=(1, 2, 3)):
    """Layer 2 tells the classes apart best; of CLS each layer is noise alone."""
    spreads = {1: 3.0, 2: 0.7, 3: 1.8}
    draw = torch.Generator().manual_seed(seed)
    rows = []
    for layer in layers:
        x, y = blobs(n, 10 * seed + layer, spread=spreads[layer])
        rows.append(torch.cat([torch.randn(n, WIDTH, generator=draw), x.float()], dim=1))
    return Features(torch.stack(rows), y, tuple(layers))


def test_every_row_is_scikit_learns():
    train, val = features(120, 1), features(90, 2)
    report = LinearProbe(l2=[1e-2], tolerance=1e-7).measure(train, val, CPU)
    assert [(row["pooling"], row["layer"]) for row in report.rows] == [
        (pooling, layer) for pooling in ("cls", "mean", "both") for layer in (1, 2, 3)
    ]
    mask = held_out(train.labels, 0.2, seed=0)
    for row in report.rows:
        x, y = train.of(row["layer"], row["pooling"]), train.labels
        other = val.of(row["layer"], row["pooling"])
        scaler = StandardScaler().fit(x.numpy())
        model = peer(torch.from_numpy(scaler.transform(x.numpy())), y, 1e-2)
        hits = model.predict(scaler.transform(other.numpy())) == val.labels.numpy()
        assert row["val_acc"] == pytest.approx(hits.mean(), abs=1.01 / len(hits))
        scaler = StandardScaler().fit(x[~mask].numpy())
        model = peer(torch.from_numpy(scaler.transform(x[~mask].numpy())), y[~mask], 1e-2)
        hits = model.predict(scaler.transform(x[mask].numpy())) == y[mask].numpy()
        assert row["held_out_acc"] == pytest.approx(hits.mean(), abs=1.01 / len(hits))


def test_the_best_layer_is_chosen_without_the_validation_images():
    train, val = features(240, 1), features(90, 2)
    probe = LinearProbe(l2=[1e-1, 1e-2])
    report = probe.measure(train, val, CPU)
    assert report.summary["layer"] == 2
    assert report.summary["pooling"] in ("mean", "both")
    assert report.summary["chosen_on"] == "48 of the 240 training images, held out"
    assert report.summary["measured_on"] == "90 validation images"
    share = report.summary["val_acc"]
    assert report.summary["standard_error"] == pytest.approx((share * (1 - share) / 90) ** 0.5)
    shuffled = Features(val.stored, val.labels.flip(0), val.layers)
    other = probe.measure(train, shuffled, CPU)
    keys = ("layer", "pooling", "l2", "held_out_acc")
    assert [other.summary[key] for key in keys] == [report.summary[key] for key in keys]
    assert other.summary["val_acc"] != share
    lines = report.series["validation accuracy of a linear probe"]
    means = [row["val_acc"] for row in report.rows if row["pooling"] == "mean"]
    assert lines["mean"] == ([1, 2, 3], means)


def test_the_penalty_is_the_one_that_did_best(monkeypatch):
    """On noise a stiff probe is the better one; the rows name what was taken."""
    train, val = features(60, 5, layers=(1,)), features(60, 6, layers=(1,))
    report = LinearProbe(l2=[1e-4, 10.0, 1.0], poolings=["mean"]).measure(train, val, CPU)
    each = {
        l2: LinearProbe(l2=[l2], poolings=["mean"]).measure(train, val, CPU).rows[0]
        for l2 in (10.0, 1.0, 1e-4)
    }
    best = max(each, key=lambda l2: each[l2]["held_out_acc"])
    row = report.rows[0]
    assert row["l2"] == best
    assert row["held_out_acc"] == each[best]["held_out_acc"]
    assert row["val_acc"] == pytest.approx(each[best]["val_acc"], abs=0.02)


def test_what_is_held_out():
    labels = torch.tensor([0] * 10 + [1] * 2 + [2] + [4] * 7)
    mask = held_out(labels, 0.3, seed=1)
    assert [int(mask[labels == c].sum()) for c in (0, 1, 2, 4)] == [3, 1, 0, 2]
    assert torch.equal(mask, held_out(labels, 0.3, seed=1))
    assert not torch.equal(mask, held_out(labels, 0.3, seed=2))
    with pytest.raises(UserError, match="none can be held out"):
        held_out(torch.arange(5), 0.5, seed=0)


def test_a_fit_that_was_cut_short_is_told(caplog):
    with caplog.at_level("WARNING", logger="beit"):
        LinearProbe(max_iterations=2, l2=[1e-5]).measure(features(60, 1), features(30, 2), CPU)
    assert "18 of 18 fits were stopped by max_iterations=2" in caplog.text


@pytest.mark.parametrize(
    "wrong",
    [{"l2": []}, {"l2": [0.0]}, {"held_out": 0.0}, {"held_out": 1.0}, {"poolings": ["max"]},
     {"poolings": []}, {"max_iterations": 0}],
)  # fmt: skip
def test_impossible_probes_are_refused(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        LinearProbe(**wrong)


def test_checks_come_before_features(backbone, noise, labelled):
    data = labelled(noise(9), noise(9))
    with pytest.raises(UserError, match="layers 1 to 4"):
        LinearProbe(layers=[7]).check(backbone(), data)
    with pytest.raises(UserError, match="none can be held out"):
        LinearProbe().check(backbone(), labelled(noise(3), noise(9)))
    LinearProbe().check(backbone(), data)


def test_a_fit_that_used_up_its_evaluations_is_not_finished():
    """On such steep features a single line search takes all that two iterations may."""
    draw = torch.Generator().manual_seed(0)
    features = 100 * torch.randn(40, 3, dtype=torch.float64, generator=draw)
    labels = torch.randint(0, 3, (40,), generator=draw)
    fits = {
        most: fit(features, labels, l2=1e-3, max_iterations=most, tolerance=1e-9)
        for most in (2, 500)
    }
    assert not torch.allclose(fits[2].weight, fits[500].weight, rtol=0.05)
    assert fits[500].finished
    assert not fits[2].finished

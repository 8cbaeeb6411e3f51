"""Scores against a confusion matrix counted pixel by pixel."""

import numpy as np
import pytest
import torch

from beit.evaluation import segmentation_metrics
from beit.evaluation.segmentation_metrics import PixelConfusion, SegmentationScores

K = 5


def drawn(seed, shape=(13, 17)):
    rng = np.random.default_rng(seed)
    labels = rng.choice([-1, 0, 1, 2, 4], size=shape, p=[0.1, 0.3, 0.3, 0.2, 0.1])
    predicted = rng.choice([0, 1, 2], size=shape)
    return predicted.astype(np.int16), labels.astype(np.int16)


def literal(pairs):
    """mmsegmentation's measures by loops; class 3 occurs nowhere, class 4 is never predicted."""
    counts = np.zeros((K, K), dtype=np.int64)
    for predicted, labels in pairs:
        for found, true in zip(predicted.flat, labels.flat):
            if true != -1:
                counts[true, found] += 1
    iou, accuracy = [], []
    for k in range(K):
        union = counts[k].sum() + counts[:, k].sum() - counts[k, k]
        iou.append(counts[k, k] / union if union else np.nan)
        accuracy.append(counts[k, k] / counts[k].sum() if counts[k].sum() else np.nan)
    return counts, np.array(iou), np.array(accuracy), counts.trace() / counts.sum()


@pytest.mark.parametrize("at_once", [7, 2**22])
def test_scores_equal_those_counted_by_hand(monkeypatch, at_once):
    monkeypatch.setattr(segmentation_metrics, "_PIXELS_AT_ONCE", at_once)
    pairs = [drawn(0), drawn(1, (7, 3)), drawn(2, (1, 29))]
    confusion = PixelConfusion(K)
    for predicted, labels in pairs:
        confusion.update(torch.from_numpy(predicted), torch.from_numpy(labels))
    counts, iou, accuracy, overall = literal(pairs)
    assert np.array_equal(confusion.compute().numpy(), counts)
    scores = SegmentationScores.of(confusion.compute())
    np.testing.assert_allclose(scores.iou.numpy(), iou, rtol=1e-12)
    np.testing.assert_allclose(scores.accuracy.numpy(), accuracy, rtol=1e-12)
    assert scores.mean_iou == pytest.approx(np.nanmean(iou), rel=1e-12)
    assert scores.mean_accuracy == pytest.approx(np.nanmean(accuracy), rel=1e-12)
    assert scores.pixel_accuracy == pytest.approx(overall, rel=1e-12)
    assert np.isnan(iou[3])
    assert iou[4] == 0
    assert not np.isnan(iou[4])


def test_a_class_that_is_predicted_and_not_there_counts_for_iou_alone():
    confusion = torch.tensor([[3, 0, 1], [0, 2, 0], [0, 0, 0]])
    scores = SegmentationScores.of(confusion)
    assert scores.iou.tolist() == pytest.approx([0.75, 1.0, 0.0])
    assert scores.mean_iou == pytest.approx(1.75 / 3)
    assert scores.mean_accuracy == pytest.approx((0.75 + 1.0) / 2)


def test_the_table_has_a_row_for_each_class():
    confusion = torch.tensor([[3, 1], [0, 0]])
    assert SegmentationScores.of(confusion).table(["sky", "sea"]) == [
        {"class": "sky", "iou": 0.75, "accuracy": 0.75, "pixels": 4, "predicted": 3},
        {"class": "sea", "iou": 0.0, "accuracy": None, "pixels": 0, "predicted": 1},
    ]
    names = [row["class"] for row in SegmentationScores.of(confusion).table(None)]
    assert names == ["0", "1"]

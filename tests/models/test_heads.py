import pytest
import torch
import torch.nn.functional as F

from beit.errors import UserError
from beit.models.heads import ClassificationHead, MIMHead

BATCH, GRID, WIDTH, VOCAB, CLASSES = 7, (3, 5), 22, 13, 11


def test_mim_head_is_the_full_head_at_masked_patches():
    head = MIMHead(WIDTH, VOCAB)
    features = torch.randn(BATCH, 1 + 15, WIDTH)
    mask = torch.rand(BATCH, *GRID) < 0.4
    everywhere = F.linear(features[:, 1:], head.lm_head.weight, head.lm_head.bias)
    expected = everywhere.view(BATCH, *GRID, VOCAB)[mask]  # the order of token_ids[mask]
    torch.testing.assert_close(head(features, mask), expected)
    assert set(head.state_dict()) == {"lm_head.weight", "lm_head.bias"}
    assert head.lm_head.weight.abs().max() <= 0.02
    assert head.lm_head.bias.abs().max() == 0


def test_class_logits_from_the_mean_of_patches():
    head = ClassificationHead(WIDTH, CLASSES)
    features = torch.randn(BATCH, 1 + 15, WIDTH)
    mean = F.layer_norm(features[:, 1:].mean(dim=1), (WIDTH,), eps=1e-6)
    torch.testing.assert_close(head(features), mean @ head.head.weight.T)
    moved = features.clone()
    moved[:, 0] += 1
    assert torch.equal(head(moved), head(features))


def test_class_logits_from_cls():
    head = ClassificationHead(WIDTH, CLASSES, pooling="cls")
    features = torch.randn(BATCH, 1 + 15, WIDTH)
    torch.testing.assert_close(head(features), features[:, 0] @ head.head.weight.T)
    assert set(head.state_dict()) == {"head.weight", "head.bias"}


def test_class_head_starts_small():
    weight = ClassificationHead(220, 110).head.weight
    assert weight.std().item() == pytest.approx(0.02 * 0.001, rel=0.03)


def test_impossible_heads_are_refused():
    with pytest.raises(UserError, match="'max'"):
        ClassificationHead(WIDTH, CLASSES, pooling="max")
    with pytest.raises(UserError, match="num_classes 0"):
        ClassificationHead(WIDTH, 0)

"""The MIM task against plain torch, on a network of odd sizes."""

import math

import torch
import torch.nn.functional as F

from beit.data.batches import MIMBatch
from beit.models.heads import MIMHead
from beit.models.vit import VisionTransformer
from beit.optim.recipe import AdamWRecipe
from beit.tasks.mim import MaskedImageModeling

VOCAB = 13


def _task() -> MaskedImageModeling:
    torch.manual_seed(2)
    backbone = VisionTransformer(
        (24, 40),
        8,
        width=22,
        depth=4,
        num_heads=2,
        absolute_position=False,
        relative_position="shared",
        layer_scale=0.1,
        drop_path_rate=0.0,
        mask_token=True,
        final_norm=True,
        init_cut=0.02,
    )
    recipe = AdamWRecipe(lr=1e-3, min_lr=1e-5, weight_decay=0.05)
    return MaskedImageModeling(backbone, MIMHead(22, VOCAB), optim=recipe)


def _batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    images = torch.randn(7, 3, 24, 40, generator=generator)
    mask = torch.rand(7, 3, 5, generator=generator) < 0.4
    token_ids = torch.randint(VOCAB, (7, 3, 5), generator=generator)
    return images, mask, token_ids


def test_logits_of_masked_patches_are_in_the_order_of_their_targets() -> None:
    task, (images, mask, token_ids) = _task(), _batch()
    logits = task(images, mask)
    features = task.backbone(images, mask)
    row = 0
    for b in range(7):
        for y in range(3):
            for x in range(5):
                if mask[b, y, x]:
                    expected = task.head.lm_head(features[b, 1 + 5 * y + x])
                    torch.testing.assert_close(logits[row], expected)
                    assert token_ids[mask][row] == token_ids[b, y, x]
                    row += 1
    assert row == len(logits)


def test_predicted_tokens_are_the_likeliest_at_each_patch() -> None:
    task, (images, mask, _) = _task(), _batch()
    predicted = task.predict_tokens(images, mask)
    assert predicted.shape == (7, 3, 5)
    torch.testing.assert_close(predicted[mask], task(images, mask).argmax(-1))


def test_validation_is_a_mean_over_patches() -> None:
    """Images with many hidden patches weigh more, however they are batched."""
    task, (images, mask, token_ids) = _task(), _batch()
    mask[0] = True
    logged: dict[str, list[tuple[float, int]]] = {}
    task.log = lambda name, value, *, batch_size, **_: (  # type: ignore[method-assign]
        logged.setdefault(name, []).append((float(value.detach()), batch_size))
    )
    for part in (slice(0, 1), slice(1, 7)):
        batch = MIMBatch(images[part], mask[part], token_ids[part], torch.arange(7)[part])
        task.validation_step(batch, 0)
    loss = F.cross_entropy(task(images, mask), token_ids[mask])
    hits = (task(images, mask).argmax(dim=1) == token_ids[mask]).float().mean()
    for name, expected in (("val/loss", loss), ("val/mim_acc", hits)):
        values, weights = (torch.tensor(part) for part in zip(*logged[name]))
        torch.testing.assert_close((values * weights).sum() / weights.sum(), expected)


def test_a_fresh_network_is_as_unsure_as_a_uniform_guess() -> None:
    task, (images, mask, token_ids) = _task(), _batch()
    loss = F.cross_entropy(task(images, mask), token_ids[mask])
    assert abs(loss.item() - math.log(VOCAB)) < 0.05

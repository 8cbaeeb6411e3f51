"""What the network's own draws depend on, and what they do not."""

from types import SimpleNamespace

import torch

from beit.callbacks.randomness import KeyedRandomness


class Backbone:
    sample_keys = None


def keys_and_draw(*, seed=3, epoch=1, batch=2, rank=0, world_size=1, indices=(5, 9)):
    task = SimpleNamespace(backbone=Backbone())
    trainer = SimpleNamespace(current_epoch=epoch, world_size=world_size, global_rank=rank)
    callback = KeyedRandomness(seed)
    callback.on_train_batch_start(
        trainer, task, SimpleNamespace(indices=torch.tensor(indices)), batch
    )
    keys, draw = task.backbone.sample_keys, torch.rand(())
    callback.on_train_batch_end(trainer, task, None, None, batch)
    assert task.backbone.sample_keys is None  # a batch of another size may follow
    return keys.tolist(), draw.item()


def test_stochastic_depth_depends_on_seed_epoch_and_sample():
    keys, _ = keys_and_draw()
    assert keys_and_draw(batch=0, rank=1, world_size=2, indices=(9, 4, 5))[0] == [
        keys[1],
        keys_and_draw(indices=(4,))[0][0],
        keys[0],
    ]
    assert not set(keys) & set(keys_and_draw(seed=4)[0])
    assert not set(keys) & set(keys_and_draw(epoch=2)[0])


def test_dropout_depends_on_the_micro_batch_and_the_rank():
    draws = {
        keys_and_draw()[1],
        keys_and_draw(batch=3)[1],
        keys_and_draw(epoch=2)[1],
        keys_and_draw(rank=1, world_size=2)[1],
        keys_and_draw(seed=4)[1],
    }
    assert len(draws) == 5
    assert keys_and_draw()[1] == keys_and_draw()[1]


def test_a_task_without_stochastic_depth_is_seeded_all_the_same():
    trainer = SimpleNamespace(current_epoch=0, world_size=1, global_rank=0)
    for _ in range(2):
        KeyedRandomness(3).on_train_batch_start(trainer, SimpleNamespace(), None, 0)
        first = torch.rand(())
    KeyedRandomness(3).on_train_batch_start(trainer, SimpleNamespace(), None, 0)
    assert torch.equal(torch.rand(()), first)

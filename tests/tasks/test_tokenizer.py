"""Training of the dVAE: schedules, noise, accounting, warnings, revival inside a real fit."""

import logging

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from beit.data.batches import PixelBatch
from beit.errors import UserError
from beit.optim.recipe import AdamWRecipe
from beit.tasks.tokenizer import DiscreteVAETraining, ramp
from beit.tokenizers.codebook import CodeRevival
from beit.tokenizers.dvae import DiscreteVAE

V = 13
REVIVAL = CodeRevival(every_steps=2, until_share=1.0, dead_below=0.1, noise=1.0)


class Colours(Dataset):
    """24x40 images of 3x5 flat tiles."""

    def __len__(self):
        return 21

    def __getitem__(self, index):
        tiles = torch.rand(3, 3, 5, generator=torch.Generator().manual_seed(index))
        image = tiles.repeat_interleave(8, 1).repeat_interleave(8, 2)
        return PixelBatch(image, torch.tensor(index), torch.tensor(-1))


class Data(L.LightningDataModule):
    def micro_batches(self, *, world_size, accumulate):
        return 3 // accumulate * accumulate

    def train_dataloader(self):
        return DataLoader(Colours(), batch_size=7)

    def val_dataloader(self):
        return DataLoader(Colours(), batch_size=8)  # 8, 8, 5


def task(**changes):
    torch.manual_seed(0)
    dvae = DiscreteVAE(
        image_size=[24, 40], stride=8, vocab_size=V, codebook_dim=5, hidden_dim=24, num_res_blocks=1
    )
    arguments = {
        "optim": AdamWRecipe(lr=1e-3, min_lr=1e-4, weight_decay=0.0),
        "seed": 3,
        "start_temperature": 1.0,
        "end_temperature": 0.25,
        "temperature_anneal_share": 0.5,
        "kl_weight": 0.1,
        "kl_warmup_share": 0.2,
        "balance_weight": 0.01,
        "revival": None,
        "min_used_share": 0.0,
    }
    return DiscreteVAETraining(dvae, **(arguments | changes))


def trainer(tmp_path, **changes):
    arguments = {
        "accelerator": "cpu",
        "max_epochs": 2,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": tmp_path,
        "num_sanity_val_steps": 0,
    }
    return L.Trainer(**(arguments | changes))


def fit(tmp_path, module, **changes):
    run = trainer(tmp_path, **changes)
    run.fit(module, datamodule=Data())
    return run


def test_schedules():
    module = task()
    assert [module.temperature_at(p) for p in (0, 0.25, 0.5, 1)] == pytest.approx(
        [1.0, 0.5, 0.25, 0.25]
    )
    assert [module.kl_weight_at(p) for p in (0, 0.1, 0.2, 1)] == pytest.approx([0, 0.05, 0.1, 0.1])
    assert ramp(0.0, 0.0) == 1.0


def test_a_step_is_the_sum_of_its_parts_and_moves_all_weights(tmp_path):
    module = task()
    before = {k: v.clone() for k, v in module.tokenizer.state_dict().items()}
    run = fit(tmp_path, module)
    logged = {k: float(v) for k, v in run.callback_metrics.items()}
    parts = logged["train/reconstruction"]
    parts += logged["train/kl_weight"] * logged["train/kl"] + 0.01 * logged["train/imbalance"]
    assert logged["train/loss"] == pytest.approx(parts, rel=1e-5)
    assert logged["train/kl_weight"] == pytest.approx(0.1)
    assert logged["train/temperature"] == pytest.approx(0.25)
    for key, value in module.tokenizer.state_dict().items():
        assert not torch.equal(before[key], value), key


def test_validation_numbers_against_arithmetic(tmp_path):
    module = task()
    run = trainer(tmp_path)
    (logged,) = run.validate(module, datamodule=Data(), verbose=False)
    images = torch.stack([Colours()[i].images for i in range(21)])
    ids = module.tokenizer.encode(images * 2 - 1)
    error = module.tokenizer.decode(ids) - images
    counts = torch.tensor([(ids == code).sum() for code in range(V)]).double()
    p = counts[counts > 0] / counts.sum()
    assert logged["val/mse"] == pytest.approx(float((error**2).mean()), rel=1e-4)
    assert logged["val/mae"] == pytest.approx(float(error.abs().mean()), rel=1e-4)
    psnr = -10 * torch.log10((error**2).mean())
    assert logged["val/psnr"] == pytest.approx(float(psnr), rel=1e-4)
    assert logged["val/used_share"] == pytest.approx(len(p) / V)
    assert logged["val/perplexity"] == pytest.approx(float((-(p * p.log()).sum()).exp()), rel=1e-4)


def test_noise_depends_on_seed_step_micro_batch_and_rank_alone(tmp_path):
    results = []
    for seed, disturb in ((3, False), (3, True), (4, False)):
        module = task(seed=seed)
        if disturb:
            torch.manual_seed(99)
        fit(tmp_path, module)
        results.append(module.tokenizer.codebook.detach())
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
    places = ((0, 7), (0, 7), (1, 7), (0, 8))
    same, again, *others = (
        torch.rand(3, generator=module._generator("gumbel", *place)) for place in places
    )
    assert torch.equal(same, again)
    assert not any(torch.equal(same, other) for other in others)


@pytest.mark.parametrize(("accumulate", "expected"), [(1, 7 * 15 * 2), (3, 7 * 15 * 6)])
def test_usage_is_counted_between_optimizer_steps_that_revive(tmp_path, accumulate, expected):
    seen = []

    class Counting(CodeRevival):
        def __call__(self, tokenizer, counts, **others):
            seen.append(int(counts.sum()))
            return super().__call__(tokenizer, counts, **others)

    revival = Counting(every_steps=2, until_share=1.0, dead_below=0.1, noise=1.0)
    module = task(revival=revival)
    fit(tmp_path, module, max_epochs=4, accumulate_grad_batches=accumulate)
    assert seen == [expected] * (12 // accumulate // 2)
    assert module.recent_counts.sum() == 0


def test_codes_revive_before_a_checkpoint_can_be_taken(tmp_path):
    saved, begun = [], []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer, module, *_):  # where checkpoints are taken
            saved.append({k: v.clone() for k, v in module.state_dict().items()})

        def on_train_batch_start(self, trainer, module, *_):
            begun.append({k: v.clone() for k, v in module.state_dict().items()})

    module = collapsed(revival=REVIVAL)
    fit(tmp_path, module, callbacks=[Watch()])
    assert len(saved) == 6
    for before, after in zip(saved, begun[1:]):
        assert all(torch.equal(before[key], after[key]) for key in before)


def collapsed(**changes):
    module = task(**({"kl_weight": 0.0, "balance_weight": 0.0} | changes))
    with torch.no_grad():
        module.tokenizer.to_logits.bias[:2] = 50.0
    return module


def used(module):
    images = torch.stack([Colours()[i].images for i in range(21)])
    return module.tokenizer.encode(images * 2 - 1).unique().numel()


def test_the_remedy_brings_a_collapsed_codebook_back(tmp_path):
    without, balanced = collapsed(), collapsed(balance_weight=0.1)
    both = collapsed(balance_weight=0.1, revival=REVIVAL)
    for module in (without, balanced, both):
        fit(tmp_path, module, max_epochs=8)
    assert used(without) <= 2
    assert used(balanced) <= 2  # a code of probability zero feels no pull
    assert used(both) >= 8


def test_a_dying_codebook_is_said_out_loud(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="beit"):
        fit(tmp_path, collapsed(min_used_share=0.5), max_epochs=1)
    assert "codebook is dying" in caplog.text
    assert "of 13 codes are used" in caplog.text
    caplog.clear()
    module = task()
    module._warn_if_dying(used=1.0, perplexity=12.0)
    module._warn_if_dying(used=1.0, perplexity=7.0)
    assert not caplog.text
    module._warn_if_dying(used=1.0, perplexity=5.0)
    assert "from 12 to 5" in caplog.text


@pytest.mark.parametrize(
    "wrong",
    [
        {"end_temperature": 0.0},
        {"end_temperature": 2.0},
        {"kl_warmup_share": 2.0},
        {"kl_weight": -1.0},
        {"balance_weight": -1.0},
        {"min_used_share": -0.1},
    ],
)
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        task(**wrong)

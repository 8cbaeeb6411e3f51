import pytest
import torch

from beit.checkpoints.file import write_file
from beit.errors import UserError
from beit.tokenizers.base import to_value_range
from beit.tokenizers.dvae import DiscreteVAE, load_dvae

SIZES = {
    "image_size": [24, 40],
    "stride": 8,
    "vocab_size": 13,
    "codebook_dim": 5,
    "hidden_dim": 24,
    "num_res_blocks": 1,
    "normalize_features": True,
}


def tokenizer(**changes):
    torch.manual_seed(0)
    return DiscreteVAE(**(SIZES | changes))


def images(seed=0):
    return torch.rand(7, 3, 24, 40, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize("stride", [2, 4, 8])
def test_shapes_and_ranges(stride):
    dvae = tokenizer(stride=stride)
    h, w = 24 // stride, 40 // stride
    assert dvae.grid((24, 40)) == (h, w)
    ids = dvae.encode(images())
    assert ids.shape == (7, h, w)
    assert ids.dtype == torch.int64
    assert ids.min() >= 0
    assert ids.max() < 13
    pixels = dvae.decode(ids)
    assert pixels.shape == (7, 3, 24, 40)
    assert pixels.min() >= 0
    assert pixels.max() <= 1
    output = dvae(images(), temperature=1.0)
    assert output.reconstructions.shape == (7, 3, 24, 40)
    assert output.logits.shape == (7, h, w, 13)


def test_tokens_are_the_likeliest_codes_and_decode_maps_to_unit_range():
    dvae = tokenizer().eval()
    output = dvae(images(), temperature=1.0)
    ids = dvae.encode(images())
    assert torch.equal(ids, output.logits.argmax(-1))
    one_hot = torch.nn.functional.one_hot(ids, 13).float()
    raw = dvae.decoder((one_hot @ dvae.codebook).permute(0, 3, 1, 2))
    torch.testing.assert_close(dvae.decode(ids), ((raw + 1) / 2).clamp(0, 1))


def test_a_token_sees_its_own_place():
    """Rows and columns are not swapped: changing one corner changes the logits there most."""
    dvae = tokenizer(num_res_blocks=0).eval()
    changed = images()
    changed[:, :, :8, -8:] += 0.5
    difference = (dvae.features(changed) - dvae.features(images())).abs().sum(-1)[0]
    assert difference[0, 4] == difference.max()
    assert difference[2, 0] == 0


def test_gradient_reaches_encoder_and_codebook_through_the_samples():
    dvae = tokenizer()
    output = dvae(images(), temperature=1.0)
    (output.reconstructions - images()).pow(2).mean().backward()
    for name, parameter in dvae.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_noise_is_the_generator_s_alone():
    dvae = tokenizer()
    state = torch.get_rng_state()
    outputs = [
        dvae(images(), temperature=1.0, generator=torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    ]
    assert torch.equal(outputs[0].reconstructions, outputs[1].reconstructions)
    assert not torch.equal(outputs[0].reconstructions, outputs[2].reconstructions)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("image", "stride", "vocab", "grid"), [(32, 4, 1024, (8, 8)), (112, 8, 8192, (14, 14))]
)
def test_the_sizes_in_use(image, stride, vocab, grid):
    dvae = tokenizer(image_size=image, stride=stride, vocab_size=vocab)
    ids = dvae.encode(torch.zeros(2, 3, image, image))
    assert ids.shape == (2, *grid)
    assert dvae.decode(ids).shape == (2, 3, image, image)
    assert dvae.codebook.shape == (vocab, 5)


@pytest.mark.parametrize(
    ("wrong", "word"),
    [
        ({"stride": 6}, "power of two"),
        ({"stride": 1}, "power of two"),
        ({"vocab_size": 1}, "vocab_size 1"),
        ({"hidden_dim": 22}, "hidden_dim 22"),
        ({"image_size": [24, 41]}, "24x41.*24x40"),
        ({"image_size": [24]}, "height, width"),
    ],
)
def test_impossible_sizes_are_refused(wrong, word):
    with pytest.raises(UserError, match=word):
        tokenizer(**wrong)


def test_images_that_do_not_divide_are_refused():
    with pytest.raises(UserError, match="23x40"):
        tokenizer().encode(images()[:, :, :23])


def test_value_range_maps_the_unit_range():
    ends = to_value_range(torch.tensor([0.0, 0.5, 1.0]), (0.1, 0.9))
    torch.testing.assert_close(ends, torch.tensor([0.1, 0.5, 0.9]))


def write_checkpoint(path, dvae, target="beit.tokenizers.dvae.DiscreteVAE"):
    state = {f"tokenizer.{k}": v for k, v in dvae.state_dict().items()}
    state["recent_counts"] = torch.zeros(13, dtype=torch.int64)
    config = {"tokenizer": {"_target_": target, **SIZES}}
    entry = {"config": config, "composed": config, "classes": None}
    write_file(path, {"state_dict": state, "beit": entry})
    return str(path)


def test_a_checkpoint_rebuilds_the_tokenizer_frozen(tmp_path):
    dvae = tokenizer().eval()
    dvae.encoder[-1].running_mean += 0.3  # statistics travel too
    loaded = load_dvae(write_checkpoint(tmp_path / "a.safetensors", dvae), vocab_size=13, stride=8)
    assert torch.equal(loaded.encode(images()), dvae.encode(images()))
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    assert loaded.image_size == (24, 40)


def test_a_checkpoint_of_other_numbers_or_another_kind_is_refused(tmp_path):
    path = write_checkpoint(tmp_path / "a.safetensors", tokenizer())
    with pytest.raises(UserError, match="vocab_size is 13, expected 17"):
        load_dvae(path, vocab_size=17, stride=8)
    with pytest.raises(UserError, match="stride is 8, expected 4"):
        load_dvae(path, vocab_size=13, stride=4)
    path = write_checkpoint(tmp_path / "b.safetensors", tokenizer(), target="beit.models.vit.X")
    with pytest.raises(UserError, match="not of dVAE training"):
        load_dvae(path, vocab_size=13, stride=8)
    with pytest.raises(UserError, match=r"nowhere.safetensors"):
        load_dvae(str(tmp_path / "nowhere.safetensors"), vocab_size=13, stride=8)

"""The DALL-E tokenizer against the package it was published in, `dall-e` 0.1, randomly initialised.

At full size, on images of 3x5 tokens. The package's own float16 path needs a GPU, and on a CPU it
computes in float32 whatever it is given: there is nothing to compare in bf16.
"""

import pytest
import torch
import torch.nn.functional as F

from beit.tokenizers.base import to_value_range
from beit.tokenizers.dalle import DalleDecoder, DalleEncoder, DalleTokenizer

dall_e = pytest.importorskip("dall_e", reason="needs the package DALL-E 0.1 (pip install '.[dev]')")
BATCH, IMAGE, GRID = 2, (24, 40), (3, 5)


@pytest.fixture(scope="module")
def theirs():
    torch.manual_seed(7)
    networks = dall_e.Encoder(), dall_e.Decoder()
    for network in networks:  # their biases start at zero, where a lost one would not show
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(False)
            if name.endswith(".b"):
                parameter.normal_(std=0.03)
    return networks


@pytest.fixture
def ours(theirs, monkeypatch):
    states = {type(network).__name__: network.state_dict() for network in theirs}

    def load(module, path):
        module.load_state_dict(states[path], strict=True, assign=True)

    monkeypatch.setattr("beit.tokenizers.dalle._load", load)  # from memory: it is 400 MB of files
    with torch.device("meta"):
        return DalleTokenizer("Encoder", decoder_path="Decoder")


@pytest.fixture(scope="module")
def images():
    generator = torch.Generator().manual_seed(1)
    colours = torch.rand(BATCH, 3, *GRID, generator=generator)
    noise = torch.rand(BATCH, 3, *IMAGE, generator=generator)
    return 0.8 * F.interpolate(colours, IMAGE) + 0.2 * noise


def test_names_and_shapes(theirs, measured):
    with torch.device("meta"):
        networks = DalleEncoder(), DalleDecoder()
    for our_network, network in zip(networks, theirs, strict=True):
        ours, expected = (
            {key: tuple(value.shape) for key, value in n.state_dict().items()}
            for n in (our_network, network)
        )
        different = len(set(ours.items()) ^ set(expected.items()))
        measured("DALL-E tokenizer", "names and shapes of tensors", "dall-e 0.1", different, 0)


def test_range_of_pixels(images, measured):
    found = to_value_range(images, DalleTokenizer.value_range)
    difference = (found - dall_e.map_pixels(images)).abs().max()
    measured("DALL-E tokenizer", "range of pixels", "dall-e 0.1", difference, 1e-6)


def test_logits_and_token_ids(theirs, ours, images, measured):
    pixels = dall_e.map_pixels(images)
    expected = theirs[0](pixels)
    found = ours.encoder(pixels)
    difference = (found - expected).abs().max().item()
    measured("DALL-E tokenizer", "logits of the encoder", "dall-e 0.1", difference, 1e-5)
    ids = ours.encode(pixels)
    assert ids.shape == (BATCH, *GRID)
    assert len(ids.unique()) > 3
    different = (ids != expected.argmax(1)).sum()
    measured("DALL-E tokenizer", "token ids", "dall-e 0.1", different, 0)


def test_decoding(theirs, ours, measured):
    ids = torch.randint(8192, (BATCH, *GRID), generator=torch.Generator().manual_seed(2))
    one_hot = F.one_hot(ids, 8192).permute(0, 3, 1, 2).float()
    expected = theirs[1](one_hot)
    difference = (ours.decoder(one_hot) - expected).abs().max()
    measured("DALL-E tokenizer", "output of the decoder", "dall-e 0.1", difference, 1e-5)
    pixels = dall_e.unmap_pixels(torch.sigmoid(expected[:, :3]))
    difference = (ours.decode(ids) - pixels).abs().max()
    measured("DALL-E tokenizer", "reconstructed pixels", "dall-e 0.1", difference, 1e-5)


def test_gradients_of_every_parameter(images, measured, monkeypatch):
    """As narrow as the package can be built: the full size in both directions takes long."""
    for name, value in {"VOCAB_SIZE": 521, "ENCODER_WIDTH": 64}.items():
        monkeypatch.setattr(f"beit.tokenizers.dalle.{name}", value)
    torch.manual_seed(5)
    theirs = dall_e.Encoder(n_hid=64, vocab_size=521).requires_grad_()
    ours = DalleEncoder()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    found, expected = ours(images), theirs(images)
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(4))
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    parameters = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        gradient = parameters[name].grad
        difference = (parameter.grad - gradient).abs().max() / gradient.abs().max()
        measured("DALL-E tokenizer", "gradients of the encoder", "dall-e 0.1", difference, 1e-4)

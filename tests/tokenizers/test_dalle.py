import hashlib
import logging

import pytest
import torch
from torch.nn import functional as F

from beit.errors import UserError
from beit.tokenizers import dalle
from beit.tokenizers.dalle import DalleDecoder, DalleEncoder, DalleTokenizer


def test_full_size_counts_and_keys():
    with torch.device("meta"):
        encoder, decoder = DalleEncoder(), DalleDecoder()
    # counted from the published architecture
    assert sum(p.numel() for p in encoder.parameters()) == 53_786_240
    assert sum(p.numel() for p in decoder.parameters()) == 43_829_766
    for network, with_id_path in ((encoder, {2, 3, 4}), (decoder, {1, 2, 3, 4})):
        expected = {f"blocks.{end}.{p}" for end in ("input", "output.conv") for p in "wb"}
        for group in range(1, 5):
            for block in (1, 2):
                prefix = f"blocks.group_{group}.block_{block}"
                convs = [f"{prefix}.res_path.conv_{i}" for i in range(1, 5)]
                if block == 1 and group in with_id_path:
                    convs.append(f"{prefix}.id_path")
                expected |= {f"{conv}.{p}" for conv in convs for p in "wb"}
        assert set(network.state_dict()) == expected


def test_kernels_and_shapes_at_full_size():
    with torch.device("meta"):
        encoder, decoder = DalleEncoder().state_dict(), DalleDecoder().state_dict()
    kernels = [
        [s[f"blocks.group_3.block_2.res_path.conv_{i}.w"].shape[-1] for i in range(1, 5)]
        for s in (encoder, decoder)
    ]
    assert kernels == [[3, 3, 3, 1], [1, 3, 3, 3]]
    assert encoder["blocks.input.w"].shape == (256, 3, 7, 7)
    assert encoder["blocks.output.conv.w"].shape == (8192, 2048, 1, 1)
    assert decoder["blocks.input.w"].shape == (128, 8192, 1, 1)
    assert decoder["blocks.output.conv.w"].shape == (6, 256, 1, 1)


@pytest.fixture
def small(monkeypatch, tmp_path):
    """The same network, narrow, with weights on disk."""
    for name, value in {
        "VOCAB_SIZE": 13,
        "ENCODER_WIDTH": 8,
        "DECODER_WIDTH": 4,
        "DECODER_INPUT": 4,
    }.items():
        monkeypatch.setattr(dalle, name, value)
    torch.manual_seed(0)
    paths = tmp_path / "encoder.pt", tmp_path / "decoder.pt"
    for network, path in zip((DalleEncoder(), DalleDecoder()), paths, strict=True):
        torch.save(network.state_dict(), path)
    return tuple(map(str, paths))


def tokenizer(small):
    return DalleTokenizer(small[0], decoder_path=small[1], vocab_size=13)


def literal(state, x, *, kernels, resize):
    """The published forward pass, written out."""

    def conv(name, x):
        w = state[f"{name}.w"]
        return F.conv2d(x, w, state[f"{name}.b"], padding=(w.shape[-1] - 1) // 2)

    x = conv("blocks.input", x)
    for group in range(1, 5):
        for block in (1, 2):
            name = f"blocks.group_{group}.block_{block}"
            y = x
            for i, kernel in enumerate(kernels, start=1):
                assert state[f"{name}.res_path.conv_{i}.w"].shape[-1] == kernel
                y = conv(f"{name}.res_path.conv_{i}", y.relu())
            skip = conv(f"{name}.id_path", x) if f"{name}.id_path.w" in state else x
            x = skip + y / 64
        if group < 4:
            x = resize(x)
    return conv("blocks.output.conv", x.relu())


def test_encode_and_decode_against_the_literal_network(small):
    dvae = tokenizer(small)
    images = torch.rand(7, 3, 24, 40, generator=torch.Generator().manual_seed(1)) * 0.8 + 0.1
    logits = literal(
        dvae.encoder.state_dict(), images, kernels=(3, 3, 3, 1), resize=lambda x: F.max_pool2d(x, 2)
    )
    ids = dvae.encode(images)
    assert ids.shape == (7, 3, 5) == (7, *dvae.grid((24, 40)))
    assert torch.equal(ids, logits.argmax(1))
    assert len(ids.unique()) > 1
    one_hot = F.one_hot(ids, 13).permute(0, 3, 1, 2).float()
    out = literal(
        dvae.decoder.state_dict(),
        one_hot,
        kernels=(1, 3, 3, 3),
        resize=lambda x: x.repeat_interleave(2, 2).repeat_interleave(2, 3),
    )
    expected = ((out[:, :3].sigmoid() - 0.1) / 0.8).clamp(0, 1)
    torch.testing.assert_close(dvae.decode(ids), expected)
    torch.testing.assert_close(dvae.decoder(one_hot), out)


def test_the_output_convolution_is_float32_under_autocast(small):
    dvae = tokenizer(small)
    images = torch.rand(2, 3, 24, 40)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert dvae.encoder(images).dtype == torch.float32
        pixels = dvae.decode(dvae.encode(images))
    assert pixels.dtype == torch.float32
    assert pixels.min() >= 0
    assert pixels.max() <= 1


def test_the_range_is_the_logit_laplace_one(small):
    assert tokenizer(small).value_range == pytest.approx((0.1, 0.9))


def test_decoding_without_decoder_weights_names_the_mend(small):
    dvae = DalleTokenizer(small[0], decoder_path=None, vocab_size=13)
    with pytest.raises(UserError, match="decoder_path"):
        dvae.decode(torch.zeros(2, 3, 5, dtype=torch.int64))


def test_sha256_of_each_file_is_logged(small, caplog):
    with caplog.at_level(logging.INFO, logger="beit"):
        tokenizer(small)
    for path in small:
        with open(path, "rb") as stream:
            assert hashlib.sha256(stream.read()).hexdigest() in caplog.text


def test_weights_of_something_else_are_refused(small):
    with pytest.raises(UserError, match=r"DalleEncoder.*blocks.group_1"):
        DalleTokenizer(small[1], decoder_path=None, vocab_size=13)
    with pytest.raises(UserError, match="vocab_size 17"):
        DalleTokenizer(small[0], decoder_path=None, vocab_size=17)


def test_images_that_do_not_divide_are_refused(small):
    with pytest.raises(UserError, match="24x41"):
        tokenizer(small).encode(torch.rand(2, 3, 24, 41))


@pytest.mark.parametrize("spread", [1.0, 1e-2, 0.0])
def test_the_likeliest_code_is_the_argmax_of_all_logits_in_float32(spread):
    """Also where codes lie so close together that bfloat16 cannot tell them apart."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(200, 44, generator=generator).relu().bfloat16()
    base = torch.randn(1, 44, generator=generator)
    weight = base + spread * torch.randn(301, 44, generator=generator)
    bias = spread * 0.1 * torch.randn(301, generator=generator)
    expected = F.linear(rows.double(), weight.double(), bias.double()).argmax(dim=1)
    found = dalle.LikeliestCode(weight, bias)(rows)
    assert torch.equal(found, expected)
    if spread == 1e-2:  # what bfloat16 alone would have made of them
        coarse = F.linear(rows, weight.bfloat16(), bias.bfloat16()).argmax(dim=1)
        assert (coarse != expected).float().mean() > 0.2


def test_in_bfloat16_the_last_layer_stays_in_float32(small):
    tokenizer = DalleTokenizer(small[0], decoder_path=None, vocab_size=13)
    images = 0.1 + 0.8 * torch.rand(4, 3, 24, 40, generator=torch.Generator().manual_seed(2))
    seen = []
    tokenizer.encoder.last.register_forward_hook(lambda *args: seen.append(args))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = tokenizer.encoder(images).argmax(dim=1)
        assert len(seen) == 1
        assert torch.equal(tokenizer.encode(images), expected)
    assert len(seen) == 1  # the second time without all of its logits

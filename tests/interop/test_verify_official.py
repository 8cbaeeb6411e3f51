"""scripts/verify_official.py on made-up files of the official layout."""

import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from beit.interop.decoder import Decoder, Head, usual_taps
from beit.interop.weights import Architecture, Weights

SCRIPT = Path(__file__).parents[2] / "scripts" / "verify_official.py"


@pytest.fixture
def script():
    return runpy.run_path(str(SCRIPT))


def fabricated(kit, tmp_path, script, name="beit_base_patch16_224_pt22k_ft22kto1k"):
    """A small file of the official layout under a released name, an image, and its logits."""
    weights = kit.make().changed(classes=None)
    path, image = tmp_path / f"{name}.pth", tmp_path / "image.png"
    torch.save({"model": weights.released()}, path)
    pixels = np.random.default_rng(2).integers(0, 256, (30, 50, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(image)
    return weights, path, image, script["compute_logits"](weights, image, 1e-6)


def test_verification_of_a_fabricated_release(tmp_path, kit, script, capsys):
    weights, path, image, logits = fabricated(kit, tmp_path, script)
    count = sum(value.numel() for value in weights.released().values())
    published = {path.stem: (tuple(logits[:3].tolist()), int(logits.argmax()))}
    script["PARAMETERS"][22, 24, "classification", 5] = count
    script["PUBLISHED"].update(published)
    assert script["main"]([str(path), "--image", str(image)]) == 0
    assert capsys.readouterr().out.count(": ok,") == 4
    assert script["main"]([str(path)]) == 0
    assert "not checked, give --image" in capsys.readouterr().out
    script["PARAMETERS"][22, 24, "classification", 5] = count + 1
    assert script["main"]([str(path), "--image", str(image)]) == 1
    assert "parameters: WRONG" in capsys.readouterr().out


def test_a_segmentation_model(tmp_path, kit, script, capsys):
    """Its statistics are no parameters; no logits of it are known."""
    weights = kit.make("segmentation")
    path = kit.save(weights, "unilm", tmp_path)
    buffers = ("running_mean", "running_var", "num_batches_tracked")
    counted = [v.numel() for k, v in weights.released().items() if not k.endswith(buffers)]
    script["PARAMETERS"][22, 24, "segmentation", 5] = sum(counted)
    assert script["main"]([str(path)]) == 0
    out = capsys.readouterr().out
    assert out.count(": ok,") == 3
    assert "none are published for a file named w" in out


@pytest.mark.parametrize("wrong", ["logit", "class", "epsilon"])
def test_verification_tells_other_logits(wrong, tmp_path, kit, script, capsys):
    weights, path, image, logits = fabricated(kit, tmp_path, script)
    three, best = logits[:3].tolist(), int(logits.argmax())
    if wrong == "logit":
        three[1] += 0.002
    elif wrong == "class":
        best = (best + 1) % 5
    else:
        three = script["compute_logits"](weights, image, 1e-12)[:3].tolist()
        assert max(abs(a - b) for a, b in zip(three, logits[:3].tolist())) < 1e-3
    script["PUBLISHED"][path.stem] = (tuple(three), best)
    code = script["main"]([str(path), "--image", str(image)])
    out = capsys.readouterr().out
    assert code == (0 if wrong == "epsilon" else 1)
    assert ("logits: WRONG" in out) == (wrong != "epsilon")
    assert script["main"]([str(tmp_path / "absent.pth")]) == 2


def test_known_parameter_counts(script):
    """Of the released models, built without memory."""
    for (width, size, what, outputs), count in script["PARAMETERS"].items():
        kind, _, absolute = what.partition(" ")
        mim = kind == "mim"
        arch = Architecture(
            image_size=(size, size),
            patch_size=16,
            width=width,
            depth=12 if width == 768 else 24,
            num_heads=width // 64,
            mlp_hidden=4 * width,
            absolute_position=bool(absolute),
            relative_position="none" if absolute else "shared" if mim else "per_block",
            layer_scale=0.0 if absolute else 0.1,
            mask_token=mim,
            final_norm=mim,
        )
        key = "lm_head.weight" if mim else "head.weight"
        decoder, pooling = None, "none" if mim else "mean"
        with torch.device("meta"):
            head = {key: torch.empty(outputs, width)}
            if kind == "segmentation":
                head = {"head.conv_seg.weight": torch.empty(outputs, width, 1, 1)}
                upernet = Head.of("UPerNetHead", channels=width)
                taps = usual_taps(arch.depth, [])
                decoder = Decoder(upernet, (Head.of("FCNHead"),), taps, pyramid=True)
            weights = Weights(kind, arch, {}, head, pooling, decoder=decoder)
        assert script["count_parameters"](weights) == count

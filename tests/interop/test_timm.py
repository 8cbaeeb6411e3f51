"""What timm writes: bare state dicts, training checkpoints, folders of the hub."""

import json

import pytest
import timm
import torch
from safetensors.torch import save_file

import beit
from beit.errors import UserError
from beit.interop import convert


def test_timms_own_files(tmp_path):
    arguments = {"img_size": 24, "patch_size": 8, "embed_dim": 22, "depth": 3, "num_heads": 2}
    model = timm.create_model("beit_base_patch16_224", **arguments, num_classes=5).eval()
    for file in ("bare.pth", "train.pth", "bare.safetensors"):
        path, state = tmp_path / file, model.state_dict()
        if file == "bare.safetensors":
            save_file(state, path)
        else:
            torch.save(state if file == "bare.pth" else {"arch": "x", "state_dict": state}, path)
        found = convert.read(path)
        assert found.report.layout == "timm"
        images = torch.randn(2, 3, 24, 24)
        with torch.no_grad():
            got, expected = beit.load_model(path)(images), model(images)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    folder = tmp_path / "hub"
    labels = {"label_names": list("vwxyz")}
    timm.models.save_for_hf(model, folder, model_config=labels, safe_serialization=True)
    found = convert.read(folder)
    assert found.classes == list("vwxyz")
    assert found.preprocessing.crop_pct == 0.9
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_classes": 7}))
    with pytest.raises(UserError, match="num_classes is 7, and the head beside it has 5"):
        convert.read(folder)

"""Mask R-CNN of torchvision on our backbone: it trains, it predicts, it finds the true strides."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import MultiScaleRoIAlign

import beit
from beit.errors import UserError
from beit.models.detection import DetectionBackbone
from beit.models.pyramid import FeaturePyramid
from beit.models.vit import VisionTransformer

WIDTH, CHANNELS = 22, 12
DOCUMENT = Path(__file__).parents[2] / "docs" / "detection.md"


def backbone(patch=16, **changes):
    vit = VisionTransformer(
        (4 * patch, 6 * patch),
        patch,
        width=WIDTH,
        depth=4,
        num_heads=2,
        absolute_position=False,
        relative_position="per_block",
        layer_scale=0.1,
        drop_path_rate=0.0,
        mask_token=False,
        final_norm=False,
        init_cut=2.0,
        **{"any_size": True, **changes},
    )
    pyramid = FeaturePyramid(WIDTH, taps=[0, 1, 2, 3], patch_size=patch)
    return DetectionBackbone(vit, pyramid, out_channels=CHANNELS)


def mask_rcnn(body, **changes):
    return MaskRCNN(
        body,
        num_classes=3,
        size_divisible=body.size_divisible,
        **{"min_size": 64, "max_size": 128, "rpn_post_nms_top_n_train": 30, **changes},
        rpn_post_nms_top_n_test=30,
        box_score_thresh=0.0,
    )


def labelled(sizes):
    images = [torch.rand(3, *size, generator=torch.Generator().manual_seed(0)) for size in sizes]
    targets = []
    for height, width in sizes:
        masks = torch.zeros(1, height, width, dtype=torch.uint8)
        masks[0, 10:40, 8:50] = 1
        box = torch.tensor([[8.0, 10.0, 50.0, 40.0]])
        targets.append({"boxes": box, "labels": torch.tensor([2]), "masks": masks})
    return images, targets


@pytest.mark.parametrize(("patch", "size"), [(16, (64, 96)), (16, (160, 32)), (8, (48, 80))])
def test_maps_are_torchvisions(patch, size):
    """Names, order, channels and strides of a ResNet with FPN, half as large for patches of 8."""
    ours = backbone(patch)
    maps = ours(torch.randn(2, 3, *size))
    resnet = resnet_fpn_backbone(backbone_name="resnet18", weights=None)
    theirs = resnet(torch.randn(2, 3, *(side * 16 // patch for side in size)))
    assert list(maps) == list(theirs) == ["0", "1", "2", "3", "pool"]
    for ours_map, their_map in zip(maps.values(), theirs.values(), strict=True):
        assert ours_map.shape == (2, CHANNELS, *their_map.shape[2:])
    assert ours.out_channels == CHANNELS


@pytest.mark.parametrize("patch", [8, 16])
def test_torchvision_finds_the_true_strides(patch):
    body, size = backbone(patch), (8 * patch, 12 * patch)
    maps = body(torch.randn(1, 3, *size))
    pooling = MultiScaleRoIAlign(["0", "1", "2", "3"], output_size=2, sampling_ratio=1)
    pooling(maps, [torch.tensor([[0.0, 0.0, 20.0, 20.0]])], [size])
    assert [1 / scale for scale in pooling.scales] == list(body.pyramid.strides)
    anchors = AnchorGenerator(sizes=((8,),) * 5, aspect_ratios=((1.0,),) * 5)
    boxes = anchors(ImageList(torch.zeros(1, 3, *size), [size]), list(maps.values()))[0]
    at = 0
    for level, stride in zip(maps.values(), [*body.pyramid.strides, 4 * patch], strict=True):
        assert boxes[at + 1, 0] - boxes[at, 0] == stride
        at += level.shape[2] * level.shape[3]


def test_mask_rcnn_trains_and_predicts_at_several_sizes():
    torch.manual_seed(0)
    detector = mask_rcnn(backbone())
    optimizer = torch.optim.AdamW(detector.parameters(), lr=1e-3)
    images, targets = labelled([(60, 90), (100, 70)])
    first = None
    for _ in range(8):
        losses = detector.train()(images, targets)
        total = sum(losses.values())
        first = first or total.item()
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    reached = [n for n, p in detector.named_parameters() if p.grad is not None]
    assert reached == [n for n, _ in detector.named_parameters()]
    assert total.item() < first
    sizes = [(60, 90), (100, 70), (64, 64)]
    with torch.inference_mode():
        found = detector.eval()(labelled(sizes)[0])
    for prediction, size in zip(found, sizes, strict=True):
        assert set(prediction) == {"boxes", "labels", "scores", "masks"}
        assert prediction["masks"].shape[1:] == (1, *size)
        assert len(prediction["boxes"]) > 0
        assert prediction["boxes"][:, 2].max() <= size[1] + 1e-3
        assert prediction["boxes"][:, 3].max() <= size[0] + 1e-3
    again = detector.train()(images, targets)  # after inference mode
    sum(again.values()).backward()


def test_padding_does_not_divide():
    body = backbone(32)
    assert body.size_divisible == 64
    detector = mask_rcnn(body)
    detector.transform.size_divisible = 32  # torchvision's default
    with pytest.raises(UserError, match="build the detector with size_divisible=64"):
        detector(*labelled([(96, 120)]))


@pytest.mark.parametrize("patch", [2, 14, 24])
def test_a_patch_that_is_no_power_of_two_is_refused(patch):
    with pytest.raises(UserError, match=f"patch_size {patch}: torchvision's region pooling"):
        backbone(patch)


def test_a_backbone_of_one_size_is_refused():
    with pytest.raises(UserError, match="any_size=True"):
        backbone(any_size=False)


def test_the_documents_example_runs(capsys, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(DOCUMENT), "exec"), names)
    assert "'masks': (" in capsys.readouterr().out
    assert torch.isfinite(sum(names["losses"].values()))
    sizes = {"width": 32, "depth": 4, "num_heads": 2, "layer_scale": 0.1, "drop_path_rate": 0.1}
    kind = {"absolute_position": False, "relative_position": "shared", "mask_token": True}
    pretrained = VisionTransformer(48, 16, **sizes, **kind, final_norm=True, init_cut=0.02)
    monkeypatch.setattr(beit, "load_model", lambda path: SimpleNamespace(backbone=pretrained))
    vit = names["vit"]
    names["load_pretrained"]("PATH", vit)
    assert torch.equal(vit.blocks[3].mlp.fc1.weight, pretrained.blocks[3].mlp.fc1.weight)
    assert "4 " in capsys.readouterr().out  # tables copied

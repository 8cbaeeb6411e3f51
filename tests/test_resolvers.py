"""What config keys become where a config asks for it."""

import pytest
from omegaconf import OmegaConf

from beit import config


@pytest.mark.parametrize(
    ("model", "taps"),
    [("base", [3, 5, 7, 11]), ("large", [7, 11, 15, 23]), ("micro", [1, 2, 3, 5])],
)
def test_plain_maps_are_of_the_pyramids_blocks_at_any_depth(model: str, taps: list[int]) -> None:
    words = ["task=segmentation", "data=ade20k", "head=setr_pup", f"model={model}"]
    assert config.compose([*words, "pyramid=plain"]).pyramid.taps == taps
    assert config.compose([*words, f"pyramid={model}"]).pyramid.taps == taps


def test_a_shallow_network_has_four_taps_too() -> None:
    words = ["task=segmentation", "data=ade20k", "head=linear", "model=micro", "pyramid=plain"]
    for depth, taps in {1: [0, 0, 0, 0], 3: [0, 1, 1, 2], 4: [0, 1, 2, 3]}.items():
        assert config.compose([*words, f"model.depth={depth}"]).pyramid.taps == taps


@pytest.mark.parametrize(
    ("recipe", "key", "expected"),
    [
        ("camvid/scratch", "inference.stride", [149, 149]),
        ("segmentation/setr_pup_base", "pyramid.taps", [3, 5, 7, 11]),
        ("pretrain/base_800ep", "masking.grid", [14, 14]),
        ("pretrain/base_800ep", "views.token_image_size", [112, 112]),
    ],
)
def test_a_config_can_be_resolved_in_place(recipe: str, key: str, expected: list[int]) -> None:
    words = [f"experiment={recipe}", "paths.data_dir=x", "init_from=null"]
    cfg = config.compose(words)
    OmegaConf.resolve(cfg)
    assert OmegaConf.to_container(cfg) == OmegaConf.to_container(
        config.compose(words), resolve=True
    )
    assert OmegaConf.select(cfg, key) == expected

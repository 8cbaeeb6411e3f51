import io

import pytest
import torch
from rich.console import Console

from beit.errors import UserError
from beit.models.position import resize_relative_table
from beit.models.transfer import adapt_backbone
from beit.models.vit import VisionTransformer

DEPTH, WIDTH = 4, 22
TABLE = "relative_position_bias_table"


def make_vit(stage, **changes):
    pretraining = stage == "pretraining"
    arguments = {
        "image_size": (24, 40),
        "patch_size": 8,
        "width": WIDTH,
        "depth": DEPTH,
        "num_heads": 2,
        "absolute_position": False,
        "relative_position": "shared" if pretraining else "per_block",
        "layer_scale": 0.1,
        "drop_path_rate": 0.0,
        "mask_token": pretraining,
        "final_norm": pretraining,
        "init_cut": 0.02,
    }
    model = VisionTransformer(**{**arguments, **changes})
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def released_weights(model):
    """As the released file has them: with index buffers and a head."""
    state = model.state_dict()
    state["rel_pos_bias.relative_position_index"] = torch.zeros(16, 16, dtype=torch.long)
    state["lm_head.weight"] = torch.zeros(13, WIDTH)
    return state


def test_pretrained_weights_reach_the_finetuning_model():
    source, target = make_vit("pretraining"), make_vit("finetuning")
    adapted, report = adapt_backbone(released_weights(source), target)
    missing, unexpected = target.load_state_dict(adapted, strict=False)
    assert not missing
    assert not unexpected
    images = torch.randn(7, 3, 24, 40)
    with torch.no_grad():
        torch.testing.assert_close(
            source.forward_blocks(images, taps=[3]), target.forward_blocks(images, taps=[3])
        )
    assert set(report.unexpected) == {"mask_token", "norm.weight", "norm.bias", "lm_head.weight"}
    tables = [f"blocks.{i}.attn.{TABLE}" for i in range(DEPTH)]
    assert report.copied == [(f"rel_pos_bias.{TABLE}", tables)]
    assert report.missing == []
    assert report.resized == []
    assert set(report.loaded) | set(tables) == set(target.state_dict())


def test_copies_of_the_table_do_not_share_memory():
    adapted, _ = adapt_backbone(make_vit("pretraining").state_dict(), make_vit("finetuning"))
    tables = [value for key, value in adapted.items() if key.endswith(TABLE)]
    assert len({table.data_ptr() for table in tables}) == DEPTH


@pytest.mark.parametrize(("size", "grid"), [((40, 72), (5, 9)), ((32, 40), (4, 5))])
def test_another_grid_resizes_tables_and_positions(size, grid):
    source = make_vit("pretraining", absolute_position=True)
    target = make_vit("finetuning", absolute_position=True, image_size=size)
    adapted, report = adapt_backbone(source.state_dict(), target, source_grid=(3, 5))
    target.load_state_dict(adapted, strict=True)
    expected = resize_relative_table(source.rel_pos_bias.relative_position_bias_table, (3, 5), grid)
    torch.testing.assert_close(target.blocks[2].attn.relative_position_bias_table.data, expected)
    assert {key for key, _, _ in report.resized} == {"pos_embed"} | {
        f"blocks.{i}.attn.{TABLE}" for i in range(DEPTH)
    }
    assert (
        "pos_embed",
        (1, 16, WIDTH),
        (1, 1 + grid[0] * grid[1], WIDTH),
    ) in report.resized


def test_a_square_grid_is_found_in_the_weights():
    source = make_vit("pretraining", image_size=32)
    target = make_vit("finetuning", image_size=(40, 48))
    adapted, _ = adapt_backbone(source.state_dict(), target)
    table = source.rel_pos_bias.relative_position_bias_table
    expected = resize_relative_table(table, (4, 4), (5, 6))
    torch.testing.assert_close(adapted[f"blocks.1.attn.{TABLE}"], expected)


def test_a_grid_nothing_explains_is_refused():
    target = make_vit("finetuning", image_size=(40, 48))
    with pytest.raises(UserError, match="source_grid"):
        adapt_backbone(make_vit("pretraining").state_dict(), target)
    with pytest.raises(UserError, match=r"48 rows.*\(4, 4\)"):
        adapt_backbone(make_vit("pretraining").state_dict(), target, source_grid=(4, 4))


def test_missing_tensors_are_listed():
    source = make_vit("pretraining", layer_scale=0.0)
    target = make_vit("finetuning", final_norm=True, layer_scale=0.1)
    _, report = adapt_backbone(source.state_dict(), target)
    gammas = [f"blocks.{i}.gamma_{n}" for i in range(DEPTH) for n in (1, 2)]
    assert report.missing == gammas


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"width": 26}, r"\[1, 1, 22\].*\[1, 1, 26\]"),
        ({"depth": 3}, "4 blocks.*model 3"),
        ({"patch_size": 4, "image_size": (12, 20)}, r"\[22, 3, 8, 8\].*\[22, 3, 4, 4\]"),
        ({"num_heads": 11}, r"\[48, 2\].*\[48, 11\]"),
    ],
)
def test_other_architectures_are_refused(changes, words):
    with pytest.raises(UserError, match=words):
        adapt_backbone(make_vit("pretraining").state_dict(), make_vit("finetuning", **changes))


def test_foreign_weights_are_refused():
    with pytest.raises(UserError, match="none of the 1 tensors"):
        adapt_backbone({"encoder.weight": torch.zeros(1)}, make_vit("finetuning"))


def test_report_is_readable_plain_and_rich():
    source = make_vit("pretraining", image_size=32)
    _, report = adapt_backbone(
        released_weights(source), make_vit("finetuning", image_size=(40, 48), final_norm=True)
    )
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(report)
    for text in (str(report), console.export_text()):
        for word in ("copied", f"rel_pos_bias.{TABLE}", "[52, 2] -> [102, 2]", "lm_head.weight"):
            assert word in text
    assert "(x4)" in str(report)

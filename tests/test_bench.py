"""Every row of the benchmark (`make bench`) in its quick form: that it runs, not how fast."""

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from scripts.bench import (
    ceilings,
    contenders,
    dalle,
    flop,
    inference,
    literal,
    masks,
    record,
    rows,
    steps,
    timing,
    tokenizer,
    views,
)
from scripts.bench.photographs import photographs
from scripts.bench.results import Entry, Table
from scripts.bench.settings import Settings, Shape

QUICK = Settings(rounds=1, threads=1, quick=True)
CEILINGS = {"bf16": 2e12, "fp32": 1e12, "copy": 1e10}
ALONE = ("memory", "index")  # here ours alone has processes of its own
FULL = Settings(rounds=1, threads=1)


@pytest.fixture(scope="module")
def results() -> dict[str, rows.Result]:
    """Of the rows that were run before."""
    return {}


@pytest.mark.parametrize("name", rows.ROWS)
def test_row(name: str, results: dict[str, rows.Result], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    result = results[name] = rows.run_row(name, QUICK)
    assert result.tables
    for table in result.tables:
        numbers = [[*entry.values, entry.cost, entry.work] for entry in table.entries]
        assert len(numbers) > 1 or name in ALONE, "nothing to compare with"
        assert all(0 < number < math.inf for line in numbers for number in line)
        assert all(len(line) == len(table.header()) for line in table.cells(CEILINGS))
        assert not table.precision or all(entry.flop > 0 for entry in table.entries)


def test_what_was_measured_is_kept_and_written(
    results: dict[str, rows.Result], tmp_path: Path
) -> None:
    path, run = tmp_path / "bench.json", record.Run.now(QUICK, CEILINGS)
    first, *rest = results.values() or [rows.run_row("masks", QUICK)]
    record.merged(path, run, [first])
    found = record.merged(path, run, rest)
    assert list(found) == [first.name, *(result.name for result in rest)]
    assert found[first.name][0] == run  # through the file, as what follows
    assert record.markdown(found) == record.markdown({r.name: (run, r) for r in (first, *rest)})
    text = record.markdown(found)
    assert text.count(run.commit) == 1
    assert all(f"### {result.row}\n" in text for result in (first, *rest))


def test_order_rotates_and_the_warm_up_is_left_out() -> None:
    called: list[str] = []

    def contender(name: str) -> float:
        called.append(name)
        return float(len(called))

    calls = {name: lambda n=name: contender(n) for name in "abc"}
    seconds = timing.alternate(calls, rounds=2, warmup=1)
    assert "".join(called) == "abcbcacab"
    assert seconds == {"a": [6.0, 8.0], "b": [4.0, 9.0], "c": [5.0, 7.0]}


def test_the_best_of_the_ceilings_is_kept() -> None:
    measured = ceilings.measure(quick=True)
    assert measured.keys() == CEILINGS.keys()
    assert all(value > 0 for value in measured.values())
    assert ceilings.best(CEILINGS, {**CEILINGS, "bf16": 3e12}) == {**CEILINGS, "bf16": 3e12}


def test_columns_of_a_table() -> None:
    entries = [Entry("ours", [1.0, 2.0, 4.0], 8, 1e12), Entry("other", [3.0], 4, 1e12)]
    table = Table("", entries, work="images", precision="bf16")
    assert table.cells({"bf16": 1e12}) == [
        ["ours", "2", "1.5 to 3", "1", "4", "", "50 %"],
        ["other", "3", "3 to 3", "3", "1.33", "3.00×", "33 %"],
    ]


def test_operations_of_the_published_sizes() -> None:
    shape = FULL.shape("base", batch_size=1)
    assert flop.inference(shape, 0) / 2e9 == pytest.approx(17.57, abs=0.01)  # GMAC
    head = flop.mim_step(shape, 75) - flop.mim_step(shape, 0)
    assert head == 6 * 75 * 768 * 8192
    assert tokenizer._flop(torch.empty(1, 3, 112, 112)) / 2e9 == pytest.approx(26.1, abs=0.05)


def test_the_contenders_have_the_same_parameters() -> None:
    """Of BEiT+ at base size 91,965,776, of its classifier 86,530,984 (the released models')."""
    with torch.device("meta"):
        networks = [build() for build in contenders.mim(FULL, FULL.shape()).values()]
        classifiers = [build() for build in contenders.classification(FULL.shape()).values()]
    assert {_parameters(network) for network in networks} == {91_965_776}
    assert {_parameters(network) for network in classifiers} == {86_530_984}


def test_the_segmenters_have_the_same_parameters_and_all_are_trained() -> None:
    """The released 163,407,980 at 640 px, but for the bias tables of 512 px."""
    with torch.device("meta"):
        shape = FULL.shape(image_size=512)
        networks = [build() for build in contenders.segmentation(shape).values()]
    tables = 12 * 12 * (6244 - 3972)
    assert {_parameters(network) for network in networks} == {163_407_980 - tables}
    shape = Shape(64, 32, 4, 2, batch_size=2)
    batch = steps.segmentation_batch(shape, contenders.SEGMENTATION_CLASSES)
    for name, build in contenders.segmentation(shape).items():
        network = build().train()
        loss = network(*batch)
        assert loss.item() == pytest.approx(1.4 * math.log(150), rel=0.05), name
        loss.backward()
        assert all(parameter.grad is not None for parameter in network.parameters()), name


def test_the_losses_are_of_the_same_patches() -> None:
    shape = QUICK.shape()
    batch = steps.mim_batch(shape)
    hidden = batch[1].flatten(1).sum(1)
    assert hidden.tolist() == [steps.masking(shape).target] * shape.batch_size
    for name, build in contenders.mim(QUICK, shape).items():
        loss = build().eval()(*batch)
        assert loss.ndim == 0
        assert abs(loss.item() - math.log(8192)) < 1, name  # nothing has been learnt


def test_a_checkout_that_does_not_import_is_told(tmp_path: Path) -> None:
    (tmp_path / "beit").mkdir()
    settings = Settings(rounds=1, threads=1, quick=True, unilm=str(tmp_path))
    (note,) = contenders.original_note(settings)
    assert "No module named 'modeling_pretrain'" in note
    assert list(contenders.mim(settings, settings.shape()))[-1].endswith("timm's blocks")


def test_a_checkout_is_the_original(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "beit").mkdir()
    # the released class's arguments and the shapes of its call, in its module's name
    (tmp_path / "beit" / "modeling_pretrain.py").write_text(
        """
from torch import nn


class VisionTransformerForMaskedImageModeling(nn.Module):
    def __init__(self, *, patch_size, vocab_size, embed_dim, norm_layer, **rest):
        super().__init__()
        self.rest = rest
        self.patches = nn.Conv2d(3, embed_dim, patch_size, patch_size)
        self.norm = norm_layer(embed_dim)
        self.lm_head = nn.Linear(embed_dim, vocab_size)

    def forward(self, x, bool_masked_pos):
        x = self.patches(x).flatten(2).transpose(1, 2)
        return self.lm_head(self.norm(x)[bool_masked_pos])
"""
    )
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "modeling_pretrain", raising=False)
    settings = Settings(rounds=1, threads=1, quick=True, unilm=str(tmp_path))
    assert contenders.original_note(settings) == []
    builders = contenders.mim(settings, settings.shape())
    assert list(builders)[-1] == "the original"
    network = builders["the original"]()
    monkeypatch.delitem(sys.modules, "modeling_pretrain")
    expected = {"use_abs_pos_emb": False, "use_shared_rel_pos_bias": True, "drop_path_rate": 0.1}
    assert expected.items() <= network.model.rest.items()
    loss = network(*steps.mim_batch(settings.shape()))
    assert loss.item() == pytest.approx(math.log(8192), abs=1)


def test_views_and_tokens_of_the_same_shapes() -> None:
    shape = Shape(48, 8, 1, 1, batch_size=2)
    files = photographs(QUICK, 3)
    found = {name: step() for name, step in views.build(shape, files).items()}
    for name, (first, second) in found.items():
        assert (first.shape, second.shape) == ((3, 3, 48, 48), (3, 3, 24, 24)), name
        assert (first.dtype, second.dtype) == (torch.float32,) * 2
        assert -1 <= first.min() < -0.5, name
        assert 0.5 < first.max() <= 1, name
        assert second.min() > 0.1 - 1e-6, name
        assert second.max() < 0.9 + 1e-6, name


def test_tokens_are_those_of_the_package() -> None:
    images = 0.1 + 0.8 * torch.rand(2, 3, 16, 16)
    ids = [step() for step in tokenizer.build(images).values()]
    assert ids[0].shape == ids[1].shape == (2, 2, 2)
    images_ids = dalle.ours().encode(images)  # in float32, where they must be equal
    package = dalle.Package().encoder(images).argmax(dim=1)
    assert torch.equal(images_ids, package)


def test_logits_have_the_same_shape() -> None:
    shape = QUICK.shape()
    images, _ = steps.labelled_batch(shape, contenders.CLASSES)
    models = {name: make().eval() for name, make in contenders.classification(shape).items()}
    for step in inference.build(models, images, "fp32").values():
        assert step().shape == (shape.batch_size, contenders.CLASSES)


def test_literal_masks_are_distributed_as_published() -> None:
    """Mean 74.48 hidden patches, 66.8 % of the masks with all 75, never more."""
    draw = literal.Masks((14, 14), 75)
    counts = np.array([draw().sum() for _ in range(3000)])
    assert counts.max() == 75
    assert counts.mean() == pytest.approx(74.48, abs=0.1)
    assert (counts == 75).mean() == pytest.approx(0.668, abs=0.03)
    assert all(len(step()) == 5 for name, step in masks.build(FULL, 5).items())


def test_photographs_are_jpegs_of_the_said_size(tmp_path: Path) -> None:
    from beit.data.images import open_rgb

    files = photographs(FULL, 20)
    assert len(set(files)) == 16
    assert {open_rgb(file, "").size for file in files} == {(500, 375)}
    for number in range(2):
        (tmp_path / f"{number}.jpg").write_bytes(files[number])
    assert photographs(Settings(1, 1, images=str(tmp_path)), 3) == [*files[:2], files[0]]


def _parameters(network: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())

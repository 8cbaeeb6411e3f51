"""Findings that are arithmetic: batch and rate, precision, cores, memory, disk."""

import shutil
from pathlib import Path

import pytest

from beit.preflight import space
from beit.preflight.findings import failed, told
from beit.preflight.machine import Machine, check_machine, check_precision
from beit.preflight.rates import Reference, compare
from beit.preflight.space import Weights

PAPER = Reference(2048, 1.5e-3, "experiment=pretrain/base_300ep")


def machine(flags=(), gpus=(), cores=4, memory=10**9, gpu_memory=0):
    return Machine(cores, frozenset(flags), tuple(gpus), memory, gpu_memory)


@pytest.mark.parametrize(
    ("batch", "lr", "level"),
    [
        (2048, 1.5e-3, "ok"),
        (512, 1.5e-3, "warn"),  # what cost two reproductions 5 to 7 mIoU
        (2048, 7.5e-4, "warn"),
        (512, 7.5e-4, "ok"),  # square root, as the authors advise
        (512, 3.75e-4, "ok"),  # linear
        (512, 5e-4, "ok"),  # between them
        (512, 1e-3, "warn"),
        (512, 1e-4, "warn"),
        (8192, 3e-3, "ok"),
        (8192, 6e-3, "ok"),
        (8192, 1e-2, "warn"),
        (512, 7.54e-4, "ok"),  # rounded by hand
    ],
)
def test_a_batch_is_compared_with_its_rate(batch, lr, level):
    assert compare(batch=batch, lr=lr, reference=PAPER).level == level


def test_the_warning_has_the_arithmetic():
    text = compare(batch=512, lr=1.5e-3, reference=PAPER).text
    # by hand: a quarter of the batch; half the rate, or a quarter of it
    for part in ("the batch was changed and the rate was not", "= 0.00075", "= 0.000375"):
        assert part in text
    assert "512/2048" in text
    assert PAPER.source in text


@pytest.mark.parametrize(
    ("precision", "on_gpu", "flags", "gpus", "level"),
    [
        ("bf16-mixed", False, ["avx2", "amx_bf16"], [], "ok"),
        ("bf16-mixed", False, ["avx512_bf16"], [], "ok"),
        ("bf16-mixed", False, ["avx2", "avx512f"], [], "warn"),
        ("bf16-true", False, [], [], "warn"),
        ("32-true", False, [], [], "ok"),
        ("16-mixed", False, ["amx_bf16"], [], "warn"),
        ("bf16-mixed", True, [], [(8, 0), (9, 0)], "ok"),
        ("bf16-mixed", True, ["amx_bf16"], [(9, 0), (7, 5)], "warn"),
        ("16-mixed", True, [], [(7, 0)], "ok"),
    ],
)
def test_precision_needs_its_units(precision, on_gpu, flags, gpus, level):
    found = check_precision(precision, on_gpu=on_gpu, machine=machine(flags, gpus))
    assert found.level == level


@pytest.mark.parametrize(
    ("accelerator", "processes", "workers", "there", "levels"),
    [
        ("cpu", 1, 4, {}, ["ok", "ok"]),
        ("cpu", 1, 5, {}, ["ok", "warn"]),
        ("cpu", 5, 0, {}, ["warn", "ok"]),
        ("cpu", 1, 0, {"gpus": [(8, 0)]}, ["warn", "ok"]),
        ("gpu", 1, 2, {}, ["error", "ok"]),
        ("gpu", 2, 2, {"gpus": [(8, 0)]}, ["error", "ok"]),
        ("gpu", 2, 2, {"gpus": [(8, 0)] * 2}, ["ok", "ok"]),
        ("auto", 2, 3, {"gpus": [(8, 0)] * 2}, ["ok", "warn"]),
    ],
)
def test_devices_and_workers_against_what_is_there(accelerator, processes, workers, there, levels):
    trainer = {"accelerator": accelerator, "precision": "32-true"}
    arguments = {"processes": processes, "workers": workers, "machine": machine(**there)}
    found = {f.check: f for f in check_machine(trainer, **arguments)}
    assert [found["devices"].level, found["workers"].level] == levels


def test_the_workers_that_are_proposed_fit():
    for cores in range(1, 9):
        for processes in range(1, 4):
            arguments = {"processes": processes, "machine": machine(cores=cores)}
            trainer = {"accelerator": "cpu", "precision": "32-true"}
            *_, found = check_machine(trainer, workers=cores + 1, **arguments)
            proposed = int(found.text.rpartition("=")[2])
            *_, again = check_machine(trainer, workers=proposed, **arguments)
            assert again.level == "ok"


def test_memory_and_disk_are_sums(tmp_path: Path):
    weights = Weights(total=1000, trained=700, averaged=False)
    assert weights.in_checkpoint == 4 * (1000 + 2 * 700)
    assert weights.state == 4 * (1000 + 3 * 700)
    averaged = Weights(total=1000, trained=700, averaged=True)
    assert averaged.in_checkpoint - weights.in_checkpoint == 4 * 1000
    options = {"activations": 600, "where": "here"}
    levels = [
        space.check_memory(weights, copies=copies, available=available, **options).level
        for copies, available in ((1, 20_000), (1, 13_500), (1, 12_999), (2, 20_000), (1, 0))
    ]
    assert levels == ["ok", "warn", "error", "error", "ok"]
    free = shutil.disk_usage(tmp_path).free
    huge = Weights(total=free // 12, trained=free // 12, averaged=False)  # 12 bytes each
    levels = [
        space.check_disk(huge, kept=kept, folder=tmp_path / "not" / "yet").level for kept in (2, 3)
    ]
    assert levels[-1] == "error"
    assert space.check_disk(weights, kept=3, folder=tmp_path).level == "ok"
    assert "x (3 kept + 1 being written)" in space.check_disk(huge, kept=3, folder=tmp_path).text


def test_a_token_cache_is_two_bytes_a_token(tmp_path: Path):
    found = space.check_cache(images=1437, views=3, tokens=64, folder=tmp_path / "cache")
    assert found.level == "ok"
    assert f"= {1437 * 3 * 64 * 2 / 1000:.3g} kB" in found.text
    images = shutil.disk_usage(tmp_path).free
    full = space.check_cache(images=images, views=1, tokens=64, folder=tmp_path / "cache")
    assert full.level == "error"


def test_small_images_are_told():
    sizes = {"image_size": (224, 224), "patch_size": 16}
    *_, found = space.check_patches([(32, 40)] * 3, **sizes)
    assert found.level == "warn"
    assert "enlarged 7.0 times" in found.text
    patches, found = space.check_patches([(300, 400)], **sizes)
    assert (patches.level, found.level) == ("ok", "ok")
    assert "14x14 = 196" in patches.text


def test_a_mistake_is_one_finding_among_others():
    from beit.errors import UserError

    found = []
    with told(found, "data"):
        raise UserError("no such\nfolder")
    assert [(f.level, f.check, f.text) for f in found] == [("error", "data", "no such folder")]
    assert failed(found)

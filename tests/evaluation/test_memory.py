"""How much memory inference takes, and what is said where there is too little of it."""

import subprocess
import sys

import pytest
import torch

from beit.errors import UserError
from beit.evaluation import memory
from beit.evaluation.memory import attention_bytes, check_forward, free_bytes, told_if_memory_ends
from beit.models.vit import VisionTransformer

LIMITED = """
import resource, sys, torch
from torch import nn
from beit.evaluation import windows
torch.set_num_threads(1)
torch.manual_seed(0)
windows.BAND_BYTES = {band}
network = nn.Conv2d(3, 150, kernel_size=4, stride=4)
slide = windows.{kind}({window}, stride={window} * 2 // 3, windows_per_pass=2{scales})
image, size = torch.randn(3, *{given}), {size}
with torch.inference_mode():
    slide(network, image[:, :64, :64], (64, 64))  # what is loaded with the first call
    there = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (there + {limit}, there + {limit}))
    ids = slide(network, image, size)
assert ids.shape == size and len(ids.unique()) > 50
"""

SCALES = ", short_side='original', ratios=(1, 2), flip=True"


@pytest.mark.parametrize(
    ("band", "window", "given", "size", "limit", "scales"),
    [
        # 360 MB of logits at either size, in a quarter of that
        (2**22, 128, (128, 171), (600, 1000), 90 * 2**20, ""),
        (2**22, 128, (600, 1000), (600, 1000), 90 * 2**20, ""),
        # four views that are 72 MB as pictures; 32 MB of their logits are kept at a time
        (2**20, 48, (600, 1000), (200, 333), 70 * 2**20, SCALES),
        # 7.2 GB of logits in 1 GiB: a photograph of 4000x3000, as ADE20K's recipes resize it
        pytest.param(2**26, 512, (512, 683), (3000, 4000), 2**30, "", marks=pytest.mark.slow),
    ],
)
def test_memory_is_bounded(band, window, given, size, limit, scales):
    sizes = {"band": band, "window": window, "given": given, "size": size, "limit": limit}
    kind = "MultiScale" if scales else "SlidingWindow"
    code = LIMITED.format(kind=kind, scales=scales, **sizes)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.fixture
def backbone():
    with torch.device("meta"):
        return VisionTransformer(
            (24, 40), 8, width=22, depth=2, num_heads=2, absolute_position=False,
            relative_position="none", layer_scale=0.0, drop_path_rate=0.0, mask_token=False,
            final_norm=False, init_cut=2.0,
        )  # fmt: skip


def test_a_window_that_memory_does_not_allow_is_refused_in_one_line(backbone, monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda device: 2**30)
    cpu = torch.device("cpu")
    check_forward(backbone, (240, 400), 4, cpu)
    with pytest.raises(UserError, match=r"4 windows of 800x1600 px.*needs 14\.\d GiB") as caught:
        check_forward(backbone, (800, 1600), 4, cpu)
    assert "\n" not in str(caught.value)
    assert "windows_per_pass" in str(caught.value)


def test_attention_by_hand():
    # 1601 tokens (640 px), 12 heads: the float32 bias, and scores and probabilities in bf16
    assert attention_bytes(1601, 12, 1, torch.device("cuda")) == 4 * 12 * 1601**2
    assert attention_bytes(1601, 12, 3, torch.device("cpu")) == (4 + 3 * 4) * 12 * 1601**2


def test_free_memory_is_known_on_linux():
    free = free_bytes(torch.device("cpu"))
    assert free is None or 2**20 < free < 2**50


def test_an_allocation_that_fails_is_a_mistake_and_other_faults_are_not():
    with pytest.raises(UserError, match=r"1 window of 24x40 px.*memory is exhausted"):
        with told_if_memory_ends((24, 40), 1):
            torch.empty(2**60)
    with pytest.raises(RuntimeError, match="other"):
        with told_if_memory_ends((24, 40), 1):
            raise RuntimeError("other")

import subprocess
import sys
from pathlib import Path

import pytest

from beit.memory import _left_by_groups

PROGRAM = """
import resource, sys
from beit.memory import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
import torch

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

for _ in range(3):
    torch.ones(50, 2**18)
before = faults()
for _ in range(20):
    torch.ones(50, 2**18)
print(faults() - before)
"""


def page_faults(word: str) -> int:
    command = [sys.executable, "-c", PROGRAM, word]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="it is glibc's malloc that is told")
def test_a_tensor_gets_the_pages_of_the_one_before() -> None:
    # 20 tensors of 50 MiB: by default the kernel hands out 12,800 pages anew for each of them
    assert page_faults("keep") < page_faults("default") / 2


def test_a_control_group_bounds_the_memory(tmp_path: Path) -> None:
    inner = tmp_path / "root" / "slurm" / "job"
    inner.mkdir(parents=True)
    bounds = {inner: ("1000", "700", "100"), inner.parent: ("900", "800", "50")}
    bounds[tmp_path / "root"] = ("max", "5000", "0")
    for folder, (bound, used, files) in bounds.items():
        (folder / "memory.max").write_text(f"{bound}\n")
        (folder / "memory.current").write_text(f"{used}\n")
        (folder / "memory.stat").write_text(f"anon 7\ninactive_file {files}\nactive_file 9\n")
    membership = tmp_path / "cgroup"
    membership.write_text("4:memory:/elsewhere\n0::/slurm/job\n")
    assert list(_left_by_groups(membership, tmp_path / "root")) == [400, 150]
    membership.write_text("0::/not/to/be/seen\n")
    assert not list(_left_by_groups(membership, tmp_path / "root"))
    assert not list(_left_by_groups(tmp_path / "none", tmp_path / "root"))

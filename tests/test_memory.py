import subprocess
import sys

import pytest

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

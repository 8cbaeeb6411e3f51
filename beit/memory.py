"""How much memory is free, and how the process handles that of freed tensors on the CPU."""

import ctypes
import sys
from collections.abc import Iterator
from pathlib import Path

_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8  # of glibc's malloc.h


def free_memory() -> int | None:
    """Bytes that new tensors on the CPU can have; None where the system does not tell.

    What the machine has, or the least that a control group (v2) of the process leaves, which is
    how containers and Slurm bound memory.
    """
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    available = [int(line.split()[1]) * 2**10 for line in lines if line.startswith("MemAvailable:")]
    groups = _left_by_groups(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))
    return min([*available, *groups], default=None)


def _left_by_groups(membership: Path, root: Path) -> Iterator[int]:
    """Bytes that each control group above the process still allows, where it has a bound."""
    try:
        lines = membership.read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for path in (line[3:].lstrip("/") for line in lines if line.startswith("0::")):
        folder = root / path
        while folder.is_relative_to(root):
            try:
                bound, used = ((folder / f"memory.{n}").read_text() for n in ("max", "current"))
                kept = (folder / "memory.stat").read_text(encoding="ascii").split()
            except OSError:  # the root has no bound, and a container may not see its own path
                bound = "max"
            if bound.strip() != "max":
                # files that were read count as used, and are given up first
                files = int(kept[kept.index("inactive_file") + 1])
                yield max(0, int(bound) - int(used) + files)
            folder = folder.parent


def keep_freed_memory() -> bool:
    """Let glibc's malloc keep what was freed for the next tensor; False where there is no glibc.

    By default it maps each large tensor anew and gives it back at once, so that every step of a
    training pays for the same pages again: the kernel clears them, and a virtual machine's host
    may have a word in it too. Memory then stays at its peak, which a training reaches in each step
    anyway. To be called before the process has threads; and by the CPU's users alone, for CUDA
    tensors have an allocator of their own.
    """
    if sys.platform != "linux":
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return False
    # a single arena: the others, which threads would get, cannot hold more than 64 MiB in a piece
    settings = {_ARENA_MAX: 1, _MMAP_MAX: 0, _TRIM_THRESHOLD: -1}
    return all(libc.mallopt(name, value) == 1 for name, value in settings.items())

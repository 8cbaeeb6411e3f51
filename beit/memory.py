"""How much memory is free, and how the process handles that of freed tensors on the CPU."""

import ctypes
import sys
from pathlib import Path

_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8  # of glibc's malloc.h


def free_memory() -> int | None:
    """Bytes that new tensors on the CPU can have; None where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    kibibytes = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(kibibytes[0]) * 2**10 if kibibytes else None


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

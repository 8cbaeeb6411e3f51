"""Randomness as a function of (seed, epoch, sample index), and of nothing else.

The same run on 0 or 8 workers, on 1 or 4 ranks, fresh or resumed, sees the same pixels and masks.
"""

import contextlib
import hashlib
import random
from collections.abc import Iterator

import numpy as np
import torch


def sample_key(seed: int, epoch: int, index: int, stream: str) -> int:
    """A 64-bit key; each stream ("views", "mask", ...) is independent of the others."""
    text = f"{stream}/{seed}/{epoch}/{index}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def sample_rng(seed: int, epoch: int, index: int, stream: str) -> random.Random:
    """The generator of one sample's draws. Switching the masking does not change the crops."""
    return random.Random(sample_key(seed, epoch, index, stream))


@contextlib.contextmanager
def keyed_global_rng(seed: int, epoch: int, index: int, stream: str = "global") -> Iterator[None]:
    """Seeds the global generators of Python, NumPy and torch's CPU; puts them back afterwards.

    For transforms of timm and torchvision, which draw from the globals.
    """
    key = sample_key(seed, epoch, index, stream)
    # default_generator, not torch.manual_seed: that one also reaches for CUDA, in a worker
    saved = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    random.seed(key)
    np.random.seed(key & 0xFFFFFFFF)
    torch.default_generator.manual_seed(key & 0x7FFFFFFFFFFFFFFF)
    try:
        yield
    finally:
        random.setstate(saved[0])
        np.random.set_state(saved[1])
        torch.default_generator.set_state(saved[2])

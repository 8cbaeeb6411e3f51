"""Contenders in alternation, so that a busy machine slows all alike."""

import gc
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch

Step = Callable[[], object]


def alternate(
    contenders: Mapping[str, Callable[[], float]], *, rounds: int, warmup: int = 1
) -> dict[str, list[float]]:
    """Seconds of `rounds` calls of each; the order rotates by one from round to round."""
    names = list(contenders)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    gc.collect()
    gc.freeze()  # what is there already need not be looked through again before each call
    for turn in range(warmup + rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            elapsed = contenders[name]()
            if turn >= warmup:
                seconds[name].append(elapsed)
    gc.unfreeze()
    return seconds


def timed(steps: Mapping[str, Step]) -> dict[str, Callable[[], float]]:
    """For each step what runs it and returns its seconds."""
    return {name: lambda step=step: seconds_alone(step) for name, step in steps.items()}


def seconds_alone(step: Step) -> float:
    """Without what the one before has left to be collected."""
    gc.collect()
    return seconds_of(step)


def seconds_of(step: Step) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


@contextmanager
def threads(count: int) -> Iterator[None]:
    """With so many threads of torch."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)

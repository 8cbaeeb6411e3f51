"""What the machine has against what the trainer asks of it: devices, cores, bf16 units."""

import os
import platform
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from beit.memory import free_memory
from beit.preflight.findings import Finding

# instructions that multiply bf16: AMX and AVX-512 on x86, the same by its own name on ARM
_BF16_UNITS = ("amx_bf16", "avx512_bf16", "bf16")
_ON_GPU = ("gpu", "cuda")


@dataclass(frozen=True)
class Machine:
    """This machine, as far as training is concerned."""

    cores: int
    cpu_flags: frozenset[str]
    gpus: tuple[tuple[int, int], ...]  # compute capability of each
    memory: int  # bytes that programs may still take
    gpu_memory: int  # bytes of the smallest GPU; 0 where there is none

    @classmethod
    def here(cls) -> "Machine":
        import torch

        count = torch.cuda.device_count()
        properties = [torch.cuda.get_device_properties(number) for number in range(count)]
        affinity = getattr(os, "sched_getaffinity", None)
        return cls(
            cores=len(affinity(0)) if affinity else os.cpu_count() or 1,
            cpu_flags=frozenset(_cpu_flags()),
            gpus=tuple((found.major, found.minor) for found in properties),
            memory=_available_memory(),
            gpu_memory=min((found.total_memory for found in properties), default=0),
        )


def check_machine(
    trainer: dict[str, Any], *, processes: int, workers: int, machine: Machine
) -> Iterator[Finding]:
    """Findings on devices, precision and workers.

    Args:
        trainer: arguments of the Trainer.
        processes: of this machine, one for each device.
        workers: that read images, of each process.
    """
    on_gpu = uses_gpu(trainer, machine)
    yield _devices(processes, on_gpu, machine)
    yield check_precision(str(trainer.get("precision")), on_gpu=on_gpu, machine=machine)
    text = f"{_processes(processes)} with {workers} workers each on {machine.cores} cores"
    if processes * workers > machine.cores:
        fitting = machine.cores // processes
        text += f": they wait for each other; say loader.num_workers={fitting}"
        yield Finding("warn", "workers", text)
    else:
        yield Finding("ok", "workers", text)


def uses_gpu(trainer: dict[str, Any], machine: Machine) -> bool:
    accelerator = trainer.get("accelerator")
    return accelerator in _ON_GPU or (accelerator == "auto" and bool(machine.gpus))


def _devices(processes: int, on_gpu: bool, machine: Machine) -> Finding:
    there = len(machine.gpus)
    if not on_gpu:
        spare = f"; {there} GPUs stay unused: say trainer=gpu" if there else ""
        text = f"{_processes(processes)} on {machine.cores} cores{spare}"
        return Finding("warn" if spare or processes > machine.cores else "ok", "devices", text)
    if processes > there:
        mend = f"say trainer.devices={there}" if there else "say trainer=cpu"
        text = f"{processes} GPUs are asked for and {there} are here: {mend}"
        return Finding("error", "devices", text)
    return Finding("ok", "devices", f"{processes} of {there} GPUs")


def _processes(count: int) -> str:
    return f"{count} process" + ("es" if count > 1 else "")


def check_precision(precision: str, *, on_gpu: bool, machine: Machine) -> Finding:
    """Whether the units that the precision is meant for exist."""
    if precision.startswith("bf16"):
        slow = [gpu for gpu in machine.gpus if gpu < (8, 0)] if on_gpu else []
        units = [flag for flag in _BF16_UNITS if flag in machine.cpu_flags]
        if on_gpu and slow:
            text = (
                f"{precision} on a GPU of capability {slow[0][0]}.{slow[0][1]}, which has no bf16 "
                "units: it is emulated; say trainer.precision=16-mixed"
            )
            return Finding("warn", "precision", text)
        if not on_gpu and not units:
            text = (
                f"{precision} on a processor without bf16 units: it is emulated, and slow; say "
                "trainer.precision=32-true"
            )
            return Finding("warn", "precision", text)
        if not on_gpu:
            return Finding("ok", "precision", f"{precision} by {', '.join(units)}")
    if precision.startswith("16") and not on_gpu:
        text = f"{precision} is for GPUs, a processor takes bf16: say trainer.precision=bf16-mixed"
        return Finding("warn", "precision", text)
    return Finding("ok", "precision", precision)


def _cpu_flags() -> Collection[str]:
    """The instructions that Linux lists; elsewhere none are known."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ()
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return value.split()
    return ()


def _available_memory() -> int:
    if (free := free_memory()) is not None:
        return free
    pages = os.sysconf("SC_PHYS_PAGES") if platform.system() != "Windows" else 0
    return pages * os.sysconf("SC_PAGE_SIZE") if pages > 0 else 0

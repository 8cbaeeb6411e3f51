"""Lightning's way to the disk: our file format in place of torch.save and pickle."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO
from torch import Tensor

from beit.checkpoints.errors import NonFiniteWeights
from beit.checkpoints.file import read_file, write_file
from beit.checkpoints.plain import split
from beit.files import local_path

# what may hold numbers that are no weights: scores, counters
_NOT_WEIGHTS = ("callbacks", "loops", "beit", "epoch_metrics")


class CheckpointFiles(CheckpointIO):
    """Saves and loads checkpoints as verified safetensors files on local paths.

    Args:
        on_load: what is done to a checkpoint before Lightning restores it. A run that goes on with
            another number of processes has its counters rewritten there.
    """

    def __init__(self, on_load: Callable[[dict[str, Any]], dict[str, Any]] | None = None) -> None:
        self.on_load = on_load

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Write a checkpoint; see `write_file`. Raises NonFiniteWeights, and writes nothing."""
        assert storage_options is None, "local files have no options"
        weights = {key: value for key, value in checkpoint.items() if key not in _NOT_WEIGHTS}
        if names := non_finite(split(weights)[1]):
            raise NonFiniteWeights(path, names)
        write_file(path, checkpoint)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint onto the CPU, verified; there is no way to load anything but data."""
        checkpoint = read_file(path)
        return self.on_load(checkpoint) if self.on_load else checkpoint

    def remove_checkpoint(self, path: str | Path) -> None:
        local_path(path).unlink(missing_ok=True)


def non_finite(tensors: dict[str, Tensor]) -> list[str]:
    """The names of those with NaN or infinite numbers. One synchronisation for all of a device."""
    names, flags = [], []
    for name, tensor in tensors.items():
        if tensor.numel() and (tensor.is_floating_point() or tensor.is_complex()):
            values = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
            values = values.float() if values.element_size() == 1 else values  # 8-bit floats
            # NaN wins over every number in a minimum and a maximum; no tensor of flags is made
            names.append(name)
            flags.append(torch.stack(torch.aminmax(values)).isfinite().all())
    if not flags:
        return []
    finite = torch.stack([flag.to(flags[0].device) for flag in flags]).cpu()
    return [name for name, fine in zip(names, finite.tolist(), strict=True) if not fine]

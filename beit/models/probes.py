"""Linear classifiers on the outputs of blocks, one beside the other."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from beit.errors import UserError


class LayerProbes(nn.Module):
    """For each layer a Linear from CLS and the mean of the patch tokens, side by side, to logits.

    Weights start normal with deviation 0.01, biases at 0 (the released linear evaluation).

    Args:
        width: D of the tokens.
        num_classes: K.
        depth: layers that the backbone has.
        layers: counted from 1; "all" of them.

    Raises:
        UserError: a layer that the backbone does not have.
    """

    best: Tensor

    def __init__(
        self, width: int, num_classes: int, *, depth: int, layers: Sequence[int] | str = "all"
    ) -> None:
        super().__init__()
        chosen = list(range(1, depth + 1)) if layers == "all" else layers
        if isinstance(chosen, str) or not chosen or not set(chosen) <= set(range(1, depth + 1)):
            raise UserError(
                f"layers {layers}: this network has layers 1 to {depth}, counted from 1; name some "
                "of them in a list, or say all"
            )
        self.layers = tuple(sorted(set(chosen)))
        self.probes = nn.ModuleList(nn.Linear(2 * width, num_classes) for _ in self.layers)
        for probe in self.probes:
            nn.init.normal_(probe.weight, std=0.01)  # type: ignore[arg-type]
            nn.init.zeros_(probe.bias)  # type: ignore[arg-type]
        # which of them did best in the last validation; until there was one, the last
        self.register_buffer("best", torch.tensor(len(self.layers) - 1))

    def forward(self, outputs: Sequence[Tensor]) -> Tensor:
        """Outputs (B,1+N,D) of the `layers`, in their order, without a norm -> logits (L,B,K)."""
        return torch.stack(
            [
                probe(torch.cat([tokens[:, 0], tokens[:, 1:].mean(dim=1)], dim=1))
                for probe, tokens in zip(self.probes, outputs, strict=True)
            ]
        )

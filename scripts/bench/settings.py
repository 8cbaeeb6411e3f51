"""How the benchmark is run, and the sizes of what it measures."""

from dataclasses import dataclass
from pathlib import Path

PATCH_SIZE, VOCAB_SIZE, TOKEN_STRIDE = 16, 8192, 8
DROP_PATH, LAYER_SCALE = 0.1, 0.1  # as in the released pretraining
MEAN = STD = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class Shape:
    """A model and its batch."""

    image_size: int
    width: int
    depth: int
    num_heads: int
    batch_size: int

    @property
    def grid(self) -> tuple[int, int]:
        side = self.image_size // PATCH_SIZE
        return side, side

    @property
    def token_image_size(self) -> int:
        return self.grid[0] * TOKEN_STRIDE

    def __str__(self) -> str:
        name = next((n for n, size in SIZES.items() if size == self._size), f"width {self.width}")
        return f"{name}, {self.image_size} px, batch {self.batch_size}"

    @property
    def _size(self) -> tuple[int, int, int]:
        return self.width, self.depth, self.num_heads


# width, depth, heads
SIZES = {
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
}
_QUICK = (32, 2, 2)


@dataclass(frozen=True)
class Settings:
    """What the command line says.

    Args:
        rounds: timed calls of each contender.
        threads: of torch.
        quick: sizes that only show that a row runs.
        images: a folder of photographs, or of parquet files; "": scikit-learn's two.
        unilm: a checkout of microsoft/unilm; "": the original is written with timm's blocks.
    """

    rounds: int
    threads: int
    quick: bool = False
    images: str = ""
    unilm: str = ""

    def shape(self, name: str = "base", *, image_size: int = 224, batch_size: int = 16) -> Shape:
        """A model by name and its batch; in the quick form always the smallest there is."""
        if self.quick:
            return Shape(48, *_QUICK, batch_size=min(batch_size, 3))
        return Shape(image_size, *SIZES[name], batch_size=batch_size)

    def number(self, full: int, quick: int) -> int:
        """A size of a row in the one form and the other."""
        return quick if self.quick else full

    @property
    def unilm_folder(self) -> Path | None:
        """Where the checkout's first BEiT lies."""
        return Path(self.unilm).expanduser() / "beit" if self.unilm else None

"""Where the files of a segmentation go, with a network that needs no training."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from beit.data.segmentation_views import SegmentationEvalTransform
from beit.errors import UserError
from beit.segmenter import ImageSegmenter, _names


class Everywhere(nn.Module):
    def predict(self, image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        return torch.ones(size, dtype=torch.int16)


def segment(images: Path, output: Path, **options: Any) -> list[dict[str, Any]]:
    segmenter = ImageSegmenter(
        Everywhere(),
        SegmentationEvalTransform(short_side="original"),
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        classes=["a", "b"],
        palette=np.zeros((2, 3), dtype=np.uint8),
    )
    return list(segmenter.predict(images, output=output, **{"overwrite": False, **options}))


def photograph(path: Path) -> bytes:
    Image.new("RGB", (7, 5), (200, 100, 50)).save(path)
    return path.read_bytes()


def test_the_images_themselves_are_never_written_over(tmp_path: Path) -> None:
    before = photograph(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"a\.png is one of the images"):
        segment(tmp_path, tmp_path, overwrite=True)
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(UserError, match=r"a\.png is one of the images"):
        segment(tmp_path, tmp_path / "link", overwrite=True)
    assert (tmp_path / "a.png").read_bytes() == before


def test_two_images_never_share_a_file(tmp_path: Path) -> None:
    photograph(tmp_path / "a.jpg")
    photograph(tmp_path / "a.overlay.jpg")  # its ids would lie where the other's overlay does
    with pytest.raises(UserError, match=r"a\.overlay\.png would be made of two images"):
        segment(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_naming_takes_no_more_than_a_look_at_each() -> None:
    paths = [Path(f"images/{number}.jpg") for number in range(20_000)]
    began = time.process_time()
    _names(paths, Path("images"), Path("out"))
    assert time.process_time() - began < 5  # a comparison of all pairs takes minutes


class Reddest(nn.Module):
    """Class 1 where the red is above the mean, and the images that it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[torch.Tensor] = []

    def predict(self, image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        self.seen.append(image)
        assert size == image.shape[1:]
        return (image[0] > 0).to(torch.int16)


def test_the_network_sees_what_it_saw_in_training(tmp_path: Path) -> None:
    """And what it says of each pixel is what the files say of it."""
    pixels = np.random.default_rng(3).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    mean, std = np.array([0.4, 0.5, 0.6]), np.array([0.1, 0.2, 0.3])
    segmenter = ImageSegmenter(
        network := Reddest(),
        SegmentationEvalTransform(short_side="original"),
        mean=mean.tolist(),
        std=std.tolist(),
        classes=["a", "b"],
        palette=np.array([[0, 0, 200], [100, 0, 0]], dtype=np.uint8),
    )
    (record,) = segmenter.predict(tmp_path / "a.png", output=tmp_path / "out", overwrite=False)
    normal = torch.from_numpy(((pixels / 255 - mean) / std).transpose(2, 0, 1)).float()
    torch.testing.assert_close(network.seen[0], normal)
    red = pixels[..., 0] > 0.4 * 255
    assert np.array_equal(np.asarray(Image.open(record["files"]["ids"])), red)
    assert {of["class"]: of["pixels"] for of in record["areas"]} == {
        "a": int((~red).sum()),
        "b": int(red.sum()),
    }
    colours = np.where(red[..., None], [100, 0, 0], [0, 0, 200])
    drawn = np.asarray(Image.open(record["files"]["overlay"])).astype(float)
    assert np.abs(drawn - (pixels + colours) / 2).max() <= 1

"""Colours, legend and bars of a segmentation's pictures."""

import numpy as np
import torch
from matplotlib.colors import to_rgb

from beit.callbacks.figures import bars, picture_grid, save_figure
from beit.callbacks.segmentation import SegmentationPictures, coloured, shrunk

PALETTE = np.array([[0, 0, 255], [0, 255, 0], [255, 0, 0]], dtype=np.uint8)


def test_classes_have_their_colours_and_no_label_is_white():
    ids = torch.tensor([[0, 1], [2, -1]], dtype=torch.int16)
    picture = coloured(ids, PALETTE)
    assert picture.shape == (3, 2, 2)
    for (row, column), colour in {
        (0, 0): (0, 0, 1), (0, 1): (0, 1, 0), (1, 0): (1, 0, 0), (1, 1): (1, 1, 1)
    }.items():  # fmt: skip
        assert picture[:, row, column].tolist() == list(colour)


def test_a_large_map_is_thinned_and_no_class_invented():
    ids = torch.randint(5, (961, 700))
    small = shrunk(ids)
    assert small.shape == (321, 234)
    assert torch.equal(small, ids[::3, ::3])
    assert torch.equal(shrunk(ids[:480, :480]), ids[:480, :480])


def test_the_legend_names_what_is_there(tmp_path):
    class Data:
        palette, classes = PALETTE, ["sky", "sea", "sun"]

    class Trainer:
        datamodule = Data()

    pictures = SegmentationPictures(str(tmp_path), num_images=1)
    pictures._ids = torch.tensor([2, 2, -1, 0])
    assert pictures.legend(Trainer()) == [
        ("sky", (0, 0, 1)), ("sun", (1, 0, 0)), ("no label", (1, 1, 1))
    ]  # fmt: skip
    pictures._ids = torch.tensor([1])
    assert pictures.legend(Trainer()) == [("sea", (0, 1, 0))]


def test_pictures_of_different_sizes_stand_in_one_grid(tmp_path):
    columns = {"a": [torch.rand(3, 24, 40), torch.rand(3, 60, 20)], "b": torch.rand(2, 3, 8, 8)}
    figure = picture_grid(columns, title="t", legend=[("x", (1.0, 0.0, 0.0))])
    assert len(figure.axes) == 4
    (label,) = figure.legends[0].get_texts()
    assert label.get_text() == "x"
    (patch,) = figure.legends[0].get_patches()
    assert to_rgb(patch.get_facecolor()) == (1.0, 0.0, 0.0)
    assert save_figure(figure, tmp_path / "grid.png").shape[2] == 3


def test_bars_are_as_long_as_their_values():
    figure = bars([("sky", 0.25), ("sea", None), ("sun", 1.0)], title="t", mean=0.6)
    (panel,) = figure.axes
    assert [bar.get_width() for bar in panel.patches] == [0.25, 0.0, 1.0]
    assert [tick.get_text() for tick in panel.get_yticklabels()] == ["sky", "sea", "sun"]
    assert [text.get_text() for text in panel.texts] == ["0.250", "none", "1.000"]

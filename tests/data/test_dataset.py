import numpy as np
import pytest
import torch
from PIL import Image

from beit.data.batches import TwoViewBatch
from beit.data.dataset import Collate, KeyedDataset, TwoViewSample
from beit.data.masking import BlockwiseMasking, RandomMasking
from beit.data.sources import UnreadableImage
from beit.data.views import TwoViewTransform
from beit.errors import UserError


class Pictures:
    """Noise images; those in `broken` cannot be read."""

    classes = None
    labels = None

    def __init__(self, size=13, broken=()):
        self.size, self.broken = size, set(broken)

    def __len__(self):
        return self.size

    def load(self, index):
        if index in self.broken:
            raise UnreadableImage(self.name(index), "truncated")
        rng = np.random.default_rng(index)
        return Image.fromarray(rng.integers(0, 256, (30, 50, 3), dtype=np.uint8)), None

    def name(self, index):
        return f"picture {index}"


def dataset(broken=(), masking=None, seed=3):
    views = TwoViewTransform(image_size=(24, 40), token_image_size=(12, 20))
    masking = masking or BlockwiseMasking((3, 5))
    return KeyedDataset(Pictures(broken=broken), TwoViewSample(views, masking), seed=seed)


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.tensors, b.tensors, strict=True))


def test_a_sample_is_a_function_of_seed_epoch_and_index():
    torch.manual_seed(0)
    first = dataset()[2, 7]
    torch.manual_seed(1)
    assert equal(first, dataset()[2, 7])
    assert not equal(first, dataset()[3, 7])
    assert not equal(first, dataset(seed=4)[2, 7])
    assert (first.index, first.failed) == (7, -1)


def test_masks_differ_between_samples_and_epochs():
    masks = [dataset()[epoch, index].tensors[4] for epoch in range(3) for index in range(13)]
    assert len({tuple(mask.flatten().tolist()) for mask in masks}) > 20


def test_masking_does_not_change_the_crops():
    blockwise = dataset()[2, 7].tensors
    at_random = dataset(masking=RandomMasking((3, 5)))[2, 7].tensors
    assert torch.equal(blockwise[0], at_random[0])
    assert torch.equal(blockwise[1], at_random[1])


def test_an_unreadable_image_is_replaced_by_a_fixed_other_one():
    broken = dataset(broken={7, 2})
    sample = broken[0, 7]
    assert sample.failed == 7
    assert sample.index not in (7, 2)
    assert equal(sample, dataset(broken={7, 2})[0, 7])
    assert broken[5, 7].index == sample.index  # whatever the epoch
    assert broken[0, 8].failed == -1


def test_a_source_of_ruins_is_refused():
    with pytest.raises(UserError, match=r"picture 7: truncated.*all unreadable"):
        dataset(broken=range(13))[0, 7]


def test_collation():
    data = dataset(broken={7})
    batch = Collate(TwoViewBatch)([data[0, index] for index in (1, 7, 4)])
    assert isinstance(batch, TwoViewBatch)
    assert batch.images.shape == (3, 3, 24, 40)
    assert batch.images.dtype == torch.uint8
    assert batch.token_images.shape == (3, 3, 12, 20)
    assert batch.mask.shape == (3, 3, 5)
    assert batch.mask.dtype == torch.bool
    assert batch.indices.tolist() == [1, data[0, 7].index, 4]
    assert batch.failed.tolist() == [-1, 7, -1]
    assert batch.indices.dtype == batch.failed.dtype == torch.int64

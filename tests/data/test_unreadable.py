"""Unreadable images: what stands in for them, and the record of a run."""

import logging

import numpy as np
import pytest
from PIL import Image

from beit.data.batches import PixelBatch
from beit.data.dataset import Collate, KeyedDataset, PixelSample
from beit.data.images import UnreadableImage
from beit.data.sampler import GlobalBatchSampler
from beit.data.unreadable import RECORD, UnreadableImages, read_record
from beit.data.views import PixelTransform
from beit.data.workers import WatchedLoader
from beit.errors import UserError

BROKEN = {1, 2, 5, 11, 12, 13, 22}


class Pictures:
    """24 noise images, some of them unreadable."""

    classes = labels = None

    def __len__(self):
        return 24

    def load(self, index):
        if index in BROKEN:
            raise UnreadableImage(self.name(index), "torn")
        rng = np.random.default_rng(index)
        return Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)), None

    def name(self, index):
        return f"picture {index}"


def seen(*, workers, ranks, per_rank, epochs=2, start=0):
    """(epoch, position in it) -> (index, the one it stands in for, pixels); from `start` on."""
    found = {}
    for rank in range(ranks):
        sampler = GlobalBatchSampler(
            24, batch_size=per_rank, rank=rank, world_size=ranks, seed=7, shuffle=True,
            last_batch="drop",
        )  # fmt: skip
        data = KeyedDataset(Pictures(), PixelSample(PixelTransform(image_size=(8, 8))), seed=7)
        options = {"persistent_workers": True} if workers else {}
        loader = WatchedLoader(
            data, batch_sampler=sampler, num_workers=workers, collate_fn=Collate(PixelBatch),
            limit=60.0, **options,
        )  # fmt: skip
        for epoch in range(epochs):
            sampler.set_epoch(epoch)
            sampler.start(start)
            for number, batch in enumerate(loader, start=start):
                first = (number * ranks + rank) * per_rank
                for place, (pixels, index, failed) in enumerate(zip(*batch)):
                    key = epoch, first + place
                    found[key] = int(index), int(failed), pixels.numpy().tobytes()
    return found


def test_the_same_stand_ins_on_any_ranks_and_workers_and_after_a_resume():
    whole = seen(workers=0, ranks=1, per_rank=8)
    assert {failed for _, failed, _ in whole.values()} - {-1} == BROKEN
    assert {index for index, _, _ in whole.values()} == set(range(24)) - BROKEN
    assert seen(workers=2, ranks=1, per_rank=8) == whole
    assert seen(workers=1, ranks=2, per_rank=4) == whole
    resumed = seen(workers=1, ranks=2, per_rank=4, start=2)
    assert resumed == {key: value for key, value in whole.items() if key[1] >= 16}
    stand_ins = {(failed, index) for index, failed, _ in whole.values() if failed >= 0}
    assert len(stand_ins) == len(BROKEN)  # one for each, in every epoch


def test_the_record_survives_and_counts_after_a_resume(tmp_path, caplog):
    first = UnreadableImages(limit=3)
    first.probe(Pictures(), "training", count=2, strict=False)  # 0 and 23: both readable
    first.record_in(tmp_path, rank=0)
    first.meet(Pictures(), "training", 5, "picture 5: torn")
    first.meet(Pictures(), "validation", 5)
    first.meet(Pictures(), "training", 5)
    other = UnreadableImages(limit=3)
    other.record_in(tmp_path, rank=1)
    other.meet(Pictures(), "training", 11)
    with (tmp_path / RECORD).open("a") as file:
        file.write('{"rank": 0, "role": "tr')  # killed, or out of space
    assert [tuple(entry.values()) for entry in read_record(tmp_path / RECORD)] == [
        (0, "training", 5, "picture 5", "torn"),
        (0, "validation", 5, "picture 5", "torn"),
        (1, "training", 11, "picture 11", "torn"),
    ]
    resumed = UnreadableImages(limit=3)
    resumed.record_in(tmp_path, rank=0)
    assert set(resumed.names) == {("training", 5), ("validation", 5)}
    resumed.meet(Pictures(), "training", 1)
    assert read_record(tmp_path / RECORD)[-1]["index"] == 1  # whole, after the torn line
    with pytest.raises(UserError, match="4 unreadable images, more than max_unreadable_images=3"):
        resumed.meet(Pictures(), "training", 2)


def test_what_was_found_before_there_was_a_folder_is_recorded_too(tmp_path):
    images = UnreadableImages(limit=9)
    images.probe(Pictures(), "training", count=24, strict=False)
    images.record_in(tmp_path / "run", rank=0)  # no such folder: told, not raised
    (tmp_path / "run").mkdir()
    images.record_in(tmp_path / "run", rank=0)
    assert {entry["index"] for entry in read_record(tmp_path / "run" / RECORD)} == BROKEN
    images.record_in(tmp_path / "run", rank=0)
    assert len(read_record(tmp_path / "run" / RECORD)) == len(BROKEN)


def test_a_record_that_cannot_be_written_does_not_end_the_run(tmp_path, caplog):
    (tmp_path / RECORD).symlink_to("/dev/full")
    images = UnreadableImages(limit=9)
    images.record_in(tmp_path, rank=0)
    with caplog.at_level(logging.WARNING, "beit"):
        for index in BROKEN:
            images.meet(Pictures(), "training", index)
    assert sum("cannot be written: No space left" in line for line in caplog.messages) == 1
    assert len(images.names) == len(BROKEN)

import json
import multiprocessing
import os
import pickle

import numpy as np
import pytest
import torch

from beit.data.token_cache import TokenCache, TokenCacheFull
from beit.errors import UserError

GRID, VOCAB_SIZE = (3, 5), 13


def cache(folder, **changes):
    options = {
        "images": 7, "views": 2, "grid": GRID, "vocab_size": VOCAB_SIZE,
        "made_of": {"tokenizer": "a" * 64, "seed": 3},
    }  # fmt: skip
    return TokenCache(folder / "train", **(options | changes))


def ids(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCAB_SIZE, (count, *GRID), generator=generator)


@pytest.fixture
def opened(tmp_path):
    found = cache(tmp_path)
    found.open()
    return found


def test_what_was_written_is_read_by_another_process(opened, tmp_path):
    written = ids(3)
    written[0, 0, 0] = 0  # token 0 is a token, not a gap
    opened.write([opened.row(0, 4), opened.row(1, 0), opened.row(1, 6)], written)
    other = cache(tmp_path)
    other.open()
    for row, expected in zip((4, 7, 13), written, strict=True):
        assert np.array_equal(other.read(row), expected)
        assert other.read(row).dtype == np.int32
    assert other.missing().tolist() == [0, 1, 2, 3, 5, 6, 8, 9, 10, 11, 12]
    assert all(other.read(int(row)) is None for row in other.missing())


def test_two_bytes_a_token_at_a_known_place(opened):
    opened.write([9], ids(1))
    stored = np.fromfile(opened.path, "<u2").reshape(14, 15)
    assert opened.path.stat().st_size == 14 * 15 * 2
    assert np.array_equal(stored[9], ids(1).flatten() + 1)
    assert not stored[:9].any()
    assert not stored[10:].any()


def test_a_row_cut_short_counts_as_missing(opened, tmp_path):
    opened.write([2, 3], ids(2))
    with opened.path.open("r+b") as file:  # as a kill, or a page that never reached the disk
        file.seek(2 * 30 + 20)
        file.write(bytes(10))
    other = cache(tmp_path)
    other.open()
    assert other.read(2) is None
    assert other.read(3) is not None


def _write_all(folder, rank):
    found = cache(folder)
    found.open()
    for row in range(rank, 14, 3):
        found.write([row], ids(14)[row : row + 1])
        found.write([0], ids(14)[:1])  # and one that all write


def test_processes_write_side_by_side(tmp_path):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_write_all, args=(tmp_path, rank)) for rank in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    found = cache(tmp_path)
    found.open()
    assert found.missing().size == 0
    assert all(np.array_equal(found.read(row), ids(14)[row]) for row in range(14))


def test_it_travels_to_a_worker_without_its_mapping(opened):
    opened.write([5], ids(1))
    assert opened.read(5) is not None  # mapped
    message = pickle.dumps(opened)
    assert len(message) < 1000
    assert np.array_equal(pickle.loads(message).read(5), ids(1)[0])


@pytest.mark.parametrize(
    "change",
    [
        {"images": 8},
        {"views": 3},
        {"grid": (5, 3)},
        {"vocab_size": 14},
        {"made_of": {"tokenizer": "b" * 64, "seed": 3}},
        {"made_of": {"tokenizer": "a" * 64, "seed": 4}},
        {"made_of": {"tokenizer": "a" * 64}},
    ],
)
def test_other_tokens_are_refused_by_name(opened, tmp_path, change):
    opened.write([5], ids(1))
    before = opened.path.read_bytes()
    other = cache(tmp_path, **change)
    name = next(iter(change)) if "made_of" not in change else "(tokenizer|seed)"
    for attempt in (other.check, other.open):
        with pytest.raises(UserError, match=rf"holds other tokens: {name} was .* and is .*delete"):
            attempt()
    assert opened.path.read_bytes() == before


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "about.json").write_text("[1]")
    with pytest.raises(UserError, match="not a token cache's"):
        cache(tmp_path).check()
    (tmp_path / "train" / "about.json").unlink()
    (tmp_path / "train" / "tokens.u16").write_text("a novel")
    with pytest.raises(UserError, match="not a token cache"):
        cache(tmp_path).check()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="not a token cache"):
        cache(tmp_path / "file").check()


def test_a_damaged_token_is_named(opened):
    opened.write([5], ids(1))
    with opened.path.open("r+b") as file:
        file.seek(5 * 30 + 4)
        file.write(np.uint16(VOCAB_SIZE + 1).tobytes())
    with pytest.raises(UserError, match=r"damaged: image 5 has token 13 of 13"):
        opened.read(5)


def test_a_vocabulary_too_large_for_two_bytes_is_refused(tmp_path):
    cache(tmp_path, vocab_size=65535)
    with pytest.raises(UserError, match="65535 tokens, and this tokenizer has 65536"):
        cache(tmp_path, vocab_size=65536)


def test_a_cache_larger_than_the_disk_is_refused_before_it_is_made(tmp_path):
    free = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize
    huge = cache(tmp_path, images=free // 30 + 1_000_000, views=1)
    with pytest.raises(TokenCacheFull, match=r"still needs .* GB"):
        huge.check()
    assert not any(tmp_path.iterdir())


def test_about_tells_what_it_holds(opened):
    about = json.loads((opened.folder / "about.json").read_text())
    assert about == {
        "format": 1, "images": 7, "views": 2, "grid": [3, 5], "vocab_size": 13,
        "tokenizer": "a" * 64, "seed": 3,
    }  # fmt: skip

import itertools
from collections import Counter

import pytest
from timm.data.distributed_sampler import RepeatAugSampler

from beit.data.sampler import GlobalBatchSampler, epoch_order, tail_sizes
from beit.errors import UserError


def sampler(size=101, **changes):
    options = {
        "batch_size": 4, "rank": 0, "world_size": 1, "accumulate": 3, "seed": 5,
        "shuffle": True, "last_batch": "drop",
    }  # fmt: skip
    return GlobalBatchSampler(size, **(options | changes))


def indices(batches):
    return [index for batch in batches for _, index in batch]


def global_batches(epoch, **changes):
    """The set of samples of each optimizer step, put together from all ranks."""
    world = changes["world_size"]
    ranks = [sampler(rank=rank, **changes) for rank in range(world)]
    for rank in ranks:
        rank.set_epoch(epoch)
    accumulate = changes["accumulate"]
    columns = [list(rank) for rank in ranks]
    steps = len(columns[0]) // accumulate
    return [
        sorted(
            index
            for column in columns
            for batch in column[step * accumulate : (step + 1) * accumulate]
            for _, index in batch
        )
        for step in range(steps)
    ]


def test_micro_batches_are_slices_of_one_permutation():
    order = epoch_order(101, 5, 2)
    for rank in range(2):
        own = sampler(rank=rank, world_size=2)
        own.set_epoch(2)
        for i, batch in enumerate(own):
            begin = (i * 2 + rank) * 4
            assert batch == [(2, index) for index in order[begin : begin + 4]]


def test_a_global_batch_is_the_same_however_it_is_spread():
    expected = global_batches(3, batch_size=12, world_size=1, accumulate=1)
    assert len(expected) == 8
    for batch_size, world_size, accumulate in ((4, 3, 1), (4, 1, 3), (2, 3, 2), (3, 2, 2)):
        spread = {"batch_size": batch_size, "world_size": world_size, "accumulate": accumulate}
        assert global_batches(3, **spread) == expected


def test_training_drops_only_the_last_incomplete_global_batch():
    own = sampler()
    assert len(own) == len(list(own)) == 24
    assert own.steps_per_epoch == 8
    seen = indices(own)
    assert len(set(seen)) == len(seen) == 96


@pytest.mark.parametrize(
    ("batch_size", "world_size", "accumulate"),
    [(12, 1, 1), (4, 3, 1), (4, 1, 3), (2, 3, 2), (1, 2, 6)],
)
def test_a_kept_last_batch_is_dealt_out_once(batch_size, world_size, accumulate):
    # 101 = 8 steps of 12 and 5 left over
    spread = {"batch_size": batch_size, "world_size": world_size, "accumulate": accumulate}
    ranks = [sampler(rank=rank, last_batch="keep", **spread) for rank in range(world_size)]
    dropping = sampler(**spread)
    for rank in [*ranks, dropping]:
        rank.set_epoch(3)
    lists = [list(rank) for rank in ranks]
    assert {len(batches) for batches in lists} == {len(ranks[0])}
    assert ranks[0].steps_per_epoch == 9
    assert lists[0][: 8 * accumulate] == list(dropping)
    assert sorted(index for batches in lists for index in indices(batches)) == list(range(101))
    tails = [batches[8 * accumulate :] for batches in lists]
    assert sorted(index for batches in tails for index in indices(batches)) == sorted(
        epoch_order(101, 5, 3)[96:].tolist()
    )
    sizes = [len(batch) for batches in tails for batch in batches]
    assert 1 <= len(tails[0]) <= accumulate
    assert max(sizes) - min(sizes) <= 1
    assert 1 <= min(sizes) <= max(sizes) <= max(2, batch_size)
    assert tail_sizes(101, batch_size, world_size, accumulate) == [
        len(tails[rank][i]) for i in range(len(tails[0])) for rank in range(world_size)
    ]


def test_nothing_left_over_needs_no_last_step():
    assert list(sampler(96, last_batch="keep")) == list(sampler(96))
    assert tail_sizes(96, 4, 1, 3) == []


def test_fewer_left_over_than_ranks_are_refused():
    with pytest.raises(UserError, match=r"101 training images 5 are left over.*6 devices"):
        sampler(batch_size=2, world_size=6, accumulate=1, last_batch="keep")


def test_order_is_a_permutation_that_depends_on_seed_and_epoch():
    assert sorted(epoch_order(101, 5, 2).tolist()) == list(range(101))
    orders = {tuple(epoch_order(101, s, e)) for s in (5, 6) for e in (0, 1)}
    assert len(orders) == 4
    # written down: a run resumed under another version of NumPy goes on with the same order
    assert epoch_order(7, 5, 2).tolist() == ORDER_OF_7


ORDER_OF_7 = [4, 6, 0, 1, 5, 2, 3]


def test_a_restart_in_the_middle_goes_on_with_what_is_left():
    full, resumed = sampler(), sampler()
    full.set_epoch(2)
    resumed.set_epoch(2)
    resumed.start(9)
    assert list(resumed) == list(full)[9:]
    assert len(resumed) == len(full)  # Lightning counts on the full length
    assert list(resumed) == list(full)[9:]  # asked again: the same
    resumed.set_epoch(2)
    assert list(resumed) == list(full)[9:]
    resumed.set_epoch(3)
    full.set_epoch(3)
    assert list(resumed) == list(full)


def test_an_iterator_keeps_its_epoch():
    own = sampler()
    own.set_epoch(1)
    batches = iter(own)
    own.set_epoch(2)
    assert next(batches)[0][0] == 1


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_evaluation_sees_each_index_once_in_order(world_size):
    options = {"shuffle": False, "last_batch": "even", "accumulate": 1, "world_size": world_size}
    seen = []
    for rank in range(world_size):
        own = sampler(size=17, rank=rank, **options)
        own.set_epoch(4)
        batches = list(own)
        assert len(batches) == len(own)
        assert all(epoch == 0 for batch in batches for epoch, _ in batch)
        seen += indices(batches)
    assert sorted(seen) == list(range(17))
    if world_size == 1:
        assert seen == list(range(17))


@pytest.mark.parametrize(
    ("size", "batch_size", "world_size"),
    [(360, 400, 2), (5, 2, 4), (5, 1, 4), (4, 7, 4), (17, 4, 3), (100, 8, 8), (33, 4, 8)],
)
def test_evaluation_gives_every_rank_as_many_batches(size, batch_size, world_size):
    # without a batch Lightning fails, with fewer than the others DDP's exchange of buffers hangs
    options = {"shuffle": False, "last_batch": "even", "accumulate": 1, "world_size": world_size}
    ranks = [
        list(sampler(size, batch_size=batch_size, rank=rank, **options))
        for rank in range(world_size)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    assert sorted(index for batches in ranks for index in indices(batches)) == list(range(size))
    sizes = {len(batch) for batches in ranks for batch in batches}
    assert 1 <= min(sizes) <= max(sizes) <= max(2, batch_size)
    assert max(sizes) - min(sizes) <= 1


def test_fewer_validation_images_than_ranks_are_refused():
    with pytest.raises(UserError, match=r"^3 validation images.*4 devices"):
        sampler(3, shuffle=False, last_batch="even", accumulate=1, world_size=4)


def test_fewer_samples_than_a_global_batch_are_refused_with_the_numbers():
    with pytest.raises(UserError, match=r"11 training images.*24 \(4 per device x 2.*x 3"):
        sampler(size=11, world_size=2)


@pytest.mark.parametrize("epoch", [0, 2])
def test_repeats_fill_global_batches_as_timms_sampler_does(epoch):
    world, batch = 3, 8
    ranks = [
        sampler(600, rank=rank, world_size=world, batch_size=batch, accumulate=1, repeats=3)
        for rank in range(world)
    ]
    # timm's without its own shuffle, over our order: which of the three draws it does not say
    order = epoch_order(600, 5, epoch)
    theirs = [RepeatAugSampler(range(600), world, rank, shuffle=False) for rank in range(world)]
    theirs = [[order[place] for place in rank] for rank in theirs]
    for rank in ranks:
        rank.set_epoch(epoch)
    columns = [list(rank) for rank in ranks]
    steps = min(len(columns[0]), len(theirs[0]) // batch)
    assert steps == 21  # timm rounds 600 down to 512
    for step in range(steps):
        ours = Counter(index for column in columns for _, index in column[step])
        other = Counter(i for rank in theirs for i in rank[step * batch : (step + 1) * batch])
        assert ours == other
        assert set(ours.values()) == {3}  # a global batch of 24 is a multiple of 3


def test_repeats_are_drawn_differently_in_all_epochs():
    keys = []
    for epoch in range(4):
        own = sampler(96, repeats=3)
        own.set_epoch(epoch)
        keys.append([key for batch in own for key in batch])
        assert len(keys[-1]) == len(own) * 4 == 96
        images = Counter(index for _, index in keys[-1])
        assert list(images) == epoch_order(96, 5, epoch)[:32].tolist()
        assert set(images.values()) == {3}
    every = list(itertools.chain(*keys))
    assert len(set(every)) == len(every)


@pytest.mark.parametrize("last_batch", ["drop", "keep"])
@pytest.mark.parametrize(("batch_size", "world_size", "accumulate"), [(4, 3, 1), (2, 3, 2)])
def test_repeats_are_the_same_however_spread_and_resumed(
    last_batch, batch_size, world_size, accumulate
):
    spread = {"last_batch": last_batch, "repeats": 3}
    whole = sampler(batch_size=12, accumulate=1, **spread)
    spread |= {"batch_size": batch_size, "world_size": world_size, "accumulate": accumulate}
    ranks = [sampler(rank=rank, **spread) for rank in range(world_size)]
    for own in (whole, *ranks):
        own.set_epoch(2)
    per_step = [
        [key for own in ranks for batch in list(own)[i : i + accumulate] for key in batch]
        for i in range(0, len(ranks[0]), accumulate)
    ]
    assert [sorted(step) for step in per_step] == [sorted(batch) for batch in whole]
    full = list(ranks[1])
    ranks[1].start(5)
    assert list(ranks[1]) == full[5:]

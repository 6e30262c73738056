from collections import Counter
from dataclasses import astuple, replace
from itertools import chain, islice

import pytest
from clip_files import record

from stableavatar.data.buckets import EpochPlan, RankSampler, assign
from stableavatar.data.samples import Bucket, Item

SQUARE, WIDE, LONG = Bucket(512, 512, 81), Bucket(832, 480, 81), Bucket(512, 512, 161)
BUCKETS = {SQUARE: [0, 3, 4, 7, 9], WIDE: [1, 2, 5, 6, 8, 10, 11, 12, 13, 14, 15, 16, 17], LONG: [18]}
"""With 12 places a step: one step, one and a bit, one clip."""


def plan(**changes: int) -> EpochPlan:
    return replace(EpochPlan(BUCKETS, seed=5, runs=0, processes=3, batch=2, accumulation=2), **changes)


@pytest.mark.parametrize(
    ("size", "sizes", "expected"),
    [
        ((1920, 1080), ["832x480", "480x832", "512x512"], "832x480"),
        ((1080, 1920), ["832x480", "480x832", "512x512"], "480x832"),
        ((600, 640), ["832x480", "480x832", "512x512"], "512x512"),
        ((64, 48), ["512x512"], "512x512"),
        ((1920, 1080), ["832x480", "1280x720"], "1280x720"),
        ((1279, 719), ["1280x720", "832x480"], "832x480"),
        ((400, 225), ["1280x720", "832x480"], "832x480"),
        ((900, 900), ["768x768", "1024x1024", "512x512"], "768x768"),
    ],
)
def test_a_clip_goes_to_the_nearest_size(size: tuple[int, int], sizes: list[str], expected: str) -> None:
    pairs = [tuple(map(int, name.split("x"))) for name in sizes]
    buckets, short = assign([record(*size, frames=100)], pairs, [81], 25)
    assert ([f"{bucket.width}x{bucket.height}" for bucket in buckets], short) == ([expected], [])


@pytest.mark.parametrize(
    ("frames", "fps", "expected"),
    [(200, 25, 161), (161, 25, 161), (160, 25, 81), (80, 25, None), (97, 30, None), (98, 30, 81), (195, 60, 81), (77, 24, None),
     (78, 24, 81)],
)
def test_a_clip_goes_to_the_longest_length_it_fills(frames: int, fps: float, expected: int | None) -> None:
    buckets, short = assign([record(frames=frames, fps=fps)], [(512, 512)], [161, 81], 25)
    assert [bucket.frames for bucket in buckets] == ([expected] if expected else []) and short == ([] if expected else [0])


def test_the_shorter_of_picture_and_sound_counts() -> None:
    clips = [replace(record(frames=200), samples=int(seconds * 16_000)) for seconds in (6.43, 6.44, 3.24, 3.23)]
    assert assign(clips, [(64, 64)], [161, 81], 25) == ({Bucket(64, 64, 81): [0, 2], Bucket(64, 64, 161): [1]}, [3])


def test_every_clip_counts_once_per_epoch_over_all_ranks() -> None:
    for epoch in range(3):
        ranks = [list(plan().forwards(epoch, 0, rank)) for rank in range(3)]
        assert [len(forwards) for forwards in ranks] == [plan().steps_per_epoch * 2] * 3 == [8] * 3
        assert all(len(items) == 2 and len({item.bucket for item in items}) == 1 for items in chain(*ranks))
        items = list(chain(*chain(*ranks)))
        assert Counter(item.clip for item in items if item.weight) == Counter(range(19))
        assert all(item.clip in BUCKETS[item.bucket] and item.weight in (0, 1) for item in items)
        for step in range(4):
            counted = sorted(item.slot for item in items if item.step == step and item.weight)
            assert counted == list(range(len(counted)))
            assert {item.of for item in items if item.step == step} == {len(counted)}
            assert len({item.bucket for item in items if item.step == step}) == 1


def test_epochs_differ_and_follow_from_the_seed() -> None:
    def order(epoch: int, seed: int = 5) -> list[int]:
        return [item.clip for step in plan(seed=seed).steps(epoch) for item in step]

    assert order(0) == order(0) and len({tuple(order(0)), tuple(order(1)), tuple(order(0, 6))}) == 3
    first = {step[0].bucket for step in (plan().steps(epoch)[0] for epoch in range(20))}
    assert first == set(BUCKETS), "the buckets take turns at random"
    reversed_buckets = EpochPlan(dict(reversed(BUCKETS.items())), 5, 0, 3, 2, 2)
    assert reversed_buckets.steps(4) == plan().steps(4)


def test_processes_and_accumulation_are_interchangeable() -> None:
    def step_by_step(processes: int, accumulation: int) -> list[list[list[Item]]]:
        made = plan(processes=processes, accumulation=accumulation)
        ranks = [list(made.forwards(2, 0, rank)) for rank in range(processes)]
        steps = range(made.steps_per_epoch)
        return [sorted((ranks[r][s * accumulation + a] for r in range(processes) for a in range(accumulation)), key=repr) for s in steps]

    assert step_by_step(2, 1) == step_by_step(1, 2) and step_by_step(4, 3) == step_by_step(12, 1)
    forward, rank, batch = 1, 2, 2
    place = forward * 3 * batch + rank * batch
    assert list(plan().forwards(0, 0, rank))[forward] == plan().steps(0)[0][place : place + batch]


def test_a_run_goes_on_where_it_stopped() -> None:
    made = plan()
    whole = list(islice(RankSampler(made, 1), 30))
    assert [items[0].epoch for items in whole] == [0] * 8 + [1] * 8 + [2] * 8 + [3] * 6
    assert whole[8 + 2 * 3 :] == list(islice(RankSampler(made, 1, epoch=1, step=3), 30 - 14))
    assert whole[16:] == list(islice(RankSampler(made, 1, epoch=1, step=4), 14)), "a finished epoch"


def test_runs_are_new_every_epoch_or_taken_in_turn() -> None:
    def runs(made: EpochPlan) -> list[set[int]]:
        return [{item.run for step in made.steps(epoch) for item in step} for epoch in range(5)]

    assert runs(plan()) == [{0}, {1}, {2}, {3}, {4}] and runs(plan(runs=2)) == [{0}, {1}, {0}, {1}, {0}]
    assert all(type(value) is int for item in plan().steps(0)[0] for value in (item.clip, *astuple(item)[2:]))


def test_nothing_to_train_on() -> None:
    with pytest.raises(ValueError, match="no clip is left"):
        EpochPlan({SQUARE: []}, 0, 0, 1, 1, 1)

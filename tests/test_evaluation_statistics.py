"""Intervals hold what they promise, comparisons are paired, and neither depends on the order of the results."""

from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from stableavatar.evaluation.pairs import Pair, Result
from stableavatar.evaluation.statistics import (
    Interval,
    bootstrap,
    bootstrap_set,
    case_values,
    compare,
    decimals,
    permutation_p,
    proportion,
    summarise,
)


def result(variant: str, case: str, value: float, seed: int = 0, frames: tuple[int, int] | None = None) -> Result:
    pair = Pair(case, variant, seed, Path(f"{case}.mp4"), Path(f"{case}.wav"), None, None, ())
    return Result("csim", variant, value, pair, frames)


def column(variant: str, values: np.ndarray) -> list[Result]:
    return [result(variant, f"case{number:03}", value) for number, value in enumerate(values)]


def test_intervals_hold_the_true_mean_as_often_as_they_say():
    rng = np.random.default_rng(0)
    for size, low, high in ((20, 0.89, 0.965), (5, 0.78, 0.89)):
        found = [bootstrap(rng.normal(3, 2, (1, size))) for _ in range(300)]
        assert low < np.mean([interval.low <= 3 <= interval.high for interval in found]) < high
    skewed = [bootstrap(rng.exponential(1, (1, 60))) for _ in range(200)]
    assert 0.86 < np.mean([interval.low <= 1 <= interval.high for interval in skewed]) < 0.98


def test_the_bootstrap_is_that_of_scipy():
    values = np.random.default_rng(1).gamma(2, size=40)
    known = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=9999, rng=np.random.default_rng(0)).confidence_interval
    found = bootstrap(values[None])
    assert found.mean == pytest.approx(values.mean()) and found.count == 40
    assert [found.low, found.high] == pytest.approx([known.low, known.high], abs=0.03 * (known.high - known.low))


def test_groups_are_resampled_before_their_members():
    assert bootstrap(np.full((3, 4), 0.5)) == Interval(0.5, 0.5, 0.5, 12)
    assert bootstrap(np.array([[1.0, np.nan], [3.0, 5.0]])) == Interval(3, 1, 5, 3)
    assert bootstrap(np.full((2, 2), np.nan)) is None
    rng = np.random.default_rng(0)
    independent = bootstrap(rng.normal(size=(40, 25)))
    assert independent.high - independent.low == pytest.approx(2 * 1.96 / 1000**0.5, rel=0.5)
    alike = bootstrap(np.repeat(rng.normal(size=(40, 1)), 25, axis=1))
    assert alike.high - alike.low == pytest.approx(2 * 1.96 / 40**0.5, rel=0.4)


def test_seeds_of_a_case_are_averaged_and_the_order_does_not_matter():
    results = [result("a", "x", 1, 0), result("a", "x", 3, 1), result("a", "y", 5), result("a", "z", np.nan), result("b", "x", 0.1),
               result("a", "x", 7, frames=(0, 200)), Result("fid", "a", 9.0)]  # fmt: skip
    assert case_values(results) == {("a", "csim", None): {"x": 2, "y": 5}, ("b", "csim", None): {"x": 0.1},
                                    ("a", "csim", (0, 200)): {"x": 7}}  # fmt: skip
    assert summarise(results)["a", "csim", None].mean == 3.5 and summarise(results)["b", "csim", None] == Interval(0.1, 0.1, 0.1, 1)
    noisy = column("a", np.random.default_rng(0).normal(size=30)) + column("b", np.random.default_rng(1).normal(size=30))
    shuffled = [noisy[number] for number in np.random.default_rng(2).permutation(len(noisy))]
    assert summarise(shuffled) == summarise(noisy)
    assert sorted(map(str, compare(shuffled, "a"))) == sorted(map(str, compare(noisy, "a")))


def test_differences_are_paired_and_agree_with_the_t_test():
    rng = np.random.default_rng(3)
    easy = rng.normal(0, 5, 60)
    results = column("full", easy) + column("none", easy - 0.3 + rng.normal(0, 0.8, 60))
    (found,) = compare(results, "full")
    values = case_values(results)
    known = stats.ttest_rel(*(list(values[variant, "csim", None].values()) for variant in ("none", "full")))
    bounds = known.confidence_interval()
    assert (found.variant, found.metric, found.frames, found.difference.count) == ("none", "csim", None, 60)
    assert [found.difference.low, found.difference.high] == pytest.approx([bounds.low, bounds.high], abs=0.05)
    assert 1e-4 < known.pvalue < 0.05 and found.p == pytest.approx(known.pvalue, abs=0.01)
    spread = summarise(results)["full", "csim", None]
    assert spread.high - spread.low > 4 * (found.difference.high - found.difference.low), "unpaired, the cases' own spread hides it"


def test_only_cases_that_both_have_are_compared():
    results = [result("full", "x", 1), result("full", "y", 2), result("none", "y", 5), result("none", "z", 50), result("other", "z", 1)]
    (found,) = compare(results, "full")
    assert found.difference == Interval(3, 3, 3, 1) and found.p == 1


def test_the_permutation_test_is_exact_for_few_cases_and_scipys_rank_test_agrees_for_many():
    assert permutation_p(np.array([1.0, 2, 3, 4])) == 2 / 2**4
    assert permutation_p(np.array([1.0, -1, 2, -2])) == 1 and permutation_p(np.zeros(5)) == 1
    values = np.random.default_rng(4).normal(0.25, 1, 200)
    assert permutation_p(values) == pytest.approx(stats.wilcoxon(values).pvalue, abs=0.02)
    same = [permutation_p(np.random.default_rng(seed).normal(size=12)) for seed in range(60)]
    assert 0.35 < np.mean(same) < 0.65, "p is uniform where there is no difference"


def test_the_interval_of_a_set_lies_around_its_figure():
    """A figure that, like a Frechet distance, falls with the number of different videos: its resamples are all above it."""
    values = np.random.default_rng(5).normal(10, 3, 50)

    def mean(videos: list[int]) -> float:
        return float(values[videos].mean())

    def biased(videos: list[int]) -> float:
        return mean(videos) + 100 / len(set(videos))

    groups = [[2 * case, 2 * case + 1] for case in range(25)]
    plain, found = bootstrap_set(mean, groups, 400), bootstrap_set(biased, groups, 400)
    of_cases = values.reshape(25, 2).mean(axis=1)
    assert plain.high - plain.mean == pytest.approx(1.96 * of_cases.std(ddof=1) / 5, rel=0.15) and plain.count == 25
    assert found.mean == pytest.approx(values.mean() + 2) and found.low < found.mean < found.high
    assert found.high - found.low < 1.5 * (plain.high - plain.low)
    assert bootstrap_set(mean, [[0, 1]]) == Interval(*[float(values[:2].mean())] * 3, 1)
    assert bootstrap_set(mean, groups, 50) == bootstrap_set(mean, groups, 50)


def test_a_share_of_all_answers_is_not_certain_and_like_minded_people_count_less():
    unanimous = proportion(np.ones((1, 20)))
    assert unanimous.mean == unanimous.high == 1
    assert unanimous.low == pytest.approx(stats.binomtest(20, 20).proportion_ci(method="wilson").low)
    opinions = np.repeat(np.array([[1.0], [0.0], [1.0], [1.0]]), 30, axis=1)
    alike, mixed = proportion(opinions), proportion(np.random.default_rng(0).permuted(opinions.ravel()).reshape(4, 30))
    assert alike.mean == mixed.mean == 0.75 and alike.low < mixed.low - 0.2
    half = np.array([[1.0, np.nan], [0.0, 1.0]])
    assert proportion(half).count == 3 and proportion(half).mean == pytest.approx(2 / 3)


def test_large_figures_are_written_with_fewer_decimals():
    assert decimals(Interval(0.8, 0.7, 0.9, 3)) == 3 and decimals(Interval(9, 8, 10, 3)) == 1 and decimals(Interval(-11, -12, -9, 3)) == 1

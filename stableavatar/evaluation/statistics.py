"""How sure a figure is: intervals by the bootstrap, paired comparisons by permutation.

The unit is the case (a picture and a sound): videos of one case with several seeds are not independent of each other, so they are averaged
first, and cases are resampled. Where there was nothing to measure (NaN), a case is left out; every interval says how many it is of.
With few cases these intervals are too narrow: 95 % hold the true mean of normal values in 93 % of sets of 20 cases, in 84 % of sets of 5.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from stableavatar.evaluation.pairs import Result

RESAMPLES = 4000
SET_RESAMPLES = 100
"""Of set-level figures, each of which costs seconds."""
PERMUTATIONS = 9999
"""At most; with 13 cases or fewer all changes of sign are gone through, and p is exact."""
BATCH = 1000
"""Permutations at a time."""
TAIL = 0.025
"""Of the resamples, so many lie below a 95 % interval and above it."""
Key = tuple[str, str, tuple[int, int] | None]
"""Variant, metric, range of frames (None: whole videos)."""


@dataclass(frozen=True)
class Interval:
    """A mean (or a figure of a whole set), its 95 % interval, and the number of cases (or values) that it is of; one has no width."""

    mean: float
    low: float
    high: float
    count: int


@dataclass(frozen=True)
class Comparison:
    """A variant minus the reference variant, case by case over those that both have.

    Attributes:
        p: two-sided, that a difference as large comes about if both were the same; of this one comparison, not corrected for others.
            NaN for figures of whole sets, which have none.
    """

    variant: str
    metric: str
    frames: tuple[int, int] | None
    difference: Interval
    p: float


def case_values(results: Iterable[Result]) -> dict[Key, dict[str, float]]:
    """The per-video results by case, sorted by its name, whatever the order of the results; seeds are averaged, NaN is left out."""
    found: dict[Key, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for result in results:
        if result.pair is not None and np.isfinite(result.value):
            found[result.variant, result.metric, result.frames][result.pair.name].append(result.value)
    return {key: {name: float(np.mean(sorted(cases[name]))) for name in sorted(cases)} for key, cases in found.items()}


def summarise(results: Iterable[Result]) -> dict[Key, Interval]:
    """Mean and interval of each variant and metric over the cases."""
    return {key: bootstrap(np.array([list(cases.values())])) for key, cases in case_values(results).items()}


def compare(results: Iterable[Result], reference: str) -> list[Comparison]:
    """Every variant's differences to the reference variant; without those that share no case."""
    values = case_values(results)
    found = []
    for (variant, metric, frames), cases in values.items():
        others = values.get((reference, metric, frames), {})
        if variant != reference and (shared := sorted(cases.keys() & others.keys())):
            differences = np.array([cases[name] - others[name] for name in shared])
            found.append(Comparison(variant, metric, frames, bootstrap(differences[None]), permutation_p(differences)))
    return found


def bootstrap(values: np.ndarray, seed: int = 0) -> Interval | None:
    """Mean and 95 % interval (quantiles of the means of RESAMPLES resamples) of [groups, members]; None if all are NaN.

    Groups are resampled, and members within each; a single row is the plain bootstrap. NaN is left out.
    """
    if np.isnan(values).all():
        return None
    rows, columns = values.shape
    rng = np.random.default_rng(seed)
    chosen_rows = rng.integers(rows, size=(RESAMPLES, rows, 1))
    picked = values[chosen_rows, rng.integers(columns, size=(RESAMPLES, rows, columns))]
    count = (~np.isnan(picked)).sum(axis=(1, 2))
    means = np.nansum(picked, axis=(1, 2))[count > 0] / count[count > 0]
    low, high = np.quantile(means, [TAIL, 1 - TAIL]).tolist()
    return Interval(float(np.nanmean(values)), low, high, int((~np.isnan(values)).sum()))


def bootstrap_set(
    value: Callable[[Sequence[int]], float], groups: Sequence[Sequence[int]], resamples: int = SET_RESAMPLES, seed: int = 0
) -> Interval:
    """A figure of a whole set, such as FID, and its 95 % interval: 1.96 standard deviations over resamples of the cases to either side.

    Not the resamples' quantiles: a resample holds some cases twice and others not at all, which raises a Frechet distance, so that its
    quantiles lie beside the figure. The interval says how far the figure moves with other cases, as many as these; what it is too
    high by because they are few stays in it, as it does in published figures.

    Args:
        value: the figure of the videos of these numbers, some of them more than once. A difference of two variants is such a figure too.
        groups: for each case, the numbers of its videos.
    """
    draws = np.random.default_rng(seed).integers(len(groups), size=(resamples, len(groups)))
    found = [value([video for case in draw for video in groups[case]]) for draw in draws] if len(groups) > 1 else [0.0, 0.0]
    reach = float(stats.norm.ppf(1 - TAIL) * np.std(found, ddof=1))
    whole = float(value([video for group in groups for video in group]))
    return Interval(whole, whole - reach, whole + reach, len(groups))


def permutation_p(differences: np.ndarray) -> float:
    """Two-sided p that paired differences [cases] have the mean 0, from random changes of their signs; no shape is assumed."""
    if len(differences) == 1:
        return 1.0
    test = stats.permutation_test((differences,), lambda x, axis: np.mean(x, axis=axis), permutation_type="samples", vectorized=True,
                                  n_resamples=PERMUTATIONS, batch=BATCH, rng=np.random.default_rng(0))  # fmt: skip
    return float(test.pvalue)


def proportion(chosen: np.ndarray) -> Interval:
    """Share of ones and its 95 % interval; chosen is 1, 0 or NaN (not answered), [participants, answers].

    The wider, at either end, of two: Wilson's for independent answers, which is right also near 0 and 1, and the bootstrap over
    participants, since the answers of one person are alike.
    """
    people = bootstrap(chosen)
    assert people is not None, "no answers"
    wilson = stats.binomtest(round(np.nansum(chosen)), people.count).proportion_ci(method="wilson")
    return Interval(people.mean, min(people.low, float(wilson.low)), max(people.high, float(wilson.high)), people.count)


def decimals(found: Interval) -> int:
    """So many decimals a figure and its interval are written with."""
    return 1 if max(abs(found.low), abs(found.high)) >= 10 else 3

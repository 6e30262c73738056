"""Measures pairs: features in several processes, a video's figures from its own, a set's from those of all its videos."""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from typing import Any

from tqdm import tqdm

from stableavatar.evaluation.features import Lab
from stableavatar.evaluation.metrics import METRICS
from stableavatar.evaluation.metrics.base import SetMetric
from stableavatar.evaluation.pairs import Pair, Problem, Result, check_pair
from stableavatar.evaluation.statistics import Comparison, Interval, Key, bootstrap_set
from stableavatar.workers import shared_out

Stretch = tuple[int, int] | None


@dataclass(frozen=True)
class Measuring:
    """How to measure: fewest frames of a video, resamples for a set-level figure's interval, processes."""

    least_frames: int
    resamples: int
    workers: int


@dataclass(frozen=True)
class Measured:
    """Per-video results, figures of whole sets and their differences to the reference; the pairs they are of; what is wrong with others."""

    pairs: list[Pair]
    problems: list[Problem]
    results: list[Result]
    sets: dict[Key, Interval]
    set_differences: list[Comparison]


def measure(
    pairs: Sequence[Pair], names: Sequence[str], lab: Lab, stretches: Sequence[Stretch], reference: str, settings: Measuring
) -> Measured:
    """Measures what can be measured; a video that cannot is a problem of its own, and no figure contains it.

    Args:
        names: of metrics whose weights are there.
        stretches: frames of every video to measure apart; None for whole videos.
        reference: the variant that differences of set-level figures are taken to.
    """
    work = partial(_prepare, names=tuple(names), lab=lab, stretches=tuple(stretches), least=settings.least_frames)
    try:
        found = list(tqdm(shared_out(work, pairs, settings.workers, 1), "videos", len(pairs), unit="video"))
    except BrokenProcessPool:
        raise ValueError("a process that measures was killed (out of memory?); run again, if need be with fewer workers=") from None
    wrong = {pair: problem for pair, problem in zip(pairs, found) if problem}
    kept = [pair for pair in pairs if pair not in wrong]
    results, sets, differences = [], {}, []
    variants = list(dict.fromkeys(pair.variant for pair in kept))
    for name in tqdm(names, "metrics", delay=2):
        for frames in stretches:
            if METRICS[name].per_video:
                results += [_value(name, pair, frames, lab) for pair in kept if not METRICS[name].lacks(pair)]
            else:
                summaries = partial(_summaries, name, kept, frames, lab)
                for variant, figure, difference in _of_sets(METRICS[name], summaries, variants, reference, settings.resamples):
                    sets |= {(variant, name, frames): figure} if math.isfinite(figure.mean) else {}
                    if difference and math.isfinite(difference.mean):
                        differences.append(Comparison(variant, name, frames, difference, math.nan))
    return Measured(kept, list(wrong.values()), results, sets, differences)


def _prepare(pair: Pair, names: tuple[str, ...], lab: Lab, stretches: tuple[Stretch, ...], least: int) -> Problem | None:
    """Makes the features of a pair in a process of its own; what is wrong with it, if anything."""
    if problem := check_pair(pair, least):
        return problem
    try:
        lab.prepare(pair, names, stretches)
    except ValueError as error:
        return Problem(pair.generated, " ".join(str(error).split()), pair.variant)
    return None


def _value(name: str, pair: Pair, frames: Stretch, lab: Lab) -> Result:
    return Result(name, pair.variant, METRICS[name].value(lab.features(pair, name, frames)), pair, frames)


def _summaries(name: str, pairs: Sequence[Pair], frames: Stretch, lab: Lab, variant: str) -> dict[str, list[Any]]:
    """Case -> what a set-level metric needs of its videos of a variant, sorted."""
    metric, found = METRICS[name], {}
    for pair in sorted((pair for pair in pairs if pair.variant == variant and not metric.lacks(pair)), key=lambda pair: pair.name):
        found.setdefault(pair.name, []).append(metric.summary(lab.features(pair, name, frames)))
    return found


def _of_sets(
    metric: SetMetric, summaries: Callable[[str], dict[str, list[Any]]], variants: Sequence[str], reference: str, resamples: int
) -> Iterator[tuple[str, Interval, Interval | None]]:
    """Of each variant the figure of its videos together, and its difference to that of the reference, over the cases that both have.

    The summaries of two variants are held at a time.
    """
    others = summaries(reference)
    for variant in variants:
        own = others if variant == reference else summaries(variant)
        if not own:
            continue
        shared = [] if variant == reference else sorted(own.keys() & others.keys())
        minus = partial(_difference, metric, own, others, shared)
        figure = bootstrap_set(partial(_figure, metric, own, sorted(own)), _each(own), resamples)
        yield variant, figure, bootstrap_set(minus, _each(shared), resamples) if shared else None


def _figure(metric: SetMetric, summaries: Mapping[str, list[Any]], cases: Sequence[str], chosen: Sequence[int]) -> float:
    """A set-level metric of the cases of these numbers, all their videos."""
    return metric.of_set([summary for number in chosen for summary in summaries[cases[number]]])


def _each(cases: Collection[str]) -> list[list[int]]:
    return [[number] for number in range(len(cases))]


def _difference(
    metric: SetMetric, own: Mapping[str, list[Any]], others: Mapping[str, list[Any]], cases: Sequence[str], chosen: Sequence[int]
) -> float:
    return _figure(metric, own, cases, chosen) - _figure(metric, others, cases, chosen)

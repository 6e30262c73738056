"""What an evaluation found: the record that tables and report are made of."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from stableavatar.evaluation.pairs import Pair, Problem, Result
from stableavatar.evaluation.published import PublishedRow
from stableavatar.evaluation.statistics import Comparison, Interval, Key

ARROWS = {"higher": "↑", "lower": "↓"}


class Metric(Protocol):
    """What the report says of a metric; its docstring is the definition that was measured by."""

    label: str
    unit: str
    better: str


@dataclass(frozen=True)
class Findings:
    """What a report is made of.

    Attributes:
        about: a paragraph on set and protocol.
        reference: the variant that differences are taken to; empty for none.
        metrics: those that were asked for, in the order of the columns.
        results: of videos (those of sets are left out). sets: figures of whole sets with their intervals.
        set_differences: of these to the reference, over the cases that both have; without p (NaN).
        absent: metric -> why it was not measured.
        pairs: all that were measured. problems: what was excluded. missing: variant -> why it could not be generated.
        videos: case -> its side-by-side video.
        settings, versions: key -> value.
    """

    title: str
    about: str
    metrics: Mapping[str, Metric]
    results: Sequence[Result]
    pairs: Sequence[Pair]
    reference: str = ""
    sets: Mapping[Key, Interval] = field(default_factory=dict)
    set_differences: Sequence[Comparison] = ()
    absent: Mapping[str, str] = field(default_factory=dict)
    problems: Sequence[Problem] = ()
    missing: Mapping[str, str] = field(default_factory=dict)
    published: Sequence[PublishedRow] = ()
    videos: Mapping[str, Path] = field(default_factory=dict)
    settings: Mapping[str, object] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def variants(self) -> list[str]:
        """In the order of the pairs."""
        return list(dict.fromkeys(pair.variant for pair in self.pairs))


def head(metric: Metric) -> str:
    """A column's name: label, unit if it has one, and an arrow to what is better."""
    unit = f" ({metric.unit})" if metric.unit else ""
    return f"{metric.label}{unit} {ARROWS.get(metric.better, '')}".rstrip()

"""What all metrics have in common."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

from stableavatar.evaluation.networks import build_network
from stableavatar.evaluation.pairs import Pair
from stableavatar.evaluation.samples import Arrays
from stableavatar.evaluation.weights import Tools, absence

Role = Literal["generated", "video", "image", "audio"]
"""Files of a pair: the generated video, the true one, the reference picture, the voice."""


class Need(NamedTuple):
    """Features that a metric needs: which file of a pair, seen (or heard) by which network."""

    role: Role
    network: str


@dataclass(frozen=True, eq=False)
class Features:
    """What a metric needs of a pair; rows are those of the stretch that is measured."""

    pair: Pair
    arrays: Mapping[Need, Arrays]

    def __getitem__(self, need: tuple[Role, str]) -> Arrays:
        return self.arrays[Need(*need)]


class Metric(ABC):
    """A figure of a video or of a set of videos; the docstring of its class is its definition.

    Attributes:
        name: in settings. label: in tables. unit: empty for a plain number. better: which way.
        needs: the features that it is made of.
        per_video: a value for each video; else one for all videos of a variant.
    """

    name: ClassVar[str]
    label: ClassVar[str]
    unit: ClassVar[str] = ""
    better: ClassVar[Literal["higher", "lower"]]
    needs: ClassVar[tuple[Need, ...]] = ()
    per_video: ClassVar[bool] = True

    def absent(self, tools: Tools) -> str:
        """Why it cannot be measured at all ("absent: give weights.inception=..."), empty if it can be."""
        return next(filter(None, (absence(build_network(need.network, tools).weights, tools.weights) for need in self.needs)), "")

    def lacks(self, pair: Pair) -> str:
        """What a pair has not that it needs, empty if nothing."""
        roles = {need.role for need in self.needs}
        if "video" in roles and pair.video is None:
            return "no true video"
        return "no reference picture" if "image" in roles and pair.image is None and pair.video is None else ""


class VideoMetric(Metric):
    """A metric with a value for each video."""

    @abstractmethod
    def value(self, features: Features) -> float:
        """Of one video, or of a stretch of it; NaN: there is nothing to measure."""


class SetMetric(Metric):
    """A metric of all videos of a variant together."""

    per_video: ClassVar[bool] = False

    @abstractmethod
    def summary(self, features: Features) -> Any:
        """What `of_set` needs of one pair."""

    @abstractmethod
    def of_set(self, summaries: Sequence[Any]) -> float:
        """Of the pairs with these summaries, in whatever order; NaN: they are too few. A pair that is there twice counts twice."""

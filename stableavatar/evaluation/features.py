"""Features of pairs: every file is decoded once for all networks that have not seen it, and what they gave is kept."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from stableavatar.evaluation.metrics import METRICS
from stableavatar.evaluation.metrics.base import Features, Need
from stableavatar.evaluation.networks import build_network
from stableavatar.evaluation.pairs import IMAGES, Pair
from stableavatar.evaluation.samples import (
    Arrays,
    Network,
    PictureNetwork,
    Seen,
    SoundNetwork,
    Still,
    Stretch,
    first_picture,
    open_video,
    watch,
    within,
)  # fmt: skip
from stableavatar.evaluation.store import FeatureStore
from stableavatar.evaluation.weights import Tools
from stableavatar.media import AudioTrack

__all__ = ["Lab", "Tools"]

Span = tuple[float, float]
"""Seconds [first, stop)."""


@dataclass(frozen=True)
class Subject:
    """A file of a pair; `still`: only its first picture counts."""

    path: Path
    still: bool = False

    def pictures(self) -> Seen:
        """What is seen of it; ValueError where it cannot be read."""
        if not self.still:
            return open_video(self.path)
        return Still(self.path) if self.path.suffix.lower() in IMAGES else first_picture(self.path)


@dataclass(frozen=True)
class Lab:
    """Makes features and reads them from a folder. It can be handed to other processes.

    Attributes:
        folder: of the features.
        tools: weights, device and batch size.
    """

    folder: Path
    tools: Tools

    def check(self, names: Iterable[str]) -> None:
        """Loads the weights of all networks that the metrics `names` need; ValueError says what is wrong with one."""
        for network in dict.fromkeys(need.network for name in names for need in METRICS[name].needs):
            build_network(network, self.tools).load()

    def prepare(self, pair: Pair, names: Iterable[str], stretches: Sequence[Stretch | None] = (None,)) -> None:
        """Makes all features that the metrics `names` need of a pair and that are not there yet.

        Args:
            stretches: frames of the generated video, None for all.

        Raises:
            ValueError: a file is broken, too short or without a face; it is named.
        """
        wanted: dict[Subject, dict[tuple[str, Span | None], None]] = {}
        for name in names:
            for need in () if METRICS[name].lacks(pair) else METRICS[name].needs:
                for stretch in stretches:
                    networks = wanted.setdefault(_subject(pair, need), {})
                    networks[need.network, self._span(pair, need, stretch)] = None
        for subject, networks in wanted.items():
            self._make(subject, list(networks))

    def features(self, pair: Pair, name: str, stretch: Stretch | None = None) -> Features:
        """What the metric `name` needs of a pair in a stretch of its video; made first, as in `prepare`, where it is not there."""
        self.prepare(pair, [name], [stretch])
        found = {}
        for need in METRICS[name].needs:
            subject, span = _subject(pair, need), self._span(pair, need, stretch)
            arrays = self._read(subject, need.network, span)
            seconds = None if stretch is None else _seconds(pair, stretch)
            cut = seconds is not None and not subject.still and "times" in arrays
            found[need] = _cut(arrays, seconds) if cut else arrays
        return Features(pair, found)

    def _span(self, pair: Pair, need: Need, stretch: Stretch | None) -> Span | None:
        """The seconds that a network has to see on their own; None if its features of the whole file can be cut."""
        by_frame = build_network(need.network, self.tools).by_frame
        return None if stretch is None or by_frame else _seconds(pair, stretch)

    def _place(self, subject: Subject, network: str, span: Span | None) -> Path:
        definition = build_network(network, self.tools).definition() | {"still": subject.still, "span": span}
        return FeatureStore(self.folder).path(network, subject.path, definition)

    def _read(self, subject: Subject, network: str, span: Span | None) -> Arrays:
        place = self._place(subject, network, span)
        if (arrays := FeatureStore(self.folder).read(place)) is None:  # damaged: what is missing is made before it is read
            place.unlink(missing_ok=True)
            self._make(subject, [(network, span)])
            arrays = FeatureStore(self.folder).read(place)
        assert arrays is not None, place
        return arrays

    def _make(self, subject: Subject, wanted: Sequence[tuple[str, Span | None]]) -> None:
        """Makes of a file what is not there yet: what needs no other features in a first pass, the rest in a second."""
        missing = [item for item in wanted if not self._place(subject, *item).is_file()]
        earlier = {build_network(name, self.tools).after for name, _ in missing} - {""}
        first = [(name, None) for name in sorted(earlier) if not self._place(subject, name, None).is_file()]
        first += [item for item in missing if not build_network(item[0], self.tools).after and item not in first]
        for batch in (first, [item for item in missing if item not in first]):
            if batch:
                self._pass(subject, [(build_network(name, self.tools), span) for name, span in batch])

    def _pass(self, subject: Subject, batch: Sequence[tuple[Network, Span | None]]) -> None:
        listening = [network for network, _ in batch if isinstance(network, SoundNetwork)]
        looking = [(network, span) for network, span in batch if isinstance(network, PictureNetwork)]
        if listening:
            with AudioTrack(subject.path, quiet=True) as track:
                for network in listening:
                    self._write(subject, network.name, None, network.hear(track))
        if looking:
            pictures = subject.pictures()
            known = {name: self._read(subject, name, None) for name in {network.after for network, _ in looking} - {""}}
            watchers = [network.watch(pictures, known.get(network.after, {}), span) for network, span in looking]
            watch(pictures, watchers)
            for (network, span), watcher in zip(looking, watchers):
                self._write(subject, network.name, span, watcher.result())

    def _write(self, subject: Subject, network: str, span: Span | None, features: Arrays) -> None:
        FeatureStore(self.folder).write(self._place(subject, network, span), features)


def _subject(pair: Pair, need: Need) -> Subject:
    path = {"generated": pair.generated, "audio": pair.audio, "video": pair.video, "image": pair.image or pair.video}[need.role]
    assert path is not None, (pair, need)
    return Subject(path, still=need.role == "image")


def _seconds(pair: Pair, stretch: Stretch) -> Span:
    fps = open_video(pair.generated).fps
    return stretch[0] / fps, stretch[1] / fps


def _cut(arrays: Arrays, span: Span) -> Arrays:
    """The rows whose times lie in a stretch."""
    chosen = within(arrays["times"], span)
    return {name: rows[chosen] for name, rows in arrays.items()}

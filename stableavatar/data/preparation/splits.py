"""Which clips train, validate and test: whole groups of clips that share a person or a source, by the hash of the group's name."""

import hashlib
import logging
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass

from scipy.cluster.hierarchy import DisjointSet

from stableavatar.config import setting

logger = logging.getLogger(__name__)

TRAIN, VALIDATION, TEST = "train", "validation", "test"
SPLITS = (TRAIN, VALIDATION, TEST)


@dataclass
class SplitConfig:
    validation: float = setting(0.02, "share of the groups whose clips validate; 0 for none", low=0, high=1)
    test: float = setting(0.02, "share of the groups whose clips test; 0 for none", low=0, high=1)
    by: str = setting("person", "what stays together: person keeps all sources that show a person, source only what comes from one file "
                      "(clips whose person is not told count by their source)", choices=("person", "source"))
    seed: int = setting(42, "another seed draws other groups", low=0)


@dataclass(frozen=True)
class Origin:
    """Where a clip comes from: the sha256 of its raw file (so that a copy under another name is the same source) and whom it shows."""

    source: str
    person: str | None


def assign_splits(origins: Iterable[Origin], config: SplitConfig) -> dict[Origin, str]:
    """The split of every origin.

    It follows from the names in a group and the seed alone: clips that are added later move no others, unless they join two groups
    that nothing joined before, or name the person of a source that was nameless.

    Raises:
        ValueError: the shares of validation and test exceed 1.
    """
    if config.validation + config.test > 1:
        raise ValueError(f"split.validation and split.test must not exceed 1 together, got {config.validation:g} and {config.test:g}")
    origins = sorted(set(origins), key=lambda origin: (origin.source, origin.person or ""))
    names = _group_names(origins, config.by)
    splits = {origin: _draw(names[origin], config) for origin in origins}
    wanted = {VALIDATION: config.validation, TEST: config.test}
    for split in (name for name, share in wanted.items() if share and origins and name not in splits.values()):
        logger.warning("no clip is in the %s split: the draw left it none of %d groups; raise split.%s or change split.seed", split,
                       len(set(names.values())), split)
    return splits


def _group_names(origins: list[Origin], by: str) -> dict[Origin, str]:
    """The name of each origin's group: the first of its persons, else its source."""
    sets = DisjointSet(("source", origin.source) for origin in origins)
    for origin in origins:
        if by == "person" and (person := _plain(origin.person or "")):
            sets.add(("person", person))
            sets.merge(("person", person), ("source", origin.source))
    # "person" sorts before "source", so a group is named after a person if it has one.
    first = {member: min(subset) for subset in sets.subsets() for member in subset}
    return {origin: "/".join(first["source", origin.source]) for origin in origins}


def _plain(person: str) -> str:
    """A name without the differences in case, spaces and unicode form by which one person would become two."""
    return " ".join(unicodedata.normalize("NFKC", person).casefold().split())


def _draw(name: str, config: SplitConfig) -> str:
    """The split that a group's name draws; growing a share only adds groups to it."""
    digest = hashlib.sha256(f"{config.seed}/{name}".encode()).digest()
    place = int.from_bytes(digest[:8], "big") / 2**64
    if place < config.test:
        return TEST
    return VALIDATION if place >= 1 - config.validation else TRAIN

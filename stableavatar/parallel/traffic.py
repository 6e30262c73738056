"""Bytes that this process sends to others, counted where they are sent."""

from collections import Counter

_counting: list["Traffic"] = []


class Traffic:
    """Counts what this process sends while it is entered: `with Traffic() as traffic: ...`.

    Attributes:
        sent: bytes by kind of message: `ulysses`, `ring`, `gather`, ...
    """

    def __init__(self) -> None:
        self.sent: Counter[str] = Counter()

    def __enter__(self) -> "Traffic":
        _counting.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        _counting.remove(self)


def count(kind: str, sent: int) -> None:
    """Adds bytes to every counter that is entered. A list and no context variable: backward passes run in other threads."""
    for traffic in _counting:
        traffic.sent[kind] += sent

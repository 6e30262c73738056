"""Rows that papers printed, to stand beside what is measured: constants with their source (configs/evaluation/published)."""

from dataclasses import dataclass
from typing import Any

from stableavatar.config import read_yaml
from stableavatar.evaluation.settings import parse_range, words

KEYS = {"source", "note", "columns", "rows"}
ROW_KEYS = {"name", "values", "set", "variant", "frames", "note"}
MISSING = "-"
"""Stands for a value that the table does not have."""


@dataclass(frozen=True)
class PublishedRow:
    """A row of a paper's table.

    Attributes:
        values: by metric; texts: the same with the digits that were printed.
        source: paper and table. note: whose weights, such as "published, other weights".
        set: name of the test set; empty where the table has only one.
        variant: our variant that repeats it, empty for none. frames: the stretch [first, stop) that it is of, None for whole videos.
    """

    name: str
    values: dict[str, float]
    texts: dict[str, str]
    source: str
    note: str
    set: str = ""
    variant: str = ""
    frames: tuple[int, int] | None = None


def read_published(paths: str, test_set: str = "") -> list[PublishedRow]:
    """The rows of some files, but for those of other test sets than the one of this name (all if it is empty).

    Raises:
        ValueError: a file that cannot be read or is not as it should be; the row is named.
    """
    rows = [row for path in words(paths) for row in _read(path)]
    return [row for row in rows if not (row.set and test_set) or row.set == test_set]


def _read(path: str) -> list[PublishedRow]:
    content = read_yaml(path, dict)
    if content.keys() != KEYS:
        raise ValueError(f"{path} must have the keys {', '.join(sorted(KEYS))}, got {', '.join(map(str, content))}")
    return [_row(path, content, row) for row in content["rows"]]


def _row(path: str, content: dict[str, Any], row: dict[str, Any]) -> PublishedRow:
    columns, texts = content["columns"].split(), str(row.get("values", "")).split()
    if not {"name", "values"} <= row.keys() <= ROW_KEYS or len(texts) != len(columns):
        raise ValueError(f"{path}: row {row.get('name', row)} must have a name and {len(columns)} values ({content['columns']})")
    there = {column: text for column, text in zip(columns, texts) if text != MISSING}
    try:
        values = {column: float(text) for column, text in there.items()}
    except ValueError:
        raise ValueError(f"{path}: row {row['name']} must have numbers, or {MISSING}; got {row['values']!r}") from None
    frames = parse_range(row["frames"]) if "frames" in row else None
    note = row.get("note", content["note"])
    return PublishedRow(row["name"], values, there, content["source"], note, row.get("set", ""), row.get("variant", ""), frames)

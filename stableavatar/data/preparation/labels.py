"""Whom a clip shows and what they do: from a table, from the names of folders, or from a function of the user's."""

import csv
import importlib
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from stableavatar.data.preparation.records import KINDS, Segment, Source

COLUMNS = ("path", "kind", "person", "start", "end", "x0", "y0", "x1", "y1")
"""Of the table; only path must be there. Other columns are not looked at."""
Classifier = Callable[[str, float, float], str]
"""Takes a raw file's path and the seconds at which a clip starts and ends; gives one of KINDS."""


@dataclass(frozen=True)
class Label:
    """What the table says of a raw file as a whole, and of stretches of it."""

    kind: str | None = None
    person: str | None = None
    stretches: tuple[Segment, ...] = ()


def read_table(path: str | Path) -> dict[str, Label]:
    """Path relative to the raw folder -> what a csv with the columns COLUMNS says of it.

    A row without start and end is about the whole file; each row with them is a stretch to take clips from, and then only those are taken.

    Raises:
        ValueError: it cannot be read, or a row of it is wrong, with its number.
    """
    labels: dict[str, Label] = {}
    try:
        with Path(path).open(encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file)
            if "path" not in (rows.fieldnames or ()):
                raise ValueError(f"the table {path} lacks the column path; its columns may be {', '.join(COLUMNS)}")
            for number, row in enumerate(rows, 2):
                cells = {name: (row.get(name) or "").strip() for name in COLUMNS}
                labels[cells["path"]] = _add(labels.get(cells["path"], Label()), cells, f"{path} line {number}")
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"cannot read the table {path}: {getattr(error, 'strerror', None) or error}; give a csv in UTF-8") from None
    return labels


def _add(label: Label, cells: dict[str, str], line: str) -> Label:
    """A label with one row more."""
    kind, person = cells["kind"] or None, cells["person"] or None
    if kind is not None:
        check_kind(kind, line)
    if not (cells["start"] or cells["end"]):
        return replace(label, kind=kind or label.kind, person=person or label.person)
    try:
        start, end = float(cells["start"] or 0), float(cells["end"])
        box = tuple(float(cells[side]) for side in COLUMNS[5:]) if cells["x0"] else None
    except ValueError:
        raise ValueError(f"{line}: start and end are seconds, x0 y0 x1 y1 in 0..1; got {', '.join(filter(None, cells.values()))}") from None
    if not 0 <= start < end:
        raise ValueError(f"{line}: start must be at least 0 and before end, got {start:g} and {end:g}")
    return replace(label, stretches=(*label.stretches, Segment("", start, end, box, kind, person)))


def check_kind(kind: str, where: str) -> None:
    """ValueError unless `kind` is one of KINDS."""
    if kind not in KINDS:
        raise ValueError(f"{where}: a kind is one of {', '.join(KINDS)}, got {kind!r}")


def labelled(source: Source, table: dict[str, Label], persons: bool) -> tuple[Source, list[Segment]]:
    """A source with its kind and person, and the stretches of it that the table gives.

    Args:
        persons: the first folder of the path that is not named like a kind is named after the person.
    """
    folders = PurePosixPath(source.path).parts[:-1]
    kind = next((folder for folder in reversed(folders) if folder in KINDS), None)
    person = next((folder for folder in folders if folder not in KINDS), None) if persons else None
    label = table.get(source.path, Label())
    named = replace(source, kind=label.kind or kind, person=label.person or person)
    return named, [replace(stretch, source=source.id) for stretch in label.stretches]


def unknown_paths(table: dict[str, Label], sources: Iterable[Source]) -> list[str]:
    """Paths that the table names and no source has."""
    return sorted(set(table) - {source.path for source in sources})


def load_classifier(name: str) -> Classifier:
    """The function that "module:function" names; modules are also looked for in the working directory.

    Raises:
        ValueError: there is none.
    """
    module, _, function = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"classifier={name}: {error}; give module:function, importable from the working directory") from None


def kind_of(segment: Segment, source: Source, path: Path, classifier: str, otherwise: str) -> str:
    """The kind of a clip: what is said of its stretch, else of its file, else what the classifier says, else `otherwise`."""
    kind = segment.kind or source.kind
    if kind is None and classifier:
        kind = load_classifier(classifier)(str(path), segment.start, segment.end)
        check_kind(kind, f"classifier={classifier} for {source.path}")
    return kind or otherwise

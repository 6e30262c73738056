"""What a prepared set holds: manifest.parquet with a row per clip, and the lists of accepted clips that training reads."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from stableavatar.data.preparation.splits import SPLITS, TEST, TRAIN, VALIDATION
from stableavatar.files import write_whole

MANIFEST = "manifest.parquet"
BUCKETS = ("rec", "vec", "square")
"""Buckets that always have lists, empty or not; others have them while the set has a folder of theirs."""
PREFIXES = {TRAIN: "", VALIDATION: "validation_", TEST: "test_"}
"""Split -> what the names of its lists begin with."""
TYPES = {
    str: pa.string(),
    str | None: pa.string(),
    tuple[str, ...]: pa.list_(pa.string()),
    float: pa.float64(),
    int: pa.int64(),
    bool: pa.bool_(),
}


@dataclass(frozen=True)
class Row:
    """A clip as the manifest tells it.

    Attributes:
        id, folder: its name, and its folder relative to the manifest's, with forward slashes.
        source, source_sha256: path of the raw file relative to the raw folder, and the digest of its content.
        start, end: seconds of the source.
        fps, frames, width, height: of sub_clip.mp4.
        bucket: name of the bucket (rec, vec, square or WxH); kind: speech, singing or dancing.
        person: whom it shows, None if nobody told.
        split: train, validation or test, of rejected clips too.
        accepted: whether the lists name it; reasons: why not, one per threshold that it missed.
        video_sha256, audio_sha256: digests of sub_clip.mp4 and audio.wav.
        prompt: what training is told of it.
        scores: name -> value, None where it was not taken.
    """

    id: str
    folder: str
    source: str
    source_sha256: str
    start: float
    end: float
    fps: float
    frames: int
    width: int
    height: int
    bucket: str
    kind: str
    person: str | None
    split: str
    accepted: bool
    reasons: tuple[str, ...]
    video_sha256: str
    audio_sha256: str
    prompt: str
    scores: Mapping[str, float | None]

    @property
    def seconds(self) -> float:
        """Length of the clip."""
        return self.frames / self.fps


COLUMNS = tuple(field for field in fields(Row) if field.name != "scores")


def schema(scores: Sequence[str]) -> pa.Schema:
    """Columns of the manifest: those of Row, then one number per score; the same for any rows."""
    return pa.schema([(field.name, TYPES[field.type]) for field in COLUMNS] + [(name, pa.float64()) for name in scores])


def write_manifest(out: Path, rows: Iterable[Row], scores: Sequence[str]) -> None:
    """Write manifest.parquet and the lists of `out`, each whole or not at all; the same rows give the same bytes in any order.

    Lists name the folders of accepted clips relative to themselves, so that the whole set can be moved.

    Args:
        scores: names of all scores that there are, taken or not.

    Raises:
        ValueError: a file cannot be written.
    """
    rows = sorted(rows, key=lambda row: row.id)
    assert len({row.id for row in rows}) == len(rows), "two clips of one name"
    assert all(set(row.scores) <= set(scores) for row in rows), "a score that the manifest has no column for"
    own = ({field.name: getattr(row, field.name) for field in COLUMNS} for row in rows)
    records = [values | {name: row.scores.get(name) for name in scores} for values, row in zip(own, rows)]
    table = pa.Table.from_pylist(records, schema(scores))
    write_whole(out / MANIFEST, lambda path: pq.write_table(table, path, compression="zstd"))
    _write_lists(out, rows)


def _write_lists(out: Path, rows: Sequence[Row]) -> None:
    """A list per bucket and split. Those of an earlier run whose bucket the set has a folder of are written anew if only to empty them."""
    stale = {path.name for path in out.iterdir() if path.is_dir() and any((out / list_name(path.name, split)).exists() for split in SPLITS)}
    for bucket in sorted({*BUCKETS, *stale, *(row.bucket for row in rows)}):
        for split in SPLITS:
            named = [row.folder for row in rows if row.accepted and row.bucket == bucket and row.split == split]
            write_whole(out / list_name(bucket, split), partial(_write_lines, named))


def _write_lines(lines: Sequence[str], path: Path) -> None:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def list_name(bucket: str, split: str) -> str:
    """File name of the list of a bucket's clips in a split, as the released repository calls it."""
    return f"{PREFIXES[split]}video_{bucket}_path.txt"


def read_manifest(path: str | Path) -> list[Row]:
    """The rows that `write_manifest` wrote, sorted by id.

    Args:
        path: of the parquet file, or of the folder that holds it.

    Raises:
        ValueError: there is no such file, or it is not a manifest.
    """
    path = Path(path) / MANIFEST if Path(path).is_dir() else Path(path)
    try:
        records = pq.ParquetFile(path).read().to_pylist()
        return [_row(record) for record in records]
    except (OSError, pa.ArrowException, KeyError) as error:
        raise ValueError(f"cannot read the manifest {path}: {' '.join(str(error).split())}; write it anew with prepare_data.py") from None


def _row(record: dict) -> Row:
    own = {field.name: record.pop(field.name) for field in COLUMNS}
    return Row(**own | {"reasons": tuple(own["reasons"])}, scores=record)

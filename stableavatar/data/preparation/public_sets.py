"""Readers of the annotation files that public sets publish: which stretch of which video shows whom, and where.

The sets publish names of videos, not videos: what the user has downloaded is found by its name, and nothing is downloaded here.
docs/data_preparation.md shows a small example of every format.
"""

import csv
import json
import logging
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import parse_qs, urlsplit

from tqdm import tqdm

from stableavatar.data.preparation.records import Segment, Source

logger = logging.getLogger(__name__)

BRACKETED = re.compile(r"\[([\w-]{11})\]$")
"""YouTube's id at the end of the name that yt-dlp gives a file."""
HDTF_NAMELESS = "RD"
"""The part of HDTF whose videos are numbered, not named after the speaker."""
OUTSIDE = 0.01
"""Share of the picture by which a box may stand out of it (rounding); one that stands out further was measured on another picture."""
CELEBV_KINDS = {"sing": "singing", "talk": "speech"}
"""CelebV-HQ's names of actions -> kind; a clip that does both is taken for singing."""
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Note:
    """One annotated stretch, of a video that may not be here.

    Attributes:
        names: what the video's file may be called, without its ending.
        start, end: seconds; end is None for the end of the video.
        box: of a video, given its width and height in pixels (HDTF's boxes count pixels of a picture as high as `height`).
    """

    names: tuple[str, ...]
    start: float
    end: float | None
    box: Box | None = None
    height: float | None = None
    kind: str | None = None
    person: str | None = None


def read_annotations(name: str, path: str | Path, sources: Sequence[Source]) -> list[Segment]:
    """The annotated stretches of the sources that are here (`Segment.source` is the source's id), sorted by source and start.

    Args:
        name: of the set, a key of SETS.
        path: HDTF's folder HDTF_dataset; the csv of AVSpeech; CelebV-HQ's celebvhq_info.json; the folder of Hallo3's videos and captions.
        sources: the user's videos. One is found by the name of its file without the ending: the set's own name of the video, YouTube's id,
            or a name that ends in [id].

    Raises:
        ValueError: no such set or file, or a line of it that is not as published, with its number.
    """
    if name not in SETS:
        raise ValueError(f"there is no reader for the public set {name!r}; choose one of {', '.join(SETS)}")
    try:
        return _match(name, SETS[name](Path(path)), _by_name(sources))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise ValueError(f"cannot read the annotations of {name} in {path}: {reason}; give the files as published") from None


def _by_name(sources: Sequence[Source]) -> dict[str, Source]:
    """Sources by the stem of their file and by the id in it; of two of one name, the first by path."""
    found: dict[str, Source] = {}
    for source in sorted(sources, key=lambda source: source.path):
        stem = PurePosixPath(source.path).stem
        bracketed = BRACKETED.search(stem)
        for key in (stem, bracketed[1] if bracketed else stem):
            found.setdefault(key, source)
    return found


def _match(name: str, notes: Iterable[Note], sources: dict[str, Source]) -> list[Segment]:
    """Segments of the notes whose video is here; says in a line each what is missing, too late or without a usable box."""
    segments, videos, missing, late, unboxed = set(), set(), {}, 0, 0
    for note in tqdm(notes, f"annotations of {name}", delay=2):
        videos.add(note.names[0])
        source = next((sources[key] for key in note.names if key in sources), None)
        if source is None:
            missing[note.names[0]] = None
            continue
        end = source.seconds if note.end is None else min(note.end, source.seconds)
        if note.start >= end:
            late += 1
            continue
        box = _box(note, source)
        unboxed += note.box is not None and box is None
        segments.add(Segment(source.id, note.start, end, box, note.kind, note.person))
    logger.info("%s: %d annotated clips in %d of %d videos", name, len(segments), len(videos) - len(missing), len(videos))
    if missing:
        first = ", ".join(list(missing)[:3]) + (", ..." if len(missing) > 3 else "")
        logger.warning("%s: %d of %d annotated videos are not here (%s)", name, len(missing), len(videos), first)
    if late:
        logger.warning("%s: %d annotated clips start after the end, theirs or their video's, and are left out", name, late)
    if unboxed:
        logger.warning("%s: %d boxes do not fit the picture or lack its size; those clips are cropped by their faces alone", name, unboxed)
    return sorted(segments, key=lambda one: (one.source, one.start, one.end, one.box or (), one.person or ""))


def _box(note: Note, source: Source) -> Box | None:
    """The box of a note in 0..1 of the source's picture, cut off at its edges; None where there is none or it is of another picture."""
    if note.box is None or note.height == 0:
        return None
    x0, y0, x1, y1 = note.box
    if note.height is not None:
        scale = 1 / note.height
        x0, x1 = (x * scale * source.height / source.width for x in (x0, x1))
        y0, y1 = y0 * scale, y1 * scale
    if min(x0, y0) < -OUTSIDE or max(x1, y1) > 1 + OUTSIDE or x0 > x1 or y0 > y1:
        return None
    return tuple(min(max(float(side), 0.0), 1.0) for side in (x0, y0, x1, y1))


def _hdtf(folder: Path) -> Iterator[Note]:
    """HDTF: {RD,WDA,WRA}_{video_url,annotion_time,crop_wh,resolution}.txt, a video or clip per line, its fields separated by spaces."""
    parts = sorted(path.name.removesuffix("_annotion_time.txt") for path in folder.glob("*_annotion_time.txt"))
    if not parts:
        raise ValueError(f"no *_annotion_time.txt in {folder}; give HDTF's folder HDTF_dataset")
    for part in parts:
        yield from _hdtf_part(folder, part)


def _hdtf_part(folder: Path, part: str) -> Iterator[Note]:
    urls, crops, heights = (_table(folder / f"{part}_{name}.txt") for name in ("video_url", "crop_wh", "resolution"))
    for video, (line, stretches) in _table(folder / f"{part}_annotion_time.txt").items():
        ids = [parse_qs(urlsplit(url).query).get("v", [""])[0] for url in urls.get(video, ("", []))[1]]
        person = None if part == HDTF_NAMELESS else video.rstrip("0123456789")
        height = _numbers(*heights[video], 1)[0] if video in heights else 0.0
        for index, stretch in enumerate(stretches):
            times = re.fullmatch(r"([\d:.]+)-([\d:.]+)", stretch)
            if times is None:
                raise ValueError(f"{line} must give times as mm:ss-mm:ss, got {stretch!r}")
            clip = crops.get(f"{video}_{index}")
            x, width, y, depth = _numbers(*clip, 4) if clip else (0.0,) * 4
            yield Note((video, f"{part}_{video}", *filter(None, ids)), _seconds(times[1]), _seconds(times[2]),
                       (x, y, x + width, y + depth) if clip else None, height, "speech", person)


def _table(path: Path) -> dict[str, tuple[str, list[str]]]:
    """First field without its ending -> ("file line number", the other fields); empty if there is no such file (only times are needed)."""
    if not path.exists() and not path.name.endswith("_annotion_time.txt"):
        return {}
    lines = [re.split(r"[\s|]+", line.strip(" \t|")) for line in path.read_text(encoding="utf-8-sig").splitlines()]
    return {words[0].removesuffix(".mp4"): (f"{path} line {number}", words[1:]) for number, words in enumerate(lines, 1) if words[0]}


def _numbers(line: str, words: Sequence[str], count: int) -> list[float]:
    """The words of a line as numbers; ValueError unless there are `count`."""
    try:
        numbers = [float(word) for word in words]
    except ValueError:
        numbers = []
    if len(numbers) != count or not all(map(math.isfinite, numbers)):
        raise ValueError(f"{line} must give {count} number{'s' if count > 1 else ''}, got {' '.join(words)!r}")
    return numbers


def _seconds(clock: str) -> float:
    """Seconds of ss, mm:ss or h:mm:ss."""
    seconds = 0.0
    for part in clock.split(":"):
        seconds = 60 * seconds + float(part or 0)
    return seconds


def _avspeech(path: Path) -> Iterator[Note]:
    """AVSpeech: YouTube's id, start, end, and where the speaker's face is at the start: x, y of its centre in 0..1. No header.

    The centre is given on as a box without area: the face that holds it is meant.
    """
    with path.open(encoding="utf-8-sig", newline="") as file:
        for number, row in enumerate(csv.reader(file), 1):
            if row:
                start, end, x, y = _numbers(f"{path} line {number}", row[1:], 4)
                yield Note((row[0],), start, end, (x, y, x, y), kind="speech")


def _celebv_hq(path: Path) -> Iterator[Note]:
    """CelebV-HQ: a JSON file of clips, each with its video, start and end in seconds, box in 0..1 and what is done in it."""
    try:
        data = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}; give CelebV-HQ's celebvhq_info.json") from None
    if not isinstance(data, dict) or not isinstance(data.get("clips"), dict):
        raise ValueError(f'{path} has no "clips"; give CelebV-HQ\'s celebvhq_info.json')
    actions = data.get("meta_info", {}).get("action_mapping", [])
    for name, clip in data["clips"].items():
        try:
            yield _celebv_note(clip, actions)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"clip {name} in {path} is not as published (at {error}); expected ytb_id, duration and bbox") from None


def _celebv_note(clip: dict, actions: Sequence[str]) -> Note:
    done = {action for action, flag in zip(actions, clip.get("attributes", {}).get("action", [])) if flag}
    kind = next((kind for action, kind in CELEBV_KINDS.items() if action in done), None)
    x0, y0, x1, y1 = (float(clip["bbox"][side]) for side in ("left", "top", "right", "bottom"))
    start, end = (float(clip["duration"][key]) for key in ("start_sec", "end_sec"))
    return Note((clip["ytb_id"],), start, end, (x0, y0, x1, y1), kind=kind)


def _hallo3(folder: Path) -> Iterator[Note]:
    """Hallo3: videos/NAME.mp4 and, where there are captions, caption/NAME.txt. Its files are clips already: no times, boxes or persons."""
    stems = {path.stem for name in ("videos", "caption") for path in folder.glob(f"{name}/*") if path.is_file()}
    if not stems:
        raise ValueError(f"no files in {folder}/videos or {folder}/caption; give the folder that Hallo3's archives were unpacked into")
    return (Note((stem,), 0.0, None) for stem in sorted(stems))


SETS: dict[str, Callable[[Path], Iterator[Note]]] = {"hdtf": _hdtf, "avspeech": _avspeech, "celebv_hq": _celebv_hq, "hallo3": _hallo3}
"""Name of a public set -> its reader."""

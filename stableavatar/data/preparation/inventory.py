"""What lies in the raw folder: every file that ffmpeg reads as a video with sound, and what is wrong with the others."""

import os
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from stableavatar import ffmpeg
from stableavatar.data.preparation.records import Source
from stableavatar.files import hash_file

NOT_VIDEO = re.compile(r"Input #0, (tty|image2|\w+_pipe|ico|lrc|srt|webvtt|ass)\b")
"""Formats of text and single pictures, which ffmpeg would play as films."""
TONE_MAP = (
    "zscale=t=linear:npl=100,format=gbrpf32le,zscale=p=bt709,tonemap=hable:desat=0,zscale=t=bt709:m=bt709:r=limited,format=yuv420p"
)
"""Of the high range of light to that of ordinary screens: what ffmpeg's documentation of `tonemap` recommends."""
HIGH_RANGE = ("smpte2084", "arib-std-b67")
SLUG = 40


def list_files(raw: Path, out: Path) -> Iterator[tuple[str, Path]]:
    """(path relative to `raw` with forward slashes, path) of all files, sorted; hidden ones and those in `out` are left out."""
    visited, found = set(), []
    for folder, folders, names in os.walk(raw, followlinks=True):
        real = os.path.realpath(folder)
        if real in visited or Path(real) == out.resolve():
            folders.clear()
            continue
        visited.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(folder) / name for name in names if not name.startswith(".")]
    yield from sorted((path.relative_to(raw).as_posix(), path) for path in found)


def source_id(name: str, sha256: str) -> str:
    """An id that is a plain file name: what is ASCII of the file's name, and the start of its content's digest."""
    plain = unicodedata.normalize("NFKD", Path(name).stem).encode("ascii", "ignore").decode()
    slug = re.sub(r"[^A-Za-z0-9]+", "-", plain)[:SLUG].strip("-") or "video"
    return f"{slug}-{sha256[:8]}"


def inspect(path: Path, name: str) -> dict[str, Any]:
    """Fields of Source for a file whose path in the raw folder is `name` (kind and person are not its own to know).

    Raises:
        ValueError: it is no video, damaged, or lacks pictures, their rate or sound.
    """
    ffmpeg.existing_file(path, "video")
    log = ffmpeg.header(path, "video")
    if NOT_VIDEO.search(log) or "Video:" not in log:
        raise ValueError(f"{path} is not a video; it is left out")
    video = ffmpeg.probe_video(path)
    if video.frames < 2:
        raise ValueError(f"video {path} has no frame rate: it holds one picture, or all are of one time; expected a moving picture")
    if "Audio:" not in log:
        raise ValueError(f"video {path} has no sound; a clip needs a voice")
    sound, picture, heard = ffmpeg.probe_audio(path), ffmpeg.clock_span(path, "V:0"), ffmpeg.clock_span(path, "a:0")
    if heard is None:
        raise ValueError(f"video {path} has an empty sound; a clip needs a voice")
    width, filters = _look(log, video)
    sha256 = hash_file(path)
    shown, start = (width, video.height, video.fps, video.even, video.frames / video.fps), picture[0]
    times = {"clock_start": ffmpeg.clock_start(log), "start": start, "sound_start": heard[0] - start, "sound_end": heard[1] - start}
    return asdict(Source(source_id(name, sha256), name, sha256, *shown, sound.rate, sound.layout, filters=filters, **times))


def _look(log: str, video: ffmpeg.VideoStream) -> tuple[int, str]:
    """Width as it is shown, and the filters that make the pictures progressive, of standard range, of square pixels."""
    line = next(line for line in log.splitlines() if "Video:" in line and "attached pic" not in line)
    filters = ["bwdif=deint=interlaced"] if re.search(r"\b(top|bottom) (coded )?first", line) else []
    filters += [TONE_MAP] if any(name in line for name in HIGH_RANGE) else []
    aspect = re.search(r"SAR (\d+):(\d+)", line)
    shape = int(aspect[1]) / int(aspect[2]) if aspect and int(aspect[1]) and int(aspect[2]) else 1.0
    if ffmpeg.is_turned(log):
        shape = 1 / shape
    width = max(2, round(video.width * shape))
    return width, ",".join(filters + ([f"scale={width}:{video.height},setsar=1"] if width != video.width else []))

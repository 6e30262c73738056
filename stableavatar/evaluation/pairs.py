"""Which video is compared with what, and the records that the walk hands on.

A folder of references holds, per case NAME, any of NAME.mp4 (the true video), NAME.png (the portrait), NAME.wav (the voice) and NAME.txt
(the prompt); a folder of generated videos holds NAME.mp4, or VARIANT/NAME.mp4, or VARIANT/seed_N/NAME.mp4 as `experiments` writes them.
They are matched by file stem.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stableavatar import ffmpeg
from stableavatar.geometry import frames_to_latents, latents_to_frames
from stableavatar.media import SCAN_SAMPLES, SILENT_PEAK, AudioTrack
from stableavatar.sampling.windows import WindowPlan
from stableavatar.video_writer import sidecar_path

VIDEOS = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v")
IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
SOUNDS = (".wav", ".flac", ".mp3", ".m4a", ".ogg", ".opus", ".aac")
SEED = re.compile(r"seed_(\d+)")
"""Folder of the videos of one seed."""


@dataclass(frozen=True)
class Pair:
    """A generated video and what it should be like.

    Attributes:
        name: of the case: the stem of its files.
        variant, seed: how it was generated; a variant is a row of a table.
        generated: the video. audio: the voice that it was made with (a sound or video file).
        image: the portrait that it was made from; None where there is no picture of it (the first frame of `video` is meant, if any).
        video: the true video of the case; None where there is none.
        seams: frames with which a window begins or ends, ascending; empty where the video does not say how it was made.
    """

    name: str
    variant: str
    seed: int
    generated: Path
    audio: Path
    image: Path | None
    video: Path | None
    seams: tuple[int, ...]

    @property
    def sidecar(self) -> Path:
        """Where the record of how it was made lies, if there is one."""
        return sidecar_path(self.generated)


@dataclass(frozen=True)
class Result:
    """A measured value.

    Attributes:
        metric: its name in `METRICS`. value: NaN where there was nothing to measure.
        pair: whose; None: of all videos of the variant.
        frames: the stretch [first, stop) of every video that it is of, counted from 0; None: of whole videos.
    """

    metric: str
    variant: str
    value: float
    pair: Pair | None = None
    frames: tuple[int, int] | None = None


@dataclass(frozen=True)
class Problem:
    """A video that no figure contains, and why; `variant` is empty where it is of none."""

    path: Path
    reason: str
    variant: str = ""


def find_pairs(generated: Path, reference: Path | None = None) -> tuple[list[Pair], list[Problem]]:
    """The pairs of two folders, sorted by variant, name and seed, and which videos lack a partner.

    Args:
        reference: None to measure the videos by themselves and by the sound in them.

    Raises:
        ValueError: a folder that is missing or holds no videos.
    """
    videos = list(_generated_videos(generated))
    if not videos:
        raise ValueError(f"no videos in {generated}; expected NAME.mp4, VARIANT/NAME.mp4 or VARIANT/seed_N/NAME.mp4")
    partners = files_by_case(reference) if reference else {}
    pairs = [_pair(*video, partners) for video in videos if not reference or video[2].stem in partners]
    problems = [Problem(path, f"{reference} holds no {path.stem}.*", variant)
                for variant, _, path in videos if reference and path.stem not in partners]
    return sorted(pairs, key=lambda pair: (pair.variant, pair.name, pair.seed)), problems + _missing(videos, partners)


def _generated_videos(folder: Path) -> Iterator[tuple[str, int, Path]]:
    """(variant, seed, path) of every video of a folder of generated ones."""
    if not folder.is_dir():
        raise ValueError(f"generated must be a folder of videos, got {str(folder)!r}")
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts[:-1]
        if path.suffix.lower() in VIDEOS and path.is_file() and not any(part.startswith(".") for part in (*parts, path.name)):
            seed = SEED.fullmatch(parts[-1]) if parts else None
            yield "/".join(parts[:-1] if seed else parts) or folder.resolve().name, int(seed[1]) if seed else 0, path


def files_by_case(folder: Path) -> dict[str, dict[str, Path]]:
    """Of a folder of references: name of the case -> "video", "image", "audio" -> file."""
    if not folder.is_dir():
        raise ValueError(f"reference must be a folder of videos, portraits and voices, got {str(folder)!r}")
    found: dict[str, dict[str, Path]] = {}
    for path in sorted(folder.iterdir()):
        for kind, endings in (("video", VIDEOS), ("image", IMAGES), ("audio", SOUNDS)):
            if path.suffix.lower() in endings and not path.name.startswith("."):
                found.setdefault(path.stem, {}).setdefault(kind, path)
    if not found:
        raise ValueError(f"no videos, portraits or voices in {folder}; expected NAME.mp4, NAME.png or NAME.wav")
    return found


def _pair(variant: str, seed: int, path: Path, partners: dict[str, dict[str, Path]]) -> Pair:
    files = partners.get(path.stem, {})
    audio = files.get("audio") or files.get("video") or path
    return Pair(path.stem, variant, seed, path, audio, files.get("image"), files.get("video"), _seams(read_record(path)))


def _missing(videos: list[tuple[str, int, Path]], partners: dict[str, dict[str, Path]]) -> list[Problem]:
    """A problem for every case of the references that a variant has with no seed, or not with one that it has other cases with."""
    here = {(variant, seed, path.stem) for variant, seed, path in videos}
    folders = {(variant, seed): path.parent for variant, seed, path in videos}
    return [Problem(folder / f"{name}.mp4", "there is no such video", variant)
            for (variant, seed), folder in folders.items() for name in partners if (variant, seed, name) not in here]


def read_record(video: Path) -> dict[str, Any]:
    """What is written beside a video on how it was made (see `video_writer.write_sidecar`); empty where there is nothing of the kind."""
    try:
        record = json.loads(sidecar_path(video).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) and "settings" in record else {}


def _seams(record: dict[str, Any]) -> tuple[int, ...]:
    windows = record.get("settings", {}).get("windows")
    if not windows:
        return ()
    lengths = frames_to_latents(record["frames"]), frames_to_latents(windows["frames"])
    return tuple(seam_frames(WindowPlan.sliding(*lengths, windows["overlap"], windows["tail"]), record["frames"]))


def seam_frames(plan: WindowPlan, frames: int) -> list[int]:
    """Frames (below `frames`) with which a window's part of the video begins or ends: the first frames of these latents."""
    latents = {window.start for window in plan.windows[1:]} | {window.stop for window in plan.windows[:-1]}
    return [frame for frame in sorted(map(latents_to_frames, latents)) if 0 < frame < frames]


def check_pair(pair: Pair, least: int) -> Problem | None:
    """What makes a pair unusable for any metric: a broken file, fewer than `least` frames, a silent voice; None if nothing does."""
    for path in filter(None, (pair.generated, pair.video)):
        try:
            frames = ffmpeg.probe_video(path).frames
        except ValueError as error:
            return Problem(pair.generated, f"broken: {error}", pair.variant)
        if frames < least:
            whose = "" if path == pair.generated else f"its reference {path} has "
            return Problem(pair.generated, f"short: {whose}{frames} frames, fewer than {least}", pair.variant)
    try:
        silent = _is_silent(pair.audio)
    except ValueError as error:
        return Problem(pair.generated, f"without a voice: {error}", pair.variant)
    return Problem(pair.generated, f"silent: nothing is heard in {pair.audio}", pair.variant) if silent else None


def _is_silent(path: Path) -> bool:
    """Whether no sample of a sound is louder than the noise of a microphone."""
    with AudioTrack(path, quiet=True) as track:
        starts = range(0, track.samples, SCAN_SAMPLES)
        return all(np.abs(track.read(start, min(start + SCAN_SAMPLES, track.samples))).max() < SILENT_PEAK for start in starts)

"""The step that makes clip folders: look at a stretch, choose the crop, cut, and put the whole folder in its place."""

import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from stableavatar.data.clips import SOUND, VIDEO
from stableavatar.data.preparation.crops import ClipConfig
from stableavatar.data.preparation.cutting import cut
from stableavatar.data.preparation.framing import crop_of, look
from stableavatar.data.preparation.labels import kind_of
from stableavatar.data.preparation.records import ClipFolder, Segment, Source
from stableavatar.data.preparation.settings import STEPS, FaceConfig
from stableavatar.data.preparation.state import CLIPS, Store

STEPS_OF_CLIPS = STEPS[2:6]
"""The step of this module, and those that read what it makes."""
UNFINISHED = "unfinished"
"""Folder in OUT/.work of clip folders that are being made, and of those that are being removed."""


@dataclass(frozen=True)
class CropSettings:
    """What the crop of every clip reads: `classifier` and `kind` for clips whose kind nothing else tells."""

    clip: ClipConfig
    faces: FaceConfig
    classifier: str
    kind: str


def make_clip(segment: Segment, source: Source, path: Path, settings: CropSettings, out: Path, work: Path) -> dict[str, Any]:
    """Makes the folder of a clip, whole or not at all; an older one of the same id is replaced.

    Args:
        path: the raw file; out: where clip folders go; work: a folder on the same disk for unfinished ones.

    Returns:
        folder (relative to `out`), bucket, kind; crop (x, y, width, height of the source); width, height, fps, frames,
        video_sha256, audio_sha256; face_seen (share of the pictures looked at that show the main face), static_background.

    Raises:
        ValueError: the clip has to be set aside: no face, no fitting crop, damaged.
        OSError: it cannot be written.
    """
    kind = kind_of(segment, source, path, settings.classifier, settings.kind)
    framing = look(segment, source, path, settings.clip, settings.faces)
    crop = crop_of(framing, settings.clip)
    # A name of its own: an ffmpeg that outlives its killed parent by a moment may still write into an earlier one.
    folder = work / UNFINISHED / f"{segment.clip_id}.{os.getpid()}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        values = cut(segment, source, path, crop, settings.clip, folder)
        place = Path(crop.bucket) / kind / segment.clip_id
        put_in_place(folder, out / place)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    background = framing.background.stillness(crop, (source.width, source.height))
    where = {name: value for name, value in asdict(crop).items() if not name.startswith("to_")}
    named = {"folder": place.as_posix(), "bucket": crop.bucket, "kind": kind, "crop": where}
    return named | values | {"face_seen": framing.face_seen, "static_background": round(background, 4)}


def put_in_place(folder: Path, place: Path) -> None:
    """Moves a finished folder to its place, after what is in it is on the disk; an older one there is removed whole."""
    for name in (VIDEO, SOUND):
        with (folder / name).open("rb") as file:
            os.fsync(file.fileno())
    place.parent.mkdir(parents=True, exist_ok=True)
    remove_folder(place, folder.parent)
    folder.rename(place)


def remove_folder(place: Path, work: Path) -> None:
    """Removes a folder so that no part of it is ever left in its place."""
    old = work / f"{place.name}.old"
    shutil.rmtree(old, ignore_errors=True)
    if place.is_dir():
        place.rename(old)
        shutil.rmtree(old)


def clip_folder(segment: Segment, source: Source, values: dict[str, Any], out: Path) -> ClipFolder:
    """The record of a clip that `make_clip` made."""
    sizes = {name: values[name] for name in ("width", "height", "fps", "frames")}
    return ClipFolder(segment.clip_id, out / values["folder"], segment, source, **sizes)


def remake_clip(segment: Segment, source: Source, path: Path, settings: CropSettings, store: Store) -> dict[str, Any]:
    """Makes a clip; what there was of it before is gone then, wherever it was, and the later steps run anew."""
    before = store.read(CLIPS, segment.clip_id, STEPS_OF_CLIPS[0])
    for step in STEPS_OF_CLIPS:
        store.path(CLIPS, segment.clip_id, step).unlink(missing_ok=True)
    unfinished = store.work / UNFINISHED
    if before and before.values:
        unfinished.mkdir(parents=True, exist_ok=True)
        remove_folder(store.out / before.values["folder"], unfinished)
    return make_clip(segment, source, path, settings, store.out, store.work)

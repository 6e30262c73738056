"""What the steps of data preparation hand on to each other: raw files, stretches of them, clip folders."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

KINDS = ("speech", "singing", "dancing")
"""Folders that clips are sorted into; each has its prompt (see `stableavatar.data.clips.PROMPTS`)."""


@dataclass(frozen=True)
class Source:
    """One raw file as it is shown: upright, with square pixels.

    Attributes:
        id: slug of the file's name and the first 8 hex digits of its content's sha256.
        path: relative to the raw folder, with forward slashes.
        width, height: pixels of the picture as it is shown.
        fps: pictures a second; even: they are evenly spaced (else `fps` is the rate of the grid that they were made on).
        seconds: length of the picture, from the first to the end of the last.
        sound_rate, sound_layout: hertz and channels ("stereo", "5.1") of its first sound.
        kind, person: from the table or from a folder's name.
        clock_start, start: what the file's own clock shows at its start and at its first picture, seconds; all other times count from the
            first picture.
        sound_start, sound_end: where its sound begins and ends (sound_end None: not measured).
        filters: what ffmpeg has to do to its pictures so that they are progressive, of standard range and have square pixels.
    """

    id: str
    path: str
    sha256: str
    width: int
    height: int
    fps: float
    even: bool
    seconds: float
    sound_rate: int
    sound_layout: str
    kind: str | None = None
    person: str | None = None
    clock_start: float = 0.0
    start: float = 0.0
    sound_start: float = 0.0
    sound_end: float | None = None
    filters: str = ""


@dataclass(frozen=True)
class Segment:
    """A stretch of a source that becomes one clip.

    Attributes:
        source: the source's id; of an annotation file: the name (stem) of the video file.
        start, end: seconds from the source's first picture.
        box: x0, y0, x1, y1 in 0..1 of the upright picture: the person that an annotation file means; None for the main one.
        kind, person: what the table or an annotation file says of this stretch; None where they say it of the whole file or not at all.
    """

    source: str
    start: float
    end: float
    box: tuple[float, float, float, float] | None = None
    kind: str | None = None
    person: str | None = None

    @property
    def clip_id(self) -> str:
        """Name of the clip's folder and of its records; two persons of the same stretch differ by a digest of their boxes."""
        person = "-" + hashlib.sha256(repr(self.box).encode()).hexdigest()[:4] if self.box else ""
        return f"{self.source}-{round(self.start * 1000):08d}{person}"


@dataclass(frozen=True)
class ClipFolder:
    """A clip that has been cut: its folder holds sub_clip.mp4 and audio.wav (16 kHz mono, as long as the picture), later also
    vocals.wav, face_masks/ and lip_masks/.

    Attributes:
        id: its folder's name.
        width, height, fps, frames: of sub_clip.mp4, whose frames are evenly spaced.
    """

    id: str
    folder: Path
    segment: Segment
    source: Source
    width: int
    height: int
    fps: float
    frames: int

    @property
    def seconds(self) -> float:
        """Length of the picture."""
        return self.frames / self.fps

"""Clip folders: path lists, what each folder holds, the index that saves asking again.

    talking_face_data/rec/speech/00001/{sub_clip.mp4, audio.wav, images/frame_0.png, face_masks/frame_0.png, lip_masks/frame_0.png}

The pictures are those of images/, else those of sub_clip.mp4; the sound is audio.wav, else that of sub_clip.mp4; masks may be missing.
"""

import json
import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm

from stableavatar.ffmpeg import VideoStream, probe_video
from stableavatar.files import replacing
from stableavatar.geometry import SAMPLE_RATE, samples_to_frames
from stableavatar.media import AudioTrack, read_image

logger = logging.getLogger(__name__)

VIDEO, SOUND, IMAGES, PROMPT = "sub_clip.mp4", "audio.wav", "images", "prompt.txt"
MASKS = ("face_masks", "lip_masks")
PROMPTS = {
    "speech": "The protagonist is talking",
    "singing": "The protagonist is singing",
    "dancing": "The protagonist is simultaneously dancing and singing",
}
"""By the name of the folder that a clip lies in."""
UNCOUNTED = 2
"""Pictures by which images/ may differ from sub_clip.mp4: programs that extract them repeat or drop one at the ends."""


@dataclass(frozen=True)
class Clip:
    """What a clip folder holds.

    Attributes:
        prompt: what it shows.
        width, height, frames, fps: of its pictures as they are.
        video: the stream of sub_clip.mp4 if the pictures are read from there, None if from images/.
        sound: the file that its sound is read from; sound_delay: 16 kHz samples from the first picture to the first sample of that file.
        samples: 16 kHz samples from the first picture to the end of the sound.
        masks: whether it has face masks, lip masks.
    """

    folder: Path
    prompt: str
    width: int
    height: int
    frames: int
    fps: float
    video: VideoStream | None
    sound: str
    sound_delay: int
    samples: int
    masks: tuple[bool, bool]

    @property
    def name(self) -> str:
        """Its folder, as reports name it."""
        return str(self.folder)

    def frames_at(self, fps: float) -> int:
        """Frames at another rate that its pictures and its sound both last, each within half a picture of one."""
        pictures = int(round(self.frames * fps / self.fps, 6))
        near = int(round((self.frames - 0.5) * fps / self.fps, 6)) + 1
        return min(pictures, near, samples_to_frames(self.samples, fps))


def frame_file(folder: Path, frame: int) -> Path:
    """The file of one picture or mask."""
    return folder / f"frame_{frame}.png"


def read_lists(lists: str) -> list[Path]:
    """Clip folders in the order of the lists, each once.

    Args:
        lists: text files separated by commas, one folder per line: absolute, or relative to the working directory or to the list's
            own folder. Blank lines and lines that start with # are skipped.

    Raises:
        ValueError: no list, a list that is missing, unreadable or empty.
    """
    names = [name.strip() for name in lists.split(",") if name.strip()]
    if not names:
        raise ValueError("no path list is given; set data.lists to text files with one clip folder per line")
    folders = [folder for name in names for folder in _read_list(Path(name))]
    counts = Counter(folders)
    if again := [folder for folder, count in counts.items() if count > 1]:
        logger.warning("the path lists name %d folders more than once (%s, ...): each counts once", len(again), again[0])
    return list(counts)


def _read_list(path: Path) -> list[Path]:
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise ValueError(f"cannot read the path list {path}: {reason}; give a text file with one clip folder per line") from None
    folders = [_resolve(line, path.parent) for line in lines if line and not line.startswith("#")]
    if not folders:
        raise ValueError(f"the path list {path} names no clip folder; write one per line")
    return folders


def _resolve(line: str, home: Path) -> Path:
    """An absolute path; a relative one is meant from the working directory unless only the list's own folder has it."""
    here = Path(line)
    return Path(os.path.abspath(home / line if not here.exists() and (home / line).exists() else here))


def find_clips(lists: str, source_fps: float, known: Iterable[Clip] = ()) -> tuple[list[Clip], list[tuple[str, str]]]:
    """The usable clips of path lists, in their order, and (folder, reason) of the broken ones.

    Args:
        source_fps: rate of clips that are only images/, whose files do not tell it.
        known: clips of an index, which are not looked at again.

    Raises:
        ValueError: what `read_lists` raises.
    """
    folders, probed = read_lists(lists), {clip.folder: clip for clip in known}
    with ThreadPoolExecutor() as pool:
        found = pool.map(lambda folder: probed.get(folder) or _try_probe(folder, source_fps), folders)
        found = list(tqdm(found, "clips", len(folders), delay=2))
    return [clip for clip in found if isinstance(clip, Clip)], [broken for broken in found if isinstance(broken, tuple)]


def _try_probe(folder: Path, source_fps: float) -> Clip | tuple[str, str]:
    try:
        return probe(folder, source_fps)
    except (ValueError, OSError) as error:
        return str(folder), one_line(error)


def one_line(error: Exception) -> str:
    """What an error says, on one line."""
    return " ".join(str(error).split()) or type(error).__name__


def probe(folder: Path, source_fps: float) -> Clip:
    """What a clip folder holds; pictures are counted, not decoded.

    Raises:
        ValueError, OSError: it cannot be used, with the reason: no pictures, no sound, files missing or damaged.
    """
    if not folder.is_dir():
        raise ValueError("there is no such folder")
    video = probe_video(folder / VIDEO) if (folder / VIDEO).exists() else None
    images = _count_images(folder, video)
    if not images and video is None:
        raise ValueError(f"no pictures: it has neither {frame_file(Path(IMAGES), 0)} nor {VIDEO}")
    frames = images or video.frames
    width, height = read_image(frame_file(folder / IMAGES, 0), quiet=True).size if images else (video.width, video.height)
    fps = video.fps if video else source_fps
    masks = tuple(_has_frames(folder / name, frames) for name in MASKS)
    return Clip(folder, _prompt(folder), width, height, frames, fps, None if images else video, *_sound(folder, video), masks)


def _count_images(folder: Path, video: VideoStream | None) -> int:
    """Pictures in images/, 0 for none; ValueError for a gap, or if they are not those of the video (whose rate is taken for theirs)."""
    count = len(_numbers(folder / IMAGES))
    if count:
        _has_frames(folder / IMAGES, count)
    if count and video and abs(count - video.frames) > UNCOUNTED:
        raise ValueError(f"{IMAGES}/ holds {count} pictures and {VIDEO} {video.frames}: extract them anew, or remove one of the two")
    return count


def _numbers(folder: Path) -> set[int]:
    """Numbers of the frame_i.png in a folder; none if there is no such folder."""
    names = os.listdir(folder) if folder.is_dir() else []
    return {int(match[1]) for match in (re.fullmatch(r"frame_(0|[1-9]\d*)\.png", name) for name in names) if match}


def _has_frames(folder: Path, count: int) -> bool:
    """Whether there is such a folder; ValueError unless it then holds frame_0.png to frame_{count - 1}.png."""
    numbers = _numbers(folder)
    missing = next((i for i in range(count) if i not in numbers), None)
    if folder.is_dir() and missing is not None:
        raise ValueError(f"{folder.name}/ lacks {frame_file(folder, missing).name}; expected frame_0.png to frame_{count - 1}.png")
    return folder.is_dir()


def _prompt(folder: Path) -> str:
    if (folder / PROMPT).is_file():
        return (folder / PROMPT).read_text(encoding="utf-8-sig").strip()
    return PROMPTS.get(folder.parent.name, PROMPTS["speech"])


def _sound(folder: Path, video: VideoStream | None) -> tuple[str, int, int]:
    """`sound`, `sound_delay` and `samples` of a clip."""
    own = (folder / SOUND).exists()
    if not own and video is None:
        raise ValueError(f"no sound: it has neither {SOUND} nor {VIDEO}; for silence give a silent {SOUND}")
    delay = 0 if own else round(video.sound_delay * SAMPLE_RATE)
    with AudioTrack(folder / (SOUND if own else VIDEO), quiet=True) as track:
        return SOUND if own else VIDEO, delay, max(0, track.samples + delay)


def write_index(path: Path, clips: Sequence[Clip]) -> None:
    """Clips as JSON lines, whole or not at all; ValueError where they cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as part, part.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(asdict(clip), default=str) + "\n" for clip in clips)
    except OSError as error:
        raise ValueError(f"cannot write the clip index {path}: {error.strerror}; choose a writable place with room") from None


def read_index(path: Path) -> list[Clip]:
    """The clips that `write_index` wrote; ValueError where they cannot be read."""
    try:
        with path.open(encoding="utf-8") as file:
            return [_clip(json.loads(line)) for line in file]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"cannot read the clip index {path}: {one_line(error)}; remove it, and the clips are looked at again") from None


def _clip(record: dict) -> Clip:
    video = VideoStream(**record["video"]) if record["video"] else None
    return Clip(**record | {"folder": Path(record["folder"]), "video": video, "masks": tuple(record["masks"])})

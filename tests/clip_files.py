"""Small clip folders for tests: the brightness of a picture is its number, the level of the sound is its time."""

import subprocess
from pathlib import Path

import numpy as np
import soundfile
from media_files import save

from stableavatar import ffmpeg
from stableavatar.data.clips import Clip

WIDTH, HEIGHT = 64, 48
LEVEL = 0.1
"""Level of the sound that is reached after one second."""


def pictures(frames: int, width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    """uint8 [frames, height, width, 3]: all of a picture is as bright as its number, so any part and any size of it tells that."""
    return np.broadcast_to(np.arange(frames, dtype=np.uint8)[:, None, None, None], (frames, height, width, 3)).copy()


def write_images(folder: Path, images: np.ndarray) -> None:
    folder.mkdir(parents=True)
    for number, image in enumerate(images):
        save(folder / f"frame_{number}.png", image)


def write_sound(path: Path, seconds: float, rate: int = 16_000, channels: int = 1) -> None:
    level = LEVEL * np.arange(round(seconds * rate)) / rate
    soundfile.write(path, np.repeat(level[:, None], channels, 1), rate, subtype="FLOAT")


def write_video(path: Path, images: np.ndarray, fps: str, *options: str) -> None:
    """Lossless unless options say otherwise."""
    size = f"{images.shape[2]}x{images.shape[1]}"
    source = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", size, "-r", fps, "-i", "pipe:0"]
    arguments = ffmpeg.command(*source, *(options or ("-c:v", "libx264rgb", "-qp", "0", "-g", "12", "-bf", "2")), str(path))
    subprocess.run([word for word in arguments if word != "-nostdin"], input=images.tobytes(), check=True, capture_output=True)


def make_clip(folder: Path, frames: int = 40, fps: str = "25", source: str = "images", masks: bool = True) -> Path:
    """A clip folder of 64 x 48 with sound as long as its pictures; masks are half dark and half bright."""
    folder.mkdir(parents=True)
    if source == "images":
        write_images(folder / "images", pictures(frames))
    else:
        write_video(folder / "sub_clip.mp4", pictures(frames), fps)
    write_sound(folder / "audio.wav", frames / rate(fps))
    for name in ("face_masks", "lip_masks") if masks else ():
        halves = np.zeros((frames, HEIGHT, WIDTH), np.uint8)
        halves[:, :, WIDTH // 2 :] = 255
        write_images(folder / name, halves)
    return folder


def rate(fps: str) -> float:
    top, _, bottom = fps.partition("/")
    return int(top) / int(bottom or 1)


def record(width: int = WIDTH, height: int = HEIGHT, frames: int = 40, fps: float = 25.0, name: str = "a") -> Clip:
    """What probing a clip would give, without files."""
    samples = round(frames / fps * 16_000)
    return Clip(Path("data/rec/speech") / name, "", width, height, frames, fps, None, "audio.wav", 0, samples, (True, True))

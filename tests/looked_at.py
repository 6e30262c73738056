"""Small videos of two cases and two variants, to be looked at: every frame has one brightness, which tells its time."""

from pathlib import Path

import numpy as np
from media_files import run_ffmpeg, save

from stableavatar.data.preparation.pictures import video_pictures
from stableavatar.evaluation.pairs import Pair
from stableavatar.media import VideoWriter

WIDTH, HEIGHT = 64, 48
STEP = 4
"""Grey levels from one frame to the next at 25 frames a second."""


def write_video(path: Path, frames: int, fps: float = 25, first: int = 20, sound: Path | None = None) -> Path:
    """A video that grows brighter from frame to frame, by the second as fast at any rate."""
    levels = (first + STEP * 25 / fps * np.arange(frames)).clip(0, 250).astype(np.uint8)
    with VideoWriter(path, WIDTH, HEIGHT, fps, sound, {"variant": path.parent.name}) as writer:
        writer.write(np.broadcast_to(levels[:, None, None, None], (frames, HEIGHT, WIDTH, 3)))
    return path


def make_pairs(folder: Path) -> list[Pair]:
    """Variants long and short of the cases one and two, which share their files; the second has no portrait."""
    voice = folder / "voice.wav"
    run_ffmpeg("-f", "lavfi", "-i", "sine=440:duration=2", str(voice))
    portrait = save(folder / "portrait.png", np.full((40, 40, 3), (200, 30, 30), np.uint8))
    truth = write_video(folder / "truth/x.mp4", 80, 50, first=40)
    videos = {"long": write_video(folder / "long/x.mp4", 30, sound=voice), "short": write_video(folder / "short/x.mp4", 20)}
    images = {"one": portrait, "two": None}
    return [Pair(case, variant, 0, video, voice, images[case], truth, ()) for variant, video in videos.items() for case in images]


def decode(path: Path) -> np.ndarray:
    """All frames, uint8 [T, H, W, 3]."""
    return np.stack(list(video_pictures(path).read()))

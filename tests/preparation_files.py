"""Raw videos that the tests of data preparation make for themselves: anything that a folder of downloads may hold."""

import struct
import subprocess
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np
import soundfile
from media_files import run_ffmpeg
from skimage import data

from stableavatar import ffmpeg

RATE = 48_000
FLASH, CLICK = 0.08, 0.004
"""Seconds that a flash stays and a click lasts."""
ENCODE = ("-c:v", "libx264", "-preset", "ultrafast", "-crf", "10", "-pix_fmt", "yuv420p", "-g", "30", "-c:a", "aac", "-b:a", "192k")


def shapes(seconds: float, fps: float = 25, size: tuple[int, int] = (160, 120), seed: int = 0) -> np.ndarray:
    """uint8 [T, H, W, 3]: a coloured room that stands still, before it a shape whose "mouth" opens and closes and which sways."""
    random = np.random.default_rng(seed)
    width, height = size
    room = cv2.resize(random.integers(40, 220, (6, 8, 3), np.uint8), size, interpolation=cv2.INTER_NEAREST)
    skin = tuple(int(level) for level in random.integers(60, 255, 3))
    frames = []
    for time in np.arange(round(seconds * fps)) / fps:
        frame = room.copy()
        centre = int(width * (0.5 + 0.05 * np.sin(2 * time))), int(height * 0.55)
        cv2.ellipse(frame, centre, (width // 5, height // 3), 0, 0, 360, skin, -1)
        mouth = centre[0], centre[1] + height // 8
        cv2.ellipse(frame, mouth, (width // 14, 1 + int(height / 12 * abs(np.sin(9 * time)))), 0, 0, 360, (30, 10, 10), -1)
        frames.append(frame)
    return np.stack(frames)


@lru_cache
def portrait() -> np.ndarray:
    """A real face, uint8 [300, 300, 3]: scikit-image's astronaut, head and shoulders."""
    return np.ascontiguousarray(data.astronaut()[:300, 80:380])


def people(
    seconds: float, fps: float = 25, size: tuple[int, int] = (640, 360), places: Sequence[float] = (0.5,), side: int = 240
) -> np.ndarray:
    """uint8 [T, H, W, 3]: the astronaut once per place (0..1 of the width), before a grey wall with stripes, swaying a little.

    Args:
        side: of the pasted portrait, pixels.
    """
    width, height = size
    wall = np.full((height, width, 3), 120, np.uint8)
    wall[:, :: max(2, width // 16)] = 90
    face = cv2.resize(portrait(), (side, side), interpolation=cv2.INTER_AREA)
    frames = []
    for time in np.arange(round(seconds * fps)) / fps:
        frame = wall.copy()
        for number, place in enumerate(places):
            left = int((width - side) * place + 6 * np.sin(3 * time + number))
            left, top = min(max(left, 0), width - side), height - side
            frame[top:, left : left + side] = face
        frames.append(frame)
    return np.stack(frames)


def flashes(times: Sequence[float], seconds: float, fps: float, size: tuple[int, int] = (160, 120)) -> np.ndarray:
    """uint8 [T, H, W, 3]: dark but for white pictures from each of the times on; frame i is taken at i / fps."""
    shown = np.arange(round(seconds * fps)) / fps
    lit = np.any([(shown >= time - 1e-9) & (shown < time + FLASH - 1e-9) for time in times], axis=0)
    pixels = shapes(seconds, fps, size)
    pixels[lit] = 255
    return pixels


def clicks(times: Sequence[float], seconds: float, channels: int = 1) -> np.ndarray:
    """float [N, channels] at 48 kHz: a click at each of the times, in silence."""
    sound = np.zeros(round(seconds * RATE))
    for time in times:
        first = round(time * RATE)
        burst = np.sin(2 * np.pi * 2000 * np.arange(round(CLICK * RATE)) / RATE)
        sound[first : first + len(burst)] = 0.8 * burst[: len(sound) - first]
    return np.repeat(sound[:, None], channels, 1)


def speech_like(seconds: float, channels: int = 1) -> np.ndarray:
    """float [N, channels] at 48 kHz: a buzz that swells and falls four times a second."""
    time = np.arange(round(seconds * RATE)) / RATE
    buzz = np.sign(np.sin(2 * np.pi * 140 * time)) * 0.2 * np.abs(np.sin(2 * np.pi * 2 * time))
    return np.repeat(buzz[:, None], channels, 1)


def write_film(
    path: Path, pixels: np.ndarray, sound: np.ndarray | None, fps: str = "25", inputs: Sequence[str] = (), options: Sequence[str] = ()
) -> Path:
    """A video with sound (None: without).

    Args:
        pixels: uint8 [T, H, W, 3]; sound: float [N, channels] at 48 kHz.
        inputs: before the pictures are read, options: before the file is written; they override what is usual.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    wav = path.with_name(path.name + ".sound.wav")
    height, width = pixels.shape[1:3]
    source = [*inputs, "-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", fps, "-i", "pipe:0"]
    if sound is not None:
        soundfile.write(wav, sound, RATE, subtype="PCM_16")
        source += ["-i", str(wav), "-map", "0:v", "-map", "1:a"]
    arguments = [word for word in ffmpeg.command("-y", *source, *ENCODE, *options, f"file:{path}") if word != "-nostdin"]
    try:
        subprocess.run(arguments, input=pixels.tobytes(), check=True, capture_output=True)
    finally:
        wav.unlink(missing_ok=True)
    return path


def talking(path: Path, seconds: float = 4.0, fps: str = "25", seed: int = 0, **options: object) -> Path:
    """A video of moving shapes with sound."""
    rate = float(fps.partition("/")[0]) / float(fps.partition("/")[2] or 1)
    return write_film(path, shapes(seconds, rate, seed=seed), speech_like(seconds), fps, **options)


def turned(source: Path, target: Path, degrees: int = 90) -> Path:
    """A copy that asks to be turned when shown, as phones write it."""
    run_ffmpeg("-y", "-display_rotation", str(degrees), "-i", str(source), "-map", "0", "-c", "copy", str(target))
    return target


def uneven(path: Path, seconds: float, kept: np.ndarray, fps: int = 30, times: Sequence[float] = ()) -> Path:
    """A video whose pictures come at uneven times: those of a steady `fps` that `kept` (bool per picture) says; flashes and clicks."""
    chosen = "select='not(" + "+".join(f"eq(n,{index})" for index in np.flatnonzero(~kept)) + ")'"
    return write_film(path, flashes(times, seconds, fps), clicks(times, seconds), str(fps), options=("-vf", chosen, "-fps_mode", "vfr"))


def without_times(source: Path, target: Path) -> Path:
    """A copy of an mp4 whose pictures are all of one time (0 frames a second): its table of durations is zeroed."""
    raw = bytearray(source.read_bytes())
    at = raw.index(b"stts")
    entries = struct.unpack(">I", raw[at + 8 : at + 12])[0]
    for entry in range(entries):
        raw[at + 16 + 8 * entry : at + 20 + 8 * entry] = bytes(4)
    target.write_bytes(raw)
    return target


def damaged(source: Path, target: Path, start: float = 0.5, length: int = 2000) -> Path:
    """A copy with a stretch of noise in its middle."""
    raw = bytearray(source.read_bytes())
    at = int(len(raw) * start)
    raw[at : at + length] = np.random.default_rng(0).integers(0, 256, length, np.uint8).tobytes()
    target.write_bytes(raw)
    return target


def onsets(sound: np.ndarray, rate: int, apart: float = 0.3) -> np.ndarray:
    """Seconds at which clicks start: where the sound rises over a fifth of its peak after `apart` seconds without."""
    loud = np.flatnonzero(np.abs(sound) > 0.2 * np.abs(sound).max()) / rate
    return loud[np.r_[True, np.diff(loud) > apart]]


def flash_times(pixels: np.ndarray, fps: float) -> np.ndarray:
    """Seconds at which pictures turn bright, uint8 [T, H, W, 3]."""
    bright = pixels.reshape(len(pixels), -1).mean(1) > 240
    return np.flatnonzero(bright & ~np.r_[False, bright[:-1]]) / fps


def read_video(path: Path) -> np.ndarray:
    """All pictures of a file, uint8 [T, H, W, 3]."""
    stream = ffmpeg.probe_video(path)
    raw = run_ffmpeg("-i", str(path), "-map", "0:v", "-fps_mode", "passthrough", "-pix_fmt", "rgb24", "-f", "rawvideo", "pipe:1")
    return np.frombuffer(raw, np.uint8).reshape(-1, stream.height, stream.width, 3)

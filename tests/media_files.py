"""What the tests of images, sound and video share: they make their own files."""

import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stableavatar import ffmpeg

REAL = Path(__file__).parents[1] / ".." / "shared" / "media"
needs_real_input = pytest.mark.skipif(not REAL.is_dir(), reason="the real inputs are not here")


def run_ffmpeg(*arguments: str) -> bytes:
    return subprocess.run(ffmpeg.command(*arguments), check=True, capture_output=True).stdout


def tone(seconds: float = 1.0, rate: int = 44_100, channels: int = 1, hertz: float = 440.0) -> np.ndarray:
    wave = 0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)
    return np.repeat(wave[:, None], channels, 1)


def save(path: Path, pixels: np.ndarray, **options: object) -> Path:
    Image.fromarray(pixels).save(path, **options)
    return path

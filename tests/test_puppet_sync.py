"""A click track: sounds at known times, through everything that writes them, are seen and heard at these times."""

import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from stableavatar import ffmpeg
from stableavatar.geometry import FPS, SAMPLE_RATE
from stableavatar.media import AudioTrack
from stableavatar.puppet.identity import draw_identity
from stableavatar.puppet.motion import Motion, draw_motion
from stableavatar.puppet.speech import Phoneme, Utterance
from stableavatar.puppet.visemes import mouth_from_sound, mouth_track
from stableavatar.puppet.world import Scene, write_clip
from stableavatar.video_writer import VideoWriter

SIZE = (128, 128)
FRAMES = 101
CLICKS = (0.4, 0.81, 1.223, 1.64, 2.065, 2.437, 2.88, 3.31)
"""Seconds; on the grid of the frames and between."""
OPEN = 0.2
TOLERANCE = 0.02


def click_track() -> Utterance:
    """A click, and a hum after it, at each time; silence between. Its phonemes are an open vowel there."""
    waveform = np.zeros(round(FRAMES / FPS * SAMPLE_RATE), np.float32)
    noise = np.random.default_rng(0).uniform(-1, 1, round(0.005 * SAMPLE_RATE))
    hum = 0.3 * np.sin(2 * np.pi * 500 * np.arange(round(OPEN * SAMPLE_RATE)) / SAMPLE_RATE)
    hum[: len(noise)] = 0.8 * noise
    edges, symbols = [0.0], []
    for time in CLICKS:
        waveform[round(time * SAMPLE_RATE) :][: len(hum)] = hum
        edges, symbols = [*edges, time, time + OPEN], [*symbols, "", "a"]
    phonemes = [Phoneme(symbol, start, end) for symbol, start, end in zip([*symbols, ""], edges, [*edges[1:], FRAMES / FPS])]
    return Utterance(waveform, tuple(phonemes), "", "", "")


def from_phonemes(said: Utterance) -> tuple[np.ndarray, np.ndarray]:
    return mouth_track(said.phonemes, FRAMES)


def from_sound(said: Utterance) -> tuple[np.ndarray, np.ndarray]:
    return mouth_from_sound(said.waveform, FRAMES)


def scene(mouth: Callable[[Utterance], tuple[np.ndarray, np.ndarray]]) -> Scene:
    """A close face that holds still but for the mouth."""
    said = click_track()
    aperture, _ = mouth(said)
    moving = draw_motion(0, aperture, np.full(FRAMES, 0.5))
    still = {name: track if name in ("aperture", "width") else np.repeat(track[:1], FRAMES) for name, track in vars(moving).items()}
    identity = replace(draw_identity(5, "puppet", "close"), glasses="none", beard="none")
    return Scene("speech", SIZE, identity, said, Motion(**still))


def onsets(track: np.ndarray, rate: float, level: float = 0.5) -> np.ndarray:
    """Seconds at which a track rises through `level` of its range, between the samples."""
    part = (track - track.min()) / np.ptp(track) - level
    before = np.flatnonzero((part[:-1] < 0) & (part[1:] >= 0))
    return (before - part[before] / (part[before + 1] - part[before])) / rate


def openings(frames: np.ndarray, lips: np.ndarray) -> np.ndarray:
    """How much of a mouth differs from the closed one of the first frame [frames], from pixels [frames, H, W, 3] alone."""
    return (np.abs(frames.astype(float) - frames[0]).max(axis=3) > 40)[:, lips].mean(axis=1)


def sounds(waveform: np.ndarray) -> np.ndarray:
    """Seconds at which it gets loud after silence."""
    loud = np.flatnonzero(np.abs(waveform) > 0.2)
    return loud[np.diff(loud, prepend=-SAMPLE_RATE) > 0.1 * SAMPLE_RATE] / SAMPLE_RATE


def decode(video: Path) -> np.ndarray:
    """Frames [n, H, W, 3] as ffmpeg reads them."""
    command = ffmpeg.command(*ffmpeg.file_input(video), "-f", "rawvideo", "-pix_fmt", "rgb24", "pipe:1")
    return np.frombuffer(subprocess.run(command, check=True, capture_output=True).stdout, np.uint8).reshape(-1, *SIZE[::-1], 3)


@pytest.mark.parametrize("mouth", [from_phonemes, from_sound])
def test_a_click_is_seen_and_heard_at_its_time(mouth: Callable, tmp_path: Path) -> None:
    clip, video = tmp_path / "00001", tmp_path / "clip.mp4"
    drawn = scene(mouth)
    write_clip(drawn, clip)
    frames = np.stack([np.asarray(Image.open(clip / f"images/frame_{number}.png")) for number in range(FRAMES)])
    lips = np.stack([np.asarray(Image.open(clip / f"lip_masks/frame_{number}.png")) for number in range(FRAMES)]).any(axis=0)
    with VideoWriter(video, *SIZE, FPS, sound=clip / "audio.wav") as writer:
        writer.write(frames)
    decoded = decode(video)
    assert decoded.shape == frames.shape
    with AudioTrack(video) as track:
        heard_again = track.read(0, track.samples)
    heard, _ = soundfile.read(clip / "audio.wav")
    for pixels, waveform in ((frames, heard), (decoded, heard_again)):
        seen, sounding = onsets(openings(pixels, lips), FPS), sounds(waveform)
        assert seen.shape == sounding.shape == (len(CLICKS),)
        assert np.abs(sounding - CLICKS).max() <= TOLERANCE / 2, sounding - CLICKS
        assert np.abs(seen - CLICKS).max() <= TOLERANCE, seen - CLICKS
        assert np.abs(seen - sounding).max() <= TOLERANCE, seen - sounding


def test_a_shift_of_one_frame_would_be_noticed() -> None:
    drawn = scene(from_phonemes)
    late = np.roll(drawn.motion.aperture, 1)
    assert np.abs(onsets(drawn.motion.aperture, FPS) - CLICKS).max() <= TOLERANCE
    assert np.abs(onsets(late, FPS) - CLICKS).min() > TOLERANCE

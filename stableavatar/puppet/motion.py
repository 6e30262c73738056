"""How a puppet moves: the mouth follows the speech, everything else its own slow rhythms."""

from dataclasses import dataclass

import numpy as np

from stableavatar.puppet.identity import KINDS

RAMP_SECONDS = 0.8
"""A clip starts at rest; after this long the other movements have their full size."""
BLINK_SECONDS = 0.2
BLINK_PAUSE = (2.4, 4.4)
"""Seconds between two blinks: 16 to 17 a minute."""
REST_HAND = 0.5
AMPLITUDES = {
    "speech": {"head_x": 0.02, "head_y": 0.016, "roll": 0.045, "yaw": 0.35, "sway": 0.018, "brow": 0.5, "gaze": 0.45, "hand": 0.2},
    "singing": {"head_x": 0.026, "head_y": 0.02, "roll": 0.08, "yaw": 0.4, "sway": 0.05, "brow": 0.7, "gaze": 0.3, "hand": 0.3},
    "dancing": {"head_x": 0.025, "head_y": 0.02, "roll": 0.05, "yaw": 0.35, "sway": 0.02, "brow": 0.5, "gaze": 0.3, "hand": 0.12},
}
BEAT = {"head_x": 0.03, "head_y": 0.03, "roll": 0.1, "yaw": 0.25, "sway": 0.1, "left_hand": 0.3, "right_hand": 0.3}
"""What the beat adds to a dance."""


@dataclass(frozen=True)
class Motion:
    """Tracks, float32 [frames] each."""

    aperture: np.ndarray
    """0 closed .. 1 widest open."""
    width: np.ndarray
    """Mouth width: 0 rounded .. 0.5 neutral .. 1 spread."""
    blink: np.ndarray
    """0 open .. 1 closed."""
    brow: np.ndarray
    """-1 lowered .. 1 raised."""
    gaze_x: np.ndarray
    """-1 .. 1, as gaze_y; positive is right and down in the picture."""
    gaze_y: np.ndarray
    head_x: np.ndarray
    """Head heights, as head_y; positive is right and down in the picture."""
    head_y: np.ndarray
    roll: np.ndarray
    """Radians, clockwise in the picture."""
    yaw: np.ndarray
    """-1 .. 1: the features slide over the head."""
    sway: np.ndarray
    """Sideways shift of the body, in head heights."""
    left_hand: np.ndarray
    """0 down, out of the picture .. 1 at shoulder height; left in the picture, as right_hand; seen in half framing."""
    right_hand: np.ndarray

    def __len__(self) -> int:
        return len(self.aperture)


def draw_motion(seed: int, aperture: np.ndarray, width: np.ndarray, kind: str = "speech", fps: float = 25) -> Motion:
    """Movement that belongs to a seed, around a mouth that is given.

    Args:
        seed: everything but the mouth follows from it and the length, never from the sound.
        aperture, width: [frames] each, 0 .. 1.
        kind: speech, singing or dancing (strong rhythmic sway of body, head and hands).
        fps: frames a second.
    Raises:
        ValueError: tracks that are not of one length, an unknown kind.
    """
    aperture, width = np.asarray(aperture, dtype=np.float32), np.asarray(width, dtype=np.float32)
    if aperture.ndim != 1 or aperture.shape != width.shape or not len(aperture):
        raise ValueError(f"aperture has shape {aperture.shape} and width {width.shape}, expected one common [frames]")
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}, expected one of {', '.join(KINDS)}")
    rng, times = np.random.default_rng([seed, 2]), np.arange(len(aperture)) / fps
    tracks = _drift(rng, times, AMPLITUDES[kind])
    if kind == "dancing":
        _add_beat(rng, times, tracks)
    for name in ("left_hand", "right_hand"):
        tracks[name] = np.clip(REST_HAND + tracks[name], 0, 1)
    tracks["blink"] = draw_blinks(rng, times)
    limited = {name: np.clip(track, -1, 1).astype(np.float32) for name, track in tracks.items()}
    return Motion(aperture=np.clip(aperture, 0, 1), width=np.clip(width, 0, 1), **limited)


def slow_wave(rng: np.random.Generator, times: np.ndarray, speed: float = 1.0) -> np.ndarray:
    """Three sines of 0.1 .. 0.6 Hz (times speed) with drawn phases that grow from rest; about -1 .. 1."""
    frequencies, phases = speed * np.array([0.13, 0.29, 0.53]) * rng.uniform(0.75, 1.25, 3), rng.uniform(0, 2 * np.pi, 3)
    waves = np.sin(2 * np.pi * frequencies * times[:, None] + phases) @ np.array([0.45, 0.35, 0.2])
    return waves * ramp(times)


def ramp(times: np.ndarray) -> np.ndarray:
    """0 at the start, 1 after RAMP_SECONDS, smooth at both ends."""
    part = np.clip(times / RAMP_SECONDS, 0, 1)
    return part * part * (3 - 2 * part)


def draw_blinks(rng: np.random.Generator, times: np.ndarray) -> np.ndarray:
    """Lids close and open within BLINK_SECONDS, a drawn pause apart; open in frame 0. [frames]."""
    blink, start = np.zeros(len(times)), float(rng.uniform(0.5, BLINK_PAUSE[1]))
    while len(times) and start < times[-1]:
        inside = np.clip((times - start) / BLINK_SECONDS, 0, 1)
        blink = np.maximum(blink, np.where(inside < 1, np.minimum(1, 1.25 * np.sin(np.pi * inside)), 0))
        start += BLINK_SECONDS + float(rng.uniform(*BLINK_PAUSE))
    return blink


def _drift(rng: np.random.Generator, times: np.ndarray, size: dict[str, float]) -> dict[str, np.ndarray]:
    tracks = {name: size[name] * slow_wave(rng, times) for name in ("head_x", "head_y", "roll", "yaw", "sway", "brow")}
    tracks["gaze_x"] = size["gaze"] * slow_wave(rng, times) - 0.3 * tracks["yaw"]
    tracks["gaze_y"] = 0.5 * size["gaze"] * slow_wave(rng, times)
    for name in ("left_hand", "right_hand"):
        tracks[name] = size["hand"] * slow_wave(rng, times, speed=2)
    tracks["head_x"] = tracks["head_x"] + 0.7 * tracks["sway"]
    return tracks


def _add_beat(rng: np.random.Generator, times: np.ndarray, tracks: dict[str, np.ndarray]) -> None:
    """Sway once in two beats of 84 to 120 a minute, nod and hands on every beat or every second one."""
    pace, side = rng.uniform(0.7, 1.0), rng.choice([-1, 1])
    step, nod = side * np.sin(2 * np.pi * pace * times) * ramp(times), np.sin(4 * np.pi * pace * times) * ramp(times)
    for name, amount in BEAT.items():
        wave = nod if name == "head_y" else -step if name == "right_hand" else step
        tracks[name] = tracks[name] + amount * wave
    tracks["head_x"] = tracks["head_x"] + 0.7 * BEAT["sway"] * step
    for name in ("left_hand", "right_hand"):
        tracks[name] = tracks[name] + 0.25 * ramp(times)

"""What a mouth does for phonemes: their classes, and the opening and width of the lips over time.

A symbol of espeak-ng is taken apart into letters ("aɪ" is a, ɪ; "tʃ" is t, ʃ), so that diphthongs move and the inventory stays small.
The targets follow the vowel chart (openness -> aperture; rounding and backness -> width) and the place of articulation.
"""

import unicodedata
from collections.abc import Iterable

import numpy as np

from stableavatar.geometry import FPS, SAMPLE_RATE
from stableavatar.puppet.speech import Phoneme, Utterance

__all__ = ["PHONEMES", "letters", "mouth_from_sound", "mouth_track", "phoneme_ids"]

PAUSE = ""
VISEMES: dict[str, tuple[float, float | None]] = {
    PAUSE: (0.0, 0.5),
    **{"a": (0.95, 0.62), "ɑ": (1.0, 0.5), "ɐ": (0.8, 0.55), "æ": (0.9, 0.75), "ʌ": (0.75, 0.5), "ɒ": (0.8, 0.25)},
    **{"e": (0.5, 0.85), "ɛ": (0.65, 0.75), "ə": (0.45, 0.5), "ɜ": (0.5, 0.42), "ɪ": (0.38, 0.8), "i": (0.28, 1.0)},
    **{"ɨ": (0.32, 0.75), "o": (0.5, 0.12), "ɔ": (0.65, 0.2), "ø": (0.42, 0.18), "œ": (0.55, 0.25), "ɵ": (0.4, 0.25)},
    **{"u": (0.25, 0.0), "ʊ": (0.32, 0.15), "y": (0.25, 0.05)},
    **{"p": (0.0, None), "b": (0.0, None), "m": (0.0, None), "β": (0.08, None), "f": (0.1, 0.55), "v": (0.1, 0.55)},
    **{"w": (0.12, 0.0), "t": (0.22, None), "d": (0.22, None), "n": (0.24, None), "l": (0.32, None), "s": (0.14, 0.7)},
    **{"z": (0.14, 0.7), "θ": (0.24, 0.6), "ð": (0.24, 0.6), "ʃ": (0.22, 0.2), "ʒ": (0.22, 0.2), "ɕ": (0.2, 0.5)},
    **{"ʑ": (0.2, 0.5), "ç": (0.25, 0.75), "j": (0.25, 0.85), "ɲ": (0.25, 0.7), "ʎ": (0.28, 0.7), "k": (0.3, None)},
    **{"ɡ": (0.3, None), "ŋ": (0.3, None), "x": (0.35, None), "ɣ": (0.35, None), "h": (0.4, None), "ʔ": (0.3, None)},
    **{"r": (0.3, None), "ɾ": (0.28, None), "ɹ": (0.28, 0.25), "ʁ": (0.38, None)},
}
"""Letter -> (aperture, width); the width None is that of the neighbours."""
PHONEMES: tuple[str, ...] = tuple(VISEMES)
"""The classes of phonemes; 0 is the pause."""
FOLDED = {
    **{"ʏ": "y", "ɚ": "əɹ", "ɝ": "ɜɹ", "ɤ": "ʌ", "ɯ": "ɨ", "ʉ": "u", "ɘ": "ə", "ɶ": "œ", "ɞ": "œ", "ᵻ": "ɪ", "ɫ": "l", "ɬ": "l"},
    **{"g": "ɡ", "ʋ": "v", "ɸ": "β", "ɱ": "m", "ɥ": "j", "ʍ": "w", "ɦ": "h", "ħ": "h", "χ": "x", "ʀ": "ʁ", "ʝ": "j", "c": "k"},
    **{"ɟ": "ɡ", "q": "k", "ɢ": "ɡ", "ɴ": "ŋ", "ɳ": "n", "ʈ": "t", "ɖ": "d", "ʂ": "ʃ", "ʐ": "ʒ", "ɻ": "ɹ", "ɽ": "ɾ", "ɭ": "l"},
    **{"ʧ": "tʃ", "ʤ": "dʒ", "ʦ": "ts", "ʣ": "dz", "ɰ": "ɣ", "ʕ": "ʔ", "ʟ": "l"},
}
"""Rare letters -> their nearest classes."""
UNKNOWN = "ə"
HELD_CLOSED = frozenset({PAUSE, "p", "b", "m", "β"})
RELEASED = {"p": 0.6, "b": 0.8}
"""Part of the phoneme until the lips burst open."""
GLIDE = 0.055
"""Seconds from the edge of a phoneme to its target."""
GRID = 0.005
"""Seconds; the finest step of the track."""
OPEN_LEVEL = 0.9
"""Of recorded speech, the quantile of the loudness in decibels that opens the mouth wide."""
FLOOR_DB = 30.0
"""Recorded sound this far under the loud parts leaves the mouth closed."""


def letters(symbol: str) -> tuple[str, ...]:
    """The classes (members of `PHONEMES`) a symbol of espeak-ng is made of; marks of stress, length and colour are dropped.

    An unknown letter counts as a neutral vowel; a symbol of marks alone as a pause.
    """
    found: list[str] = []
    for mark in unicodedata.normalize("NFD", symbol.replace("ç", "\0")):
        mark = "ç" if mark == "\0" else mark
        if mark in VISEMES or mark in FOLDED:
            found += FOLDED.get(mark, mark)
        elif unicodedata.category(mark) in ("Ll", "Lo"):
            found.append(UNKNOWN)
    return tuple(found) or (PAUSE,)


def phoneme_ids(utterance: Utterance) -> list[tuple[int, float, float]]:
    """(class, start, end) in seconds of an utterance; the class is an index of `PHONEMES`, neighbouring pauses are one."""
    return [(PHONEMES.index(letter), start, end) for letter, start, end in _parts(utterance.phonemes)]


def mouth_track(phonemes: Iterable[Phoneme], frames: int, fps: float = FPS) -> tuple[np.ndarray, np.ndarray]:
    """Opening and width of the mouth at the times i / fps.

    Each phoneme is reached within `GLIDE` and left as long before its end, by raised cosines; pauses and p, b, m hold the lips closed.

    Returns:
        aperture (0 closed .. 1 wide open) and width (0 rounded, 0.5 neutral, 1 spread): float32 [frames].

    Raises:
        ValueError: fewer than one frame, fps that is not positive.
    """
    _check(frames, fps)
    keys: list[tuple[float, float, float | None]] = []
    for letter, start, end in _parts(phonemes):
        keys += [(time, *VISEMES[letter]) for time in _held(letter, start, end)]
    times = np.arange(0, round((frames + 1) / fps / GRID)) * GRID
    aperture = _glide(times, [(time, opening) for time, opening, _ in keys], rest=0.0)
    width = _glide(times, [(time, wide) for time, _, wide in keys if wide is not None], rest=0.5)
    return _at_frames(aperture, frames, fps), _at_frames(width, frames, fps)


def mouth_from_sound(waveform: np.ndarray, frames: int, fps: float = FPS) -> tuple[np.ndarray, np.ndarray]:
    """Opening and width of the mouth guessed from recorded speech: loudness opens it, bright sounds widen it.

    Args:
        waveform: float [samples] at 16 kHz.

    Returns:
        As `mouth_track`.

    Raises:
        ValueError: a waveform that is not one-dimensional, fewer than one frame, fps that is not positive.
    """
    _check(frames, fps)
    if waveform.ndim != 1:
        raise ValueError(f"got a waveform of shape {waveform.shape}; expected [samples] at 16 kHz")
    power = _spectrogram(waveform, round((frames + 1) / fps / GRID))
    frequencies = np.linspace(0, SAMPLE_RATE / 2, power.shape[1])
    voiced = power[:, (frequencies > 200) & (frequencies < 4000)].sum(1)
    level = 10 * np.log10(voiced + 1e-10)
    loud = max(np.quantile(level[level > level.max() - FLOOR_DB], OPEN_LEVEL), -40.0)
    aperture = ((level - loud + FLOOR_DB) / FLOOR_DB).clip(0, 1) ** 2
    centroid = (power @ frequencies) / (power.sum(1) + 1e-10)
    usual = np.median(centroid[aperture >= np.quantile(aperture, 0.7)])
    brightness = np.log2((centroid + 1) / (usual + 1)).clip(-1, 1) / 2
    width = 0.5 + brightness * np.minimum(1, aperture * 4)
    return _at_frames(_smooth(aperture, 9), frames, fps), _at_frames(_smooth(width, 15), frames, fps)


def _check(frames: int, fps: float) -> None:
    if frames < 1 or not fps > 0:
        raise ValueError(f"got frames={frames}, fps={fps}; expected at least one frame and a positive rate")


def _parts(phonemes: Iterable[Phoneme]) -> list[tuple[str, float, float]]:
    """(letter, start, end): symbols cut into equal parts, neighbouring pauses joined."""
    parts: list[tuple[str, float, float]] = []
    for phoneme in phonemes:
        found = letters(phoneme.symbol)
        edges = np.linspace(phoneme.start, phoneme.end, len(found) + 1).tolist()
        for letter, start, end in zip(found, edges[:-1], edges[1:]):
            if parts and letter == PAUSE == parts[-1][0]:
                start = parts.pop()[1]
            parts.append((letter, start, end))
    return parts


def _held(letter: str, start: float, end: float) -> tuple[float, float]:
    """From when to when the mouth is in the phoneme's place."""
    if letter in HELD_CLOSED:
        edge = min(0.02, (end - start) / 4) if letter == PAUSE else 0.0
        return start + edge, max(start + edge, start + RELEASED.get(letter, 1) * (end - start) - edge)
    glide = min(GLIDE, (end - start) / 2)
    return start + glide, end - glide


def _glide(times: np.ndarray, keys: list[tuple[float, float]], rest: float) -> np.ndarray:
    """Raised cosines between (time, value) keys in order of time."""
    if not keys:
        return np.full(len(times), rest)
    moments, values = np.array(keys).T
    after = np.searchsorted(moments, times, side="right").clip(1, max(1, len(moments) - 1))
    before = after - 1
    after = np.minimum(after, len(moments) - 1)
    part = ((times - moments[before]) / np.maximum(moments[after] - moments[before], 1e-6)).clip(0, 1)
    return values[before] + (values[after] - values[before]) * (0.5 - 0.5 * np.cos(np.pi * part))


def _at_frames(track: np.ndarray, frames: int, fps: float) -> np.ndarray:
    """A track on the grid, averaged over half a frame around each frame's time."""
    smooth = _smooth(track, 1 + 2 * int(0.25 / fps / GRID))
    return np.interp(np.arange(frames) / fps, np.arange(len(track)) * GRID, smooth).clip(0, 1).astype(np.float32)


def _smooth(track: np.ndarray, size: int) -> np.ndarray:
    """Average of `size` (odd) steps of the grid around each; the ends are repeated."""
    return np.convolve(np.pad(track, size // 2, mode="edge"), np.full(size, 1 / size), mode="valid")


def _spectrogram(waveform: np.ndarray, steps: int) -> np.ndarray:
    """Power [steps, frequencies] of 25 ms windows around each step of the grid; silence after the end."""
    hop, size = round(GRID * SAMPLE_RATE), 400
    padded = np.zeros(size + hop * steps)
    kept = waveform[: len(padded) - size // 2]
    padded[size // 2 : size // 2 + len(kept)] = kept
    windows = np.lib.stride_tricks.sliding_window_view(padded, size)[::hop][:steps]
    return np.abs(np.fft.rfft(windows * np.hanning(size), axis=1)) ** 2 / size

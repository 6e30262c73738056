"""Utterances held in memory, cut and altered into batches for the training of the speech encoder."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import soxr
import torch
from torch import Tensor

from stableavatar.geometry import SAMPLE_RATE
from stableavatar.puppet.speech import KIND_SHARES, draw_utterance
from stableavatar.puppet.visemes import mouth_track, phoneme_ids
from stableavatar.workers import shared_out

__all__ = ["HOP", "Batch", "Segment", "draw_segments", "training_batch"]

HOP, FIELD = 320, 400
"""Samples between the tokens of wav2vec2 and of each token's receptive field."""
SHORTEST, LONGEST = 1.64, 3.24
"""Seconds of a segment: the avatar model hears 41 or 81 frames at once."""
SMOOTH = 640
"""Lengths are multiples of it: Fourier transforms of lengths with large prime factors take ten times as long."""
SPARE = 0.6
"""Seconds drawn beyond the longest, for cuts and speed."""
SPEED = 0.15
"""Largest change of speed (and of pitch and formants with it, so that voices that were not there are understood)."""
TRACK_RATE = 200
"""Samples per second of the mouth's tracks before they are read at the tokens' times."""


@dataclass(frozen=True)
class Segment:
    """An utterance.

    Attributes:
        waveform: float32 [samples] at 16 kHz.
        phonemes: (class, start, end) in seconds.
        mouth: float32 [times, 2]: aperture and width, `TRACK_RATE` a second.
    """

    waveform: np.ndarray
    phonemes: tuple[tuple[int, float, float], ...]
    mouth: np.ndarray


@dataclass(frozen=True)
class Batch:
    """What one step trains on.

    Attributes:
        waveforms: float32 [B, samples], each of zero mean and unit variance.
        labels: int64 [B, phonemes], -100 after the last; without pauses.
        classes: int64 [B, tokens], the phoneme at each token's time; 0 for a pause.
        mouths: float32 [B, tokens, 2], aperture and width at each token's time.
    """

    waveforms: Tensor
    labels: Tensor
    classes: Tensor
    mouths: Tensor


def token_count(samples: int) -> int:
    """Tokens that wav2vec2's convolutions make of so many samples."""
    return max(0, (samples - FIELD) // HOP + 1)


def token_times(tokens: int) -> np.ndarray:
    """Seconds of the middle of each token's receptive field [tokens]."""
    return (np.arange(tokens) * HOP + FIELD / 2) / SAMPLE_RATE


def draw_segments(
    count: int, seed: int, seconds: float = LONGEST + SPARE, held_out: bool = False, workers: int = 1
) -> list[Segment]:
    """So many utterances of the world's voices; they do not depend on the number of processes.

    In training's, three of four that speak do so in invented words, and two of them in invented voices: of the world's few the model
    would learn a vocabulary and its speakers, and mishear new ones.
    """
    return list(shared_out(partial(_draw_segment, seed, seconds, held_out), range(count), workers))


def _draw_segment(seed: int, seconds: float, held_out: bool, number: int) -> Segment:
    rng = np.random.default_rng([seed, number, held_out])
    kind = str(rng.choice(list(KIND_SHARES), p=list(KIND_SHARES.values())))
    fancy = 0 if held_out else number % 4
    utterance = draw_utterance(int(rng.integers(2**31)), seconds, kind, held_out, nonsense=fancy > 0, invented=fancy > 1)
    mouth = np.stack(mouth_track(utterance.phonemes, round(seconds * TRACK_RATE), TRACK_RATE), axis=1)
    return Segment(utterance.waveform, tuple(phoneme_ids(utterance)), mouth)


def training_batch(pool: list[Segment], size: int, rng: np.random.Generator) -> Batch:
    """Random cuts of one random length, each altered in speed, colour and noise."""
    samples = round(rng.uniform(SHORTEST, LONGEST) * SAMPLE_RATE / SMOOTH) * SMOOTH
    drawn = [_cut(pool[rng.integers(len(pool))], samples, rng) for _ in range(size)]
    return collate(replace(cut, waveform=augment(cut.waveform, rng)) for cut in drawn)


def collate(segments: Iterable[Segment]) -> Batch:
    """A batch of segments of one length, with a mouth at each token's time."""
    waveforms, phonemes, mouths = zip(*((each.waveform, each.phonemes, each.mouth) for each in segments))
    seconds = len(waveforms[0]) / SAMPLE_RATE
    labels = [torch.tensor(spoken(each, seconds)) for each in phonemes]
    times = token_times(token_count(len(waveforms[0])))
    return Batch(
        torch.from_numpy(np.stack([normalise(waveform) for waveform in waveforms])),
        torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100).long(),
        torch.from_numpy(np.stack([classes_at(each, times) for each in phonemes])),
        torch.from_numpy(np.stack([mouth_at(each, times) for each in mouths])),
    )


def spoken(phonemes: Iterable[tuple[int, float, float]], seconds: float) -> list[int]:
    """Classes whose middle lies in the segment, without pauses."""
    return [index for index, start, end in phonemes if index and 0 <= (start + end) / 2 < seconds]


def classes_at(phonemes: Iterable[tuple[int, float, float]], times: np.ndarray) -> np.ndarray:
    """The class at each time, int64; 0 where there is none."""
    found = np.zeros(len(times), np.int64)
    for index, start, end in phonemes:
        found[np.searchsorted(times, start) : np.searchsorted(times, end)] = index
    return found


def mouth_at(mouth: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Aperture and width of a segment's track at each time [times, 2], float32."""
    return np.stack([np.interp(times * TRACK_RATE, np.arange(len(track)), track) for track in mouth.T], axis=1).astype(np.float32)


def normalise(waveform: np.ndarray) -> np.ndarray:
    """Zero mean, unit variance, as Wav2Vec2FeatureExtractor does it."""
    return ((waveform - waveform.mean()) / np.sqrt(waveform.var() + 1e-7)).astype(np.float32)


def _cut(segment: Segment, samples: int, rng: np.random.Generator) -> Segment:
    """So many samples from a random place on, played faster or slower; phonemes and mouth in the cut's own time."""
    speed = rng.uniform(1 - SPEED, 1 + SPEED)
    needed = int(samples * speed) + HOP
    first = int(rng.integers(max(1, len(segment.waveform) - needed)))
    waveform = soxr.resample(segment.waveform[first : first + needed], speed * SAMPLE_RATE, SAMPLE_RATE, quality="LQ")[:samples]
    waveform = np.pad(waveform, (0, samples - len(waveform)))
    begin = first / SAMPLE_RATE
    mouth = mouth_at(segment.mouth, begin + speed * np.arange(round(samples / SAMPLE_RATE * TRACK_RATE)) / TRACK_RATE)
    phonemes = tuple((index, (start - begin) / speed, (end - begin) / speed) for index, start, end in segment.phonemes)
    return Segment(waveform, phonemes, mouth)


def augment(waveform: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Another microphone and room: an equaliser, sometimes an early echo, a low-pass and coloured noise of 15 to 40 dB SNR."""
    spectrum = np.fft.rfft(waveform)
    octaves = np.log2(np.linspace(0, SAMPLE_RATE / 2, len(spectrum)) + 62.5)
    knots = np.linspace(octaves[0], octaves[-1], 8)
    spectrum *= 10 ** (np.interp(octaves, knots, rng.normal(0, 3.0, 8)) / 20)
    if rng.random() < 0.3:
        spectrum *= 1 / (1 + 2.0 ** (8 * (octaves - np.log2(rng.uniform(2500, 7000)))))
    altered = np.fft.irfft(spectrum, len(waveform))
    if rng.random() < 0.3:
        delay = int(rng.uniform(0.003, 0.03) * SAMPLE_RATE)
        altered[delay:] += rng.uniform(0.1, 0.4) * altered[:-delay]
    if rng.random() < 0.5:
        altered += _noise(len(waveform), rng) * altered.std() * 10 ** (-rng.uniform(15, 40) / 20)
    return altered.astype(np.float32)


def _noise(samples: int, rng: np.random.Generator) -> np.ndarray:
    """White to brown noise of unit variance."""
    spectrum = np.fft.rfft(rng.standard_normal(samples))
    spectrum[1:] *= np.arange(1, len(spectrum)) ** -rng.uniform(0.0, 1.0)
    noise = np.fft.irfft(spectrum, samples)
    return noise / noise.std()

"""The sound of a clip: the voice alone, loudness, how much of it is speech, silence, overdriven."""

import logging
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import webrtcvad

from stableavatar import ffmpeg
from stableavatar.data.clips import SOUND
from stableavatar.data.preparation.records import ClipFolder
from stableavatar.data.preparation.settings import VoiceConfig
from stableavatar.data.vocals import VocalSeparator
from stableavatar.files import replacing
from stableavatar.geometry import SAMPLE_RATE
from stableavatar.media import AudioTrack

logger = logging.getLogger(__name__)

VOCALS, RECORDING = "vocals.wav", "recording.wav"
"""The voice alone; the sound as it was cut, kept where audio.wav was changed."""
PIECE = SAMPLE_RATE * 3 // 100
"""Samples of 30 ms, the longest piece that webrtcvad judges."""
PIECES_AT_ONCE = 2000
SILENT = 10 ** (-50 / 20)
"""Root mean square of a piece below which it is silent: -50 dB of full scale, about the noise of a quiet room."""
OVERDRIVEN = 0.999
LOUDEST_PEAK = -1.0
"""dBTP that a raised sound may reach (EBU R 128)."""
UNMEASURABLE = -70.0
"""LUFS that ffmpeg gives to sound that is silent or shorter than 0.4 s."""


@dataclass(frozen=True)
class Level:
    """Integrated loudness in LUFS (None: silent, or shorter than 0.4 s) and true peak in dB of full scale (EBU R 128)."""

    loudness: float | None
    peak: float | None


def process_voice(clip: ClipFolder, config: VoiceConfig) -> dict[str, float | bool | None]:
    """Writes vocals.wav and, if it is asked for, a changed audio.wav, always from the sound as it was cut; measures the sound.

    Returns:
        loudness, peak: of audio.wav as it now is, in LUFS and dBTP (None: silent); gain: dB that were added to it.
        overdriven: share of the samples at full scale; silence: share of the time below -50 dB: both of the sound as it was cut.
        voice: share of the time with a voice, of vocals.wav where it was made (music passes for a voice).
        vocals: whether audio.wav is the separated voice.

    Raises:
        ValueError: no readable sound.
        OSError: the separator does not load, or a file cannot be written: no fault of the clip's.
    """
    kept, current = clip.folder / RECORDING, clip.folder / SOUND
    recording = kept if kept.exists() else current
    vocals = _separate(clip, config, recording)
    chosen = vocals if config.train_on_vocals and vocals else recording
    level = measure_level(chosen)
    gain = _gain(level, config.loudness)
    if chosen is vocals or gain:
        _replace_sound(recording, chosen, gain, clip)
    elif kept.exists():
        kept.replace(current)
    return _shares(kept if kept.exists() else current, vocals, config.strictness) | {
        "loudness": None if level.loudness is None else round(level.loudness + gain, 2),
        "peak": None if level.peak is None else round(level.peak + gain, 2),
        "gain": round(gain, 2),
        "vocals": chosen is vocals,
    }


def measure_level(path: Path) -> Level:
    """The level of a whole file by ffmpeg's ebur128; ValueError if it cannot be read."""
    meter = ["-map", "0:a:0", "-af", "ebur128=peak=true:framelog=verbose", "-f", "null", "-"]
    run = subprocess.run(ffmpeg.command("-v", "info", *ffmpeg.file_input(path), *meter), stderr=subprocess.PIPE)
    log = run.stderr.decode(errors="replace")
    summary = log[log.rfind("Summary:") :]
    loudness, peak = (re.search(rf"{name}:\s+(\S+) {unit}", summary) for name, unit in (("I", "LUFS"), ("Peak", "dBFS")))
    if run.returncode or not loudness or not peak:
        raise ValueError(f"cannot measure the loudness of {path}: {ffmpeg.reason(log)}")
    values = float(loudness[1]), float(peak[1])
    return Level(values[0] if values[0] > UNMEASURABLE else None, values[1] if np.isfinite(values[1]) else None)


def _gain(level: Level, target: float) -> float:
    """dB to add, 0 where nothing is asked for or there is nothing to raise."""
    if not target or level.loudness is None or level.peak is None:
        return 0.0
    return min(target - level.loudness, max(LOUDEST_PEAK - level.peak, 0.0))


def _separate(clip: ClipFolder, config: VoiceConfig, recording: Path) -> Path | None:
    """vocals.wav as 16 kHz mono, sample for sample as long as the recording; None, and none left from before, if it is not asked for."""
    target = clip.folder / VOCALS
    if not config.separator:
        target.unlink(missing_ok=True)
        return None
    with AudioTrack(recording, quiet=True) as track:
        samples = track.samples
    with tempfile.TemporaryDirectory() as scratch:
        voice = _separator(config.separator, config.device).separate(recording, scratch)
        whole = f"aresample={SAMPLE_RATE},apad=whole_len={samples},atrim=end_sample={samples}"
        _convert(voice, target, ["-ac", "1", "-rematrix_maxval", "1", "-af", whole])
    return target


@lru_cache(maxsize=1)
def _separator(model: str, device: str) -> VocalSeparator:
    try:
        return VocalSeparator(model, device)
    except ValueError as error:
        raise OSError(str(error)) from error


def _replace_sound(recording: Path, chosen: Path, gain: float, clip: ClipFolder) -> None:
    """audio.wav becomes the chosen sound, louder by the gain; recording.wav is there before that."""
    kept, current = clip.folder / RECORDING, clip.folder / SOUND
    if recording != kept:
        with replacing(kept) as part:
            shutil.copyfile(recording, part)
    logger.info("%s: audio.wav is now %s, %+.1f dB; %s keeps the original", clip.id, "the voice alone" if chosen.name == VOCALS else
                "the recording", gain, RECORDING)
    _convert(kept if chosen == recording else chosen, current, ["-af", f"volume={gain:.4f}dB"])


def _convert(source: Path, target: Path, options: list[str]) -> None:
    with replacing(target) as part:
        form = ["-map", "0:a:0", *options, "-c:a", "pcm_s16le", "-f", "wav"]
        run = subprocess.run(ffmpeg.command("-y", *ffmpeg.file_input(source), *form, f"file:{part}"), stderr=subprocess.PIPE)
        if run.returncode:
            raise OSError(f"cannot write {target}: {ffmpeg.reason(run.stderr.decode(errors='replace'))}")


def _shares(recording: Path, vocals: Path | None, strictness: int) -> dict[str, float]:
    """`overdriven` and `silence` of the recording, `voice` of the vocals or else of the recording."""
    judge = webrtcvad.Vad(strictness)
    overdriven = silent = voiced = total = heard = 0
    with AudioTrack(recording, quiet=True) as track:
        for pieces in _pieces(track):
            overdriven += int((np.abs(pieces) >= OVERDRIVEN).sum())
            silent += int((np.sqrt(np.mean(np.square(pieces), axis=1)) < SILENT).sum())
            total += len(pieces)
    with AudioTrack(vocals or recording, quiet=True) as track:
        for pieces in _pieces(track):
            samples = (pieces * 32767).round().astype("<i2")
            voiced += sum(judge.is_speech(piece.tobytes(), SAMPLE_RATE) for piece in samples)
            heard += len(pieces)
    if not total:
        raise ValueError(f"{recording} is shorter than {PIECE / SAMPLE_RATE} s; its sound cannot be judged")
    return {name: round(count / of, 5) for name, count, of in
            (("overdriven", overdriven, total * PIECE), ("silence", silent, total), ("voice", voiced, heard))}


def _pieces(track: AudioTrack) -> Iterator[np.ndarray]:
    """All whole pieces of a sound, float32 [N, 480] at a time."""
    count = track.samples // PIECE
    for first in range(0, count, PIECES_AT_ONCE):
        last = min(first + PIECES_AT_ONCE, count)
        yield track.read(first * PIECE, last * PIECE).reshape(-1, PIECE)

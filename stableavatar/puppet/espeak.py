"""espeak-ng through its C interface (`speak_lib.h` of espeak-ng 1.52, shipped in the package espeakng-loader).

The library keeps state in globals (random numbers, phases of its oscillators, the voice), so that a text sounds a little different each
time. Every call here therefore loads it afresh and unloads it again, which takes 4 ms and makes the sound a function of the arguments.
"""

import _ctypes
import ctypes
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import espeakng_loader
import numpy as np

__all__ = ["ESPEAK_RATE", "Spoken", "draw_variant", "synthesise", "variants"]

ESPEAK_RATE = 22050
"""Samples per second of what espeak-ng returns."""
SYNCHRONOUS = 2
PHONEME_EVENTS_IN_IPA = 0x0003
EVENT_END_OF_LIST = 0
EVENT_PHONEME = 7
UTF8 = 1
PARAMETERS = {"rate": 1, "pitch": 3, "pitch_range": 4}
RANDOM_SEED = 1
INVENTED = "invented"
"""The name that espeak-ng is told of a variant that is given as text."""
FORMANTS = 9

_lock = threading.Lock()


class _EventId(ctypes.Union):
    _fields_ = [("number", ctypes.c_int), ("name", ctypes.c_char_p), ("string", ctypes.c_char * 8)]


class _Event(ctypes.Structure):
    _fields_ = [
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", _EventId),
    ]


_Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event))


@dataclass(frozen=True)
class Spoken:
    """What espeak-ng said.

    Attributes:
        samples: int16 [samples] at `ESPEAK_RATE`.
        marks: (IPA symbol, first sample) of each phoneme in order; an empty symbol is a pause.
    """

    samples: np.ndarray
    marks: tuple[tuple[str, int], ...]


def variants() -> frozenset[str]:
    """Names of the voice variants: "m1", "f3" and so on."""
    return frozenset(path.name for path in (Path(espeakng_loader.get_data_path()) / "voices" / "!v").iterdir())


def synthesise(text: str, voice: str, variant: str, pitch: int = 50, rate: int = 160, pitch_range: int = 50) -> Spoken:
    """Speak a text; the same arguments give the same samples.

    Args:
        voice: language of espeak-ng, as "en-us".
        variant: one of `variants()`, or the lines of a file of that kind, as `draw_variant` writes them.
        pitch: 0 to 100, 24 semitones apart.
        rate: words per minute, 80 to 450.
        pitch_range: 0 (monotone) to 100.

    Raises:
        ValueError: an unknown voice or variant, a pitch or rate out of range, a text without a sound.
    """
    if not _is_lines(variant) and variant not in variants():
        raise ValueError(f"got the voice variant {variant!r}; expected one of espeak-ng's, as m1 or f3")
    if not (0 <= pitch <= 100 and 80 <= rate <= 450 and 0 <= pitch_range <= 100):
        raise ValueError(f"got pitch={pitch}, rate={rate}, pitch_range={pitch_range}; expected 0..100, 80..450, 0..100")
    with _lock, _data_with(variant) as (data, name), _fresh_library(data) as library:
        if library.espeak_SetVoiceByName(f"{voice}+{name}".encode()) != 0:
            raise ValueError(f"got the voice {voice!r}; expected a language of espeak-ng, as en-us or de")
        for name, value in (("rate", rate), ("pitch", pitch), ("pitch_range", pitch_range)):
            library.espeak_SetParameter(PARAMETERS[name], value, 0)
        spoken = _collect(library, text)
    if not any(symbol for symbol, _ in spoken.marks):
        raise ValueError(f"got the text {text!r}, which espeak-ng does not pronounce in {voice}; expected words")
    return spoken


def draw_variant(rng: np.random.Generator) -> str:
    """A voice that nobody has: the lines of a variant's file (docs/voices.md of espeak-ng), in the ranges that its own move in.

    Pitch, size of the throat, place, strength and width of each formant, colour of the tone; sometimes breath, roughness, an echo.
    """
    low, size = rng.uniform(60, 190), rng.uniform(0.88, 1.2)
    lines = ["language variant", f"name {INVENTED}", f"pitch {low:.0f} {low * rng.uniform(1.25, 1.8):.0f}"]
    strength, width = rng.uniform(60, 120), rng.uniform(75, 160)
    for number in range(FORMANTS):
        place = 100 * size * rng.normal(1, 0.06)
        shift = rng.choice([0, rng.uniform(-200, 200)], p=[0.8, 0.2]) if number in (1, 2) else 0  # in hertz
        lines.append(f"formant {number} {place:.0f} {strength * rng.uniform(0.7, 1.3):.0f} {width * rng.uniform(0.8, 1.2):.0f} {shift:.0f}")
    lines += [f"voicing {rng.uniform(50, 180):.0f}", f"consonants {rng.uniform(60, 150):.0f} {rng.uniform(50, 150):.0f}"]
    lines += [f"roughness {rng.integers(5)}", f"flutter {rng.integers(8)}"]
    if rng.random() < 0.4:
        levels = rng.uniform(60, 255), rng.uniform(15, 130), rng.uniform(10, 100)
        lines.append("tone 100 255 600 {:.0f} 1200 {:.0f} 2400 {:.0f}".format(*levels))
    if rng.random() < 0.3:
        lines.append("breath 0 " + " ".join(f"{rng.uniform(1, 6):.0f}" for _ in range(7)))
    if rng.random() < 0.3:
        lines.append(f"echo {rng.uniform(30, 140):.0f} {rng.uniform(5, 20):.0f}")
    return "\n".join(lines) + "\n"


def _is_lines(variant: str) -> bool:
    """Whether that is a variant's file and not a name."""
    return "\n" in variant


@contextmanager
def _data_with(variant: str) -> Iterator[tuple[Path, str]]:
    """A data folder of espeak-ng that has a variant, and its name there; one given as lines gets a folder of links beside its file."""
    data = Path(espeakng_loader.get_data_path())
    if not _is_lines(variant):
        yield data, variant
        return
    with tempfile.TemporaryDirectory() as folder:
        for entry in data.iterdir():
            if entry.name != "voices":
                (Path(folder) / entry.name).symlink_to(entry)
        own = Path(folder) / "voices" / "!v"
        own.mkdir(parents=True)
        (own / INVENTED).write_text(variant, encoding="utf-8")
        yield Path(folder), INVENTED


@contextmanager
def _fresh_library(data: Path) -> Iterator[ctypes.CDLL]:
    if sys.platform == "win32":
        raise ValueError("espeak-ng is driven on Linux and macOS only; got Windows")
    library = ctypes.CDLL(espeakng_loader.get_library_path())
    try:
        rate = library.espeak_Initialize(SYNCHRONOUS, 0, str(data).encode(), PHONEME_EVENTS_IN_IPA)
        assert rate == ESPEAK_RATE, rate
        library.espeak_ng_SetRandSeed(ctypes.c_long(RANDOM_SEED))
        yield library
    finally:
        library.espeak_Terminate()
        _ctypes.dlclose(library._handle)


def _collect(library: ctypes.CDLL, text: str) -> Spoken:
    chunks: list[np.ndarray] = []
    marks: list[tuple[str, int]] = []

    def receive(samples: object, count: int, events: object) -> int:
        if count > 0:
            chunks.append(np.ctypeslib.as_array(samples, (count,)).copy())
        for event in events:  # a pointer: ends with the list
            if event.type == EVENT_END_OF_LIST:
                break
            if event.type == EVENT_PHONEME:
                marks.append((event.id.string.decode("utf-8", "ignore"), event.sample))
        return 0

    callback = _Callback(receive)
    library.espeak_SetSynthCallback(callback)
    encoded = text.encode()
    status = library.espeak_Synth(ctypes.c_char_p(encoded), ctypes.c_size_t(len(encoded) + 1), 0, 1, 0, UTF8, None, None)
    assert status == 0, status
    return Spoken(np.concatenate(chunks) if chunks else np.zeros(0, np.int16), tuple(marks))

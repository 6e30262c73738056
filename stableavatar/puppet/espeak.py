"""espeak-ng through its C interface (`speak_lib.h` of espeak-ng 1.52, shipped in the package espeakng-loader).

The library keeps state in globals (random numbers, phases of its oscillators, the voice), so that a text sounds a little different each
time. Every call here therefore loads it afresh and unloads it again, which takes 4 ms and makes the sound a function of the arguments.
"""

import _ctypes
import ctypes
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import espeakng_loader
import numpy as np

__all__ = ["ESPEAK_RATE", "Spoken", "synthesise", "variants"]

ESPEAK_RATE = 22050
"""Samples per second of what espeak-ng returns."""
SYNCHRONOUS = 2
PHONEME_EVENTS_IN_IPA = 0x0003
EVENT_END_OF_LIST = 0
EVENT_PHONEME = 7
UTF8 = 1
PARAMETERS = {"rate": 1, "pitch": 3, "pitch_range": 4}
RANDOM_SEED = 1

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
        variant: one of `variants()`.
        pitch: 0 to 100, 24 semitones apart.
        rate: words per minute, 80 to 450.
        pitch_range: 0 (monotone) to 100.

    Raises:
        ValueError: an unknown voice or variant, a pitch or rate out of range, a text without a sound.
    """
    if variant not in variants():
        raise ValueError(f"got the voice variant {variant!r}; expected one of espeak-ng's, as m1 or f3")
    if not (0 <= pitch <= 100 and 80 <= rate <= 450 and 0 <= pitch_range <= 100):
        raise ValueError(f"got pitch={pitch}, rate={rate}, pitch_range={pitch_range}; expected 0..100, 80..450, 0..100")
    with _lock, _fresh_library() as library:
        if library.espeak_SetVoiceByName(f"{voice}+{variant}".encode()) != 0:
            raise ValueError(f"got the voice {voice!r}; expected a language of espeak-ng, as en-us or de")
        for name, value in (("rate", rate), ("pitch", pitch), ("pitch_range", pitch_range)):
            library.espeak_SetParameter(PARAMETERS[name], value, 0)
        spoken = _collect(library, text)
    if not any(symbol for symbol, _ in spoken.marks):
        raise ValueError(f"got the text {text!r}, which espeak-ng does not pronounce in {voice}; expected words")
    return spoken


@contextmanager
def _fresh_library() -> Iterator[ctypes.CDLL]:
    if sys.platform == "win32":
        raise ValueError("espeak-ng is driven on Linux and macOS only; got Windows")
    library = ctypes.CDLL(espeakng_loader.get_library_path())
    try:
        rate = library.espeak_Initialize(SYNCHRONOUS, 0, espeakng_loader.get_data_path().encode(), PHONEME_EVENTS_IN_IPA)
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

"""Spoken and sung utterances with the exact times of their phonemes, from espeak-ng."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial

import numpy as np
import soxr

from stableavatar.geometry import SAMPLE_RATE
from stableavatar.puppet.espeak import ESPEAK_RATE, Spoken, draw_variant, synthesise
from stableavatar.puppet.sentences import GRAMMARS, Grammar, draw_nonsense, draw_sentence, draw_verse

__all__ = ["HELD_OUT_VARIANTS", "KINDS", "KIND_SHARES", "VARIANTS", "Phoneme", "Utterance", "draw_utterance", "sing", "speak"]

KIND_SHARES = {"speech": 0.65, "singing": 0.25, "dancing": 0.1}
"""How often each kind of utterance is drawn, for pictures as for sound alone."""
KINDS = tuple(KIND_SHARES)
VARIANTS = (
    "m1", "m2", "m3", "m4", "m6", "m7", "f1", "f2", "f4", "Alex", "Alicia", "Andrea", "Andy", "Annie", "Denis", "Diogo", "Gene2", "Hugo",
    "Lee", "Mario", "Mike", "Nguyen", "Reed", "adam", "anika", "antonio", "aunty", "belinda", "boris", "ed", "edward", "grandma", "gustave",
    "ian", "iven", "john", "kaukovalta", "klatt2", "klatt4", "linda", "max", "michel", "miguel", "norbert", "pablo", "paul", "pedro",
    "quincy", "robert", "sandro", "shelby", "steph", "victor",
)  # fmt: skip
"""Of training: those of espeak-ng's voices that sound like people and keep their pitch; many, so that new ones are understood."""
HELD_OUT_VARIANTS = ("m5", "m8", "f3", "f5")
PLOSIVES = tuple("pbtdkɡcɟqʔ")
LONGEST_CLOSURE = 0.12
"""Seconds of silence before a burst that belong to the plosive."""
SILENT_PART = 0.08
"""Of the sound before it, the level under which a closure is silent."""
TAIL = 0.1
"""Seconds kept after the last phoneme, where the voice dies away."""
FADE = 0.005
CALIBRATED = tuple(range(0, 101, 20))
"""Values of espeak-ng's pitch whose frequencies are measured for each voice that sings."""
CALIBRATION_VOICE = "es"
"""The language of that vowel; it makes no difference."""
F0_RANGE = (45, 400)
"""Hertz of the voices."""
OCTAVE_COST = 0.55
"""What a lag loses in likeness by its length, so that two periods are not taken for one."""
SCALE = (-5, -3, 0, 2, 4, 7)
"""Semitones of the pentatonic scale that melodies are drawn from."""
BEATS = {"singing": (0.55, 0.85), "dancing": (0.44, 0.56)}
"""Seconds between beats."""
SUNG_RATES = (80, 260)


@dataclass(frozen=True)
class Phoneme:
    """A symbol of espeak-ng in IPA, "" for a pause, from `start` to `end` in seconds."""

    symbol: str
    start: float
    end: float


@dataclass(frozen=True)
class Utterance:
    """Sound and what is said in it.

    Attributes:
        waveform: float32 [samples], mono, 16 kHz, peak 0.5 to 0.9.
        phonemes: in order and without gaps from 0 to the end.
        text: the sentences (those cut off at the end are whole here).
        language: espeak-ng's name of it.
        voice: variant of the voice.
    """

    waveform: np.ndarray
    phonemes: tuple[Phoneme, ...]
    text: str
    language: str
    voice: str


def speak(text: str, voice: str = "en-us", variant: str = "m1", pitch: int = 50, rate: int = 160) -> Utterance:
    """Speak a text; the same arguments give the same samples.

    Args:
        voice: language of espeak-ng, as "en-us", "en", "de", "fr".
        variant: timbre, as "m1" or "f3".
        pitch: 0 to 100.
        rate: words per minute.

    Raises:
        ValueError: what `espeak.synthesise` refuses.
    """
    return _level(_utterance(synthesise(text, voice, variant, pitch, rate), text, voice, variant), 0.7)


def sing(
    text: str, melody: Sequence[float], voice: str = "en-us", variant: str = "m1", rate: int = 100, pitch: int = 50
) -> Utterance:
    """Sing a text, one note and one beat (60 / rate seconds, or several for a long word) per word.

    Args:
        melody: semitones above `pitch`, one per word of the text; voices reach from about -7 to 8 around the pitch of 50.

    Raises:
        ValueError: not one note per word, notes out of the voice's range, what `espeak.synthesise` refuses.
    """
    words = text.split()
    if len(words) != len(melody):
        raise ValueError(f"got {len(melody)} notes for {len(words)} words; expected one per word")
    if not 20 <= rate <= 300:
        raise ValueError(f"got a rate of {rate} beats per minute; expected 20 to 300")
    pitches = _pitches(melody, variant, pitch)
    notes = [_sing_word(word, pitch, 60 / rate, (voice, variant)) for word, pitch in zip(words, pitches)]
    return _level(_join(notes, text), 0.7)


def draw_utterance(
    seed: int, seconds: float, kind: str = "speech", held_out: bool = False, nonsense: bool = False, invented: bool = False
) -> Utterance:
    """A random utterance of exactly round(seconds * 16000) samples, in a random language and voice.

    Args:
        kind: "speech": sentences with pauses; "singing": words on a slow melody; "dancing": a fast and steady one.
        held_out: voices and words that no other utterance has.
        nonsense: speech in invented words, see `draw_nonsense`; songs keep theirs.
        invented: speech in a voice that nobody has, see `draw_variant`; songs keep theirs, whose pitch is known.

    Raises:
        ValueError: an unknown kind, no time.
    """
    if kind not in KINDS or round(seconds * SAMPLE_RATE) < 1:
        raise ValueError(f"got kind={kind!r} of {seconds} s; expected one of {', '.join(KINDS)} and some time")
    rng = np.random.default_rng([seed, KINDS.index(kind), held_out])
    grammar = GRAMMARS[rng.integers(len(GRAMMARS))]
    variant = str(rng.choice(HELD_OUT_VARIANTS if held_out else VARIANTS))
    if kind == "speech":
        draw = partial(draw_nonsense, rng, grammar) if nonsense else partial(draw_sentence, rng, grammar, held_out)
        variant = draw_variant(rng) if invented else variant
        parts = _draw_sentences(rng, grammar.voice, variant, seconds, draw)
    else:
        parts = _draw_song(rng, grammar, variant, seconds, held_out, BEATS[kind])
    said = replace(_join(parts, " ".join(part.text for part in parts if part.text)), language=grammar.voice, voice=variant)
    return _level(_cut(said, seconds), float(rng.uniform(0.5, 0.9)))


def _draw_sentences(rng: np.random.Generator, voice: str, variant: str, seconds: float, draw: Callable[[], str]) -> list[Utterance]:
    """Sentences and pauses, at least so long in all."""
    pitch, rate = int(rng.integers(30, 71)), int(rng.integers(120, 191))
    parts = [_pause(rng.choice([0.04, rng.uniform(0.1, 0.5)]))]
    while _seconds(parts) < seconds:
        parts += [speak(draw(), voice, variant, pitch, rate), _pause(rng.uniform(0.2, 0.8) - TAIL)]
    return parts


def _draw_song(
    rng: np.random.Generator, grammar: Grammar, variant: str, seconds: float, held_out: bool, beats: tuple[float, float]
) -> list[Utterance]:
    """Verses on melodies and pauses, at least so long in all; `beats`: bounds of the seconds between two beats."""
    pitch, beat = int(rng.integers(46, 57)), rng.uniform(*beats)
    parts = [_pause(rng.choice([0.04, beat / 2]))]
    while _seconds(parts) < seconds:
        verse = draw_verse(rng, grammar, held_out)
        steps = np.cumsum(rng.integers(-2, 3, size=len(verse.split()))) + 2
        melody = [SCALE[abs((step + 5) % 10 - 5)] for step in steps]  # turns round at the ends of the scale
        parts += [sing(verse, melody, grammar.voice, variant, 60 / beat, pitch), _pause(beat)]
    return parts


def _sing_word(word: str, pitch: int, beat: float, voice: tuple[str, str]) -> Utterance:
    """A word on one note, spoken at the pace that fills its beats and padded or cut to them."""
    natural = _utterance(synthesise(word, *voice, pitch, 130, 0), word, *voice)
    spoken = natural.phonemes[-1].start
    beats = max(1, round(spoken / beat))
    rate = int(np.clip(130 * spoken / (0.92 * beats * beat), *SUNG_RATES))
    sung = _utterance(synthesise(word, *voice, pitch, rate, 0), word, *voice)
    return _cut(_join([sung, _pause(beats * beat)], word), beats * beat)


def _pitches(melody: Sequence[float], variant: str, middle: int) -> list[int]:
    """espeak-ng's pitch for each note."""
    semitones = _calibration(variant)
    wanted = np.interp(middle, CALIBRATED, semitones) + np.asarray(melody, dtype=float)
    if not (wanted.min() >= semitones[0] - 0.5 and wanted.max() <= semitones[-1] + 0.5):
        low, high = np.array([semitones[0], semitones[-1]]) - np.interp(middle, CALIBRATED, semitones)
        raise ValueError(f"got notes from {min(melody)} to {max(melody)}; expected {low:.0f} to {high:.0f}, the range of {variant}")
    return np.interp(wanted, semitones, CALIBRATED).round().astype(int).tolist()


@cache
def _calibration(variant: str) -> tuple[float, ...]:
    """Semitones (above 1 Hz) of the vowel a at the pitches `CALIBRATED`; every voice maps them in its own way."""
    vowels = [synthesise("aa", CALIBRATION_VOICE, variant, pitch, 100, 0).samples for pitch in CALIBRATED]
    frequencies = [_f0(vowel[ESPEAK_RATE // 10 : ESPEAK_RATE // 3].astype(float)) for vowel in vowels]
    return tuple(np.maximum.accumulate(12 * np.log2(frequencies)).tolist())


def _f0(vowel: np.ndarray) -> float:
    """Frequency of a periodic sound at `ESPEAK_RATE`: the lag at which it is most like itself, the shorter of equals."""
    spectrum = np.abs(np.fft.rfft(vowel - vowel.mean(), 2 * len(vowel))) ** 2
    spectrum[np.fft.rfftfreq(2 * len(vowel), 1 / ESPEAK_RATE) > 1.2 * F0_RANGE[1]] = 0  # rough voices keep their pitch only here
    likeness = np.fft.irfft(spectrum)[: len(vowel) // 2] / np.arange(len(vowel), len(vowel) - len(vowel) // 2, -1)
    first, last = (round(ESPEAK_RATE / f0) for f0 in F0_RANGE[::-1])
    lags = np.arange(first, last)
    return ESPEAK_RATE / int(lags[(likeness[lags] * (1 - OCTAVE_COST * lags / last)).argmax()])


def _utterance(spoken: Spoken, text: str, voice: str, variant: str) -> Utterance:
    """Samples at 16 kHz, phonemes with ends, the silence at the end cut to `TAIL`."""
    marks = [(symbol, start) for symbol, start in spoken.marks if not symbol.startswith("(")]  # "(en)": a foreign word follows
    last = max(index for index, (symbol, _) in enumerate(marks) if symbol)
    total = len(spoken.samples)
    stop = marks[last + 1][1] if last + 1 < len(marks) else total
    marks = [("", 0), *_with_closures(spoken.samples, marks[: last + 1]), ("", stop)]
    samples = spoken.samples[: stop + round(TAIL * ESPEAK_RATE)].astype(np.float32) / 32768
    waveform = _faded(soxr.resample(samples, ESPEAK_RATE, SAMPLE_RATE))
    edges = [start / ESPEAK_RATE for _, start in marks] + [len(waveform) / SAMPLE_RATE]
    timed = [Phoneme(symbol, start, end) for (symbol, _), start, end in zip(marks, edges, edges[1:]) if end > start]
    return Utterance(waveform, tuple(timed), text, voice, variant)


def _with_closures(samples: np.ndarray, marks: list[tuple[str, int]]) -> list[tuple[str, int]]:
    """Plosives start where the sound before them stops: espeak-ng marks their bursts."""
    moved = []
    for index, (symbol, start) in enumerate(marks):
        if symbol.lstrip("ˈˌ").startswith(PLOSIVES):
            previous = marks[index - 1][1] if index and marks[index - 1][0] else max(0, start - round(0.06 * ESPEAK_RATE))
            start = _closure(samples, previous, start)
        moved.append((symbol, start))
    starts = np.minimum.accumulate([start for _, start in moved[::-1]])[::-1]  # a pause inside the closure vanishes
    return [(symbol, int(start)) for (symbol, _), start in zip(moved, starts)]


def _closure(samples: np.ndarray, previous: int, burst: int) -> int:
    """First sample of the silence right before a burst."""
    step = round(0.002 * ESPEAK_RATE)
    loud = np.abs(samples[previous:burst].astype(np.float32))
    levels = loud[len(loud) % step :].reshape(-1, step).max(1) if len(loud) >= step else loud[:0]
    earliest = min(len(levels), round(LONGEST_CLOSURE / 0.002))
    silent = 0
    while silent < earliest and levels[-1 - silent] <= SILENT_PART * loud.max():
        silent += 1
    return burst - silent * step


def _faded(waveform: np.ndarray) -> np.ndarray:
    size = min(len(waveform), round(FADE * SAMPLE_RATE))
    ramp = np.linspace(1, 0, size, dtype=np.float32)
    return np.concatenate([waveform[: len(waveform) - size], waveform[len(waveform) - size :] * ramp])


def _pause(seconds: float) -> Utterance:
    samples = max(1, round(float(seconds) * SAMPLE_RATE))
    return Utterance(np.zeros(samples, np.float32), (Phoneme("", 0.0, samples / SAMPLE_RATE),), "", "", "")


def _seconds(parts: Sequence[Utterance]) -> float:
    return sum(len(part.waveform) for part in parts) / SAMPLE_RATE


def _join(parts: Sequence[Utterance], text: str) -> Utterance:
    """One after the other; language and voice of the first that has them."""
    phonemes: list[Phoneme] = []
    samples = 0
    for part in parts:
        start = samples / SAMPLE_RATE
        phonemes += [Phoneme(phoneme.symbol, start + phoneme.start, start + phoneme.end) for phoneme in part.phonemes]
        samples += len(part.waveform)
    said = next((part for part in parts if part.voice), parts[0])
    return Utterance(np.concatenate([part.waveform for part in parts]), tuple(phonemes), text, said.language, said.voice)


def _cut(utterance: Utterance, seconds: float) -> Utterance:
    """The first seconds; a phoneme at the cut is cut too."""
    samples = round(seconds * SAMPLE_RATE)
    assert len(utterance.waveform) >= samples, (len(utterance.waveform), samples)
    end = samples / SAMPLE_RATE
    kept = tuple(Phoneme(each.symbol, each.start, min(each.end, end)) for each in utterance.phonemes if each.start < end)
    return replace(utterance, waveform=_faded(utterance.waveform[:samples]), phonemes=kept)


def _level(utterance: Utterance, peak: float) -> Utterance:
    loudest = float(np.abs(utterance.waveform).max())
    return replace(utterance, waveform=utterance.waveform * np.float32(peak / loudest)) if loudest > 0 else utterance

"""Puppet speech: sound, the times of its phonemes, and what the mouth does."""

import hashlib
import subprocess
import sys
from itertools import combinations, pairwise

import librosa
import numpy as np
import pytest
from scipy.signal import butter, sosfiltfilt

from stableavatar.puppet import sentences, speech
from stableavatar.puppet.espeak import ESPEAK_RATE, draw_variant, synthesise
from stableavatar.puppet.speech import Phoneme, draw_utterance, sing, speak
from stableavatar.puppet.visemes import PHONEMES, VISEMES, letters, mouth_from_sound, mouth_track, phoneme_ids

RATE = 16000
PLOSIVES = ("p", "t", "k")


@pytest.fixture(scope="module")
def drawn() -> list[speech.Utterance]:
    return [draw_utterance(seed, 4, "speech", held_out=seed % 5 == 0) for seed in range(50)]


def digest(utterance: speech.Utterance) -> str:
    return hashlib.sha256(utterance.waveform.tobytes() + repr(utterance.phonemes).encode()).hexdigest()


def level(waveform: np.ndarray) -> np.ndarray:
    """Loudness [milliseconds]: the maximum around each."""
    size = RATE // 1000
    return np.abs(waveform[: len(waveform) // size * size]).reshape(-1, size).max(1)


def colour(waveform: np.ndarray) -> np.ndarray:
    """Energy in 16 bands of 500 Hz, in powers of ten."""
    return np.log10([np.square(band).sum() for band in np.array_split(np.abs(np.fft.rfft(waveform)), 16)])


@pytest.mark.parametrize("kind", speech.KINDS)
def test_same_seed_same_sound(kind: str) -> None:
    first = draw_utterance(3, 3, kind)
    speak("something else in between", variant="f2")
    assert digest(first) == digest(draw_utterance(3, 3, kind))
    assert digest(first) != digest(draw_utterance(4, 3, kind))


def test_same_seed_in_another_process() -> None:
    script = "import tests.test_puppet_speech as t; print(t.digest(t.draw_utterance(7, 2, 'singing')), t.digest(t.draw_utterance(7, 2)))"
    found = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout.split()
    assert found == [digest(draw_utterance(7, 2, "singing")), digest(draw_utterance(7, 2))]


@pytest.mark.parametrize("kind", speech.KINDS)
@pytest.mark.parametrize("seconds", [0.2, 1.0, 3.24, 5.00003])
def test_exact_length_and_gapless_phonemes(kind: str, seconds: float) -> None:
    said = draw_utterance(11, seconds, kind)
    assert said.waveform.shape == (round(seconds * RATE),) and said.waveform.dtype == np.float32
    assert np.isfinite(said.waveform).all() and np.abs(said.waveform).max() <= 0.91
    assert said.phonemes[0].start == 0 and said.phonemes[-1].end == pytest.approx(len(said.waveform) / RATE)
    assert all(a.end == pytest.approx(b.start) and a.end > a.start for a, b in pairwise(said.phonemes))


@pytest.mark.parametrize("variant", ["m1", "f1", "Andy"])
@pytest.mark.parametrize("rate", [120, 190])
def test_plosives_are_timed_to_20_ms(variant: str, rate: int) -> None:
    text = "papa tata kaka papa"
    said = speak(text, "es", variant, rate=rate)
    loud = level(said.waveform)
    voice = level(sosfiltfilt(butter(4, 500, fs=RATE, output="sos"), said.waveform))  # without bursts and hiss
    bursts = [1000 * sample / ESPEAK_RATE for symbol, sample in synthesise(text, "es", variant, 50, rate).marks if symbol in PLOSIVES]
    plosives = [(before, each) for before, each in pairwise(said.phonemes) if each.symbol in PLOSIVES]
    assert len(plosives) == len(bursts) == 8
    for (before, plosive), burst in zip(plosives, bursts):
        assert plosive.start * 1000 < burst < plosive.end * 1000
        first = round(burst) - 15
        assert abs(first + np.flatnonzero(loud[first:] > 0.02 * loud.max())[0] - burst) <= 10
        if before.symbol:
            earlier = voice[round(1000 * before.start) : round(1000 * plosive.start) + 25]
            last = np.flatnonzero(earlier > 0.1 * earlier.max())[-1] + round(1000 * before.start)
            assert abs(last - 1000 * plosive.start) <= 20


@pytest.mark.parametrize("variant", ["m3", "f4"])
def test_vowels_after_pauses_are_timed_to_20_ms(variant: str) -> None:
    said = speak("Ama. Ama. Ama.", "es", variant)
    loud = level(said.waveform)
    starts = [1000 * after.start for before, after in pairwise(said.phonemes) if before.symbol == "" and after.symbol == "ˈa"]
    assert len(starts) >= 2
    for start in starts:
        first = max(0, round(start) - 40)
        assert abs(first + np.flatnonzero(loud[first:] > 0.05 * loud.max())[0] - start) <= 20


@pytest.mark.parametrize("kind", speech.KINDS)
def test_pauses_are_silent_and_sentences_start_in_time(kind: str) -> None:
    for seed in range(6):
        said = draw_utterance(seed, 5, kind)
        loud = level(said.waveform)
        for pause, after in pairwise(merged(said.phonemes)):
            if pause.symbol == "" and pause.end - pause.start > 0.25:
                assert loud[round(pause.start * 1000) + 120 : round(pause.end * 1000) - 20].max() < 0.05 * loud.max()
                if after.symbol.lstrip("ˈˌ")[:1] in tuple("aeiou"):
                    assert loud[round(after.start * 1000) : round(after.start * 1000) + 40].max() > 0.03 * loud.max()


def merged(phonemes: tuple[Phoneme, ...]) -> list[Phoneme]:
    found: list[Phoneme] = []
    for each in phonemes:
        start = found.pop().start if found and found[-1].symbol == each.symbol == "" else each.start
        found.append(Phoneme(each.symbol, start, each.end))
    return found


def test_held_out_voices_words_and_sentences_are_apart() -> None:
    assert not set(speech.VARIANTS) & set(speech.HELD_OUT_VARIANTS)
    rng = np.random.default_rng(0)
    for grammar in sentences.GRAMMARS:
        for role in sentences.ROLES:
            assert not set(grammar.words(role, True)) & set(grammar.words(role, False))
        train, held = ({sentences.draw_sentence(rng, grammar, held_out) for _ in range(300)} for held_out in (False, True))
        assert not train & held
    voices = [{draw_utterance(seed, 0.5, held_out=held_out).voice for seed in range(25)} for held_out in (False, True)]
    assert voices[0] <= set(speech.VARIANTS) and voices[1] <= set(speech.HELD_OUT_VARIANTS) and len(voices[0]) > 6


def test_nonsense_is_new_and_has_no_word_that_is_held_out() -> None:
    rng = np.random.default_rng(0)
    for grammar in sentences.GRAMMARS:
        train, held = grammar.vocabulary(False), grammar.vocabulary(True)
        drawn = {word for _ in range(60) for word in sentences.draw_nonsense(rng, grammar).split()}
        assert len(drawn) > 200 and not drawn & held and len(drawn & train) < 0.1 * len(drawn)
    sense, nonsense = (draw_utterance(3, 2, nonsense=nonsense) for nonsense in (False, True))
    assert sense.voice == nonsense.voice and sense.text != nonsense.text
    assert any(phoneme.symbol for phoneme in nonsense.phonemes)


def test_invented_voices_are_many_and_follow_from_the_seed() -> None:
    voices = [draw_variant(np.random.default_rng(seed)) for seed in (0, 0, 1)]
    assert voices[0] == voices[1] != voices[2]
    known, first, again, other = (speak("my mother sees the big apple", variant=voice) for voice in ("m1", *voices))
    assert digest(first) == digest(again) != digest(other)
    assert len({tuple(each.symbol for each in said.phonemes) for said in (known, first, other)}) == 1  # the same words
    assert all(0.8 < len(said.waveform) / len(known.waveform) < 1.2 for said in (first, other))
    colours = [colour(said.waveform) for said in (known, first, other)]
    assert all(np.abs(one - another).max() > 0.3 for one, another in combinations(colours, 2))
    plain, invented = (draw_utterance(3, 2, nonsense=True, invented=invented) for invented in (False, True))
    assert plain.voice in speech.VARIANTS and invented.voice.startswith("language variant")
    assert digest(known) == digest(speak("my mother sees the big apple"))


def test_every_symbol_is_known(drawn: list[speech.Utterance]) -> None:
    symbols = {phoneme.symbol for said in drawn for phoneme in said.phonemes}
    assert len(symbols) > 60 and len({said.language for said in drawn}) >= 6
    assert set(PHONEMES) >= {letter for symbol in symbols for letter in letters(symbol)}
    assert 40 <= len(PHONEMES) <= 64 and PHONEMES[0] == ""
    used = {index for said in drawn for index, _, _ in phoneme_ids(said)}
    assert len(used) > 40


def test_letters_of_symbols() -> None:
    assert letters("ˈaɪə") == ("a", "ɪ", "ə") and letters("tʃ") == ("t", "ʃ") and letters("ˌɐ̃ʊ̃") == ("ɐ", "ʊ")
    assert letters("ç") == ("ç",) and letters("iː") == ("i",) and letters("n̩ʲ") == ("n",) and letters("ɚ") == ("ə", "ɹ")
    assert letters("") == letters("ː") == ("",) and letters("ʘ漢") == ("ə", "ə")


def test_classes_cover_the_time(drawn: list[speech.Utterance]) -> None:
    for said in drawn:
        ids = phoneme_ids(said)
        assert ids[0][1] == 0 and ids[-1][2] == pytest.approx(4)
        assert all(a[2] == pytest.approx(b[1]) and not a[0] == b[0] == 0 for a, b in pairwise(ids))


def test_mouth_uses_its_range(drawn: list[speech.Utterance]) -> None:
    tracks = [mouth_track(said.phonemes, 100) for said in drawn]
    for aperture, width in tracks:
        assert aperture.shape == width.shape == (100,) and aperture.dtype == width.dtype == np.float32
        assert min(aperture.min(), width.min()) >= 0 and max(aperture.max(), width.max()) <= 1
    apertures, widths = (np.array(each) for each in zip(*tracks))
    assert 0.2 < np.median(apertures.std(1)) < 0.33 and np.median(apertures.max(1)) > 0.8
    assert widths.min() < 0.1 and widths.max() > 0.9


def test_mouth_is_closed_in_pauses_and_on_bilabials() -> None:
    said = speak("Mama, papa, baba.", "es", "m1", rate=120)
    aperture, _ = mouth_track(said.phonemes, 400, fps=200)
    for phoneme in said.phonemes:
        inside = aperture[round(phoneme.start * 200) + 1 : max(round(phoneme.start * 200) + 2, round(phoneme.end * 200))]
        if phoneme.symbol.lstrip("ˈˌ") in ("p", "b", "m"):
            assert inside.min() < 0.02
        if phoneme.symbol == "" and phoneme.end - phoneme.start > 0.1:
            assert np.median(inside) == 0
        if "a" in phoneme.symbol:
            assert inside.max() > 0.8


def test_diphthongs_and_rounding_move_the_mouth() -> None:
    aperture, width = mouth_track([Phoneme("aɪ", 0, 0.4), Phoneme("u", 0.4, 0.8), Phoneme("i", 0.8, 1.2)], 120, 100)
    assert aperture[10] > 0.9 and aperture[30] < 0.45
    assert width[60] < 0.05 and width[100] > 0.95


def test_track_without_phonemes_or_past_them_is_at_rest() -> None:
    aperture, width = mouth_track([], 5)
    assert (aperture == 0).all() and (width == 0.5).all()
    aperture, width = mouth_track([Phoneme("a", 0, 0.3), Phoneme("", 0.3, 0.5)], 50)
    assert (aperture[12:] == 0).all() and (width[12:] == 0.5).all()


@pytest.mark.parametrize("variant", ["m3", "m7", "f3", "steph"])
def test_singing_follows_the_melody(variant: str) -> None:
    melody = [0, 4, 7, -5, 0]
    said = sing("la la la la la", melody, "es", variant, rate=100)
    assert len(said.waveform) == 5 * round(0.6 * RATE)
    vowels = [phoneme for phoneme in said.phonemes if "a" in phoneme.symbol]
    assert len(vowels) == 5
    found = []
    for vowel in vowels:
        sung = said.waveform[round(vowel.start * RATE) + 800 : round(vowel.end * RATE) - 800]
        found.append(float(np.median(librosa.yin(sung, fmin=45, fmax=450, sr=RATE))))
    semitones = 12 * np.log2(np.array(found) / found[0])
    assert np.abs(semitones - melody).max() < 1


def test_singing_keeps_the_beat() -> None:
    said = sing("pa pa pa pa", [0, 2, 4, 0], "es", "m1", rate=120)
    starts = [phoneme.start for phoneme in said.phonemes if phoneme.symbol.lstrip("ˈˌ") == "p"]
    assert np.abs(np.diff(starts) - 0.5).max() < 0.02


def test_recorded_speech_opens_with_sound_and_closes_in_silence() -> None:
    said = speak("Papa baba lala nana.", "es", "m3")
    quiet = np.zeros(RATE, np.float32)
    noise = np.random.default_rng(0).normal(0, 1e-3, len(said.waveform) + 2 * RATE).astype(np.float32)
    waveform = np.concatenate([quiet, said.waveform, quiet]) * 0.3 + noise
    frames = int(len(waveform) / RATE * 25)
    aperture, width = mouth_from_sound(waveform, frames)
    assert aperture.dtype == width.dtype == np.float32 and aperture.shape == width.shape == (frames,)
    assert aperture[:23].max() < 0.1 and aperture[-20:].max() < 0.1 and aperture.max() > 0.8
    truth, _ = mouth_track([Phoneme("", 0, 1), *(Phoneme(p.symbol, p.start + 1, p.end + 1) for p in said.phonemes)], frames)
    assert np.corrcoef(aperture, truth)[0, 1] > 0.6


def test_silence_keeps_the_mouth_closed() -> None:
    aperture, _ = mouth_from_sound(np.zeros(RATE, np.float32), 25)
    assert (aperture == 0).all()
    aperture, _ = mouth_from_sound(np.zeros(0, np.float32), 25)
    assert (aperture == 0).all()


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: speak("hello", variant="nobody"),
        lambda: speak("hello", voice="klingonese"),
        lambda: speak("hello", rate=10),
        lambda: speak("..."),
        lambda: sing("la la", [0]),
        lambda: sing("la", [30]),
        lambda: sing("la", [0], rate=0),
        lambda: draw_utterance(0, 1, "humming"),
        lambda: draw_utterance(0, 0),
        lambda: mouth_track([], 0),
        lambda: mouth_from_sound(np.zeros((2, 5)), 3),
    ],
)
def test_mistakes_are_told(wrong) -> None:
    with pytest.raises(ValueError, match="expected"):
        wrong()


def test_visemes_are_in_range() -> None:
    assert all(0 <= opening <= 1 and (wide is None or 0 <= wide <= 1) for opening, wide in VISEMES.values())
    assert all(len(symbol) <= 1 for symbol in PHONEMES)

import logging
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import soundfile
import torch
from media_files import REAL, needs_real_input, run_ffmpeg, save, tone
from PIL import Image

from stableavatar import media
from stableavatar.geometry import SAMPLE_RATE
from stableavatar.media import AudioTrack, fit_image, read_image


@pytest.fixture
def wav(tmp_path: Path) -> Path:
    soundfile.write(tmp_path / "tone.wav", tone(), 44_100)
    return tmp_path / "tone.wav"


# Images


def test_alpha_is_placed_on_white(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    pixels = np.zeros((4, 4, 4), np.uint8)
    pixels[:2, :, 3], pixels[2:, :, 3] = 0, 128
    image = np.asarray(read_image(save(tmp_path / "a.png", pixels)))
    assert (image[:2] == 255).all() and (image[2:] == 127).all()
    assert "transparent" in caplog.text


@pytest.mark.parametrize("mode", ["P", "PA", "L", "LA", "1", "CMYK"])
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("a.tif" if mode in ("CMYK", "PA") else "a.png")
    image = Image.new("RGB", (8, 8), "white").convert("LA" if mode == "PA" else mode)
    image.save(path)
    assert read_image(path).mode == "RGB" and np.asarray(read_image(path)).min() >= 250


def test_palette_transparency(tmp_path: Path) -> None:
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 9, 9, 9])
    image.save(tmp_path / "a.png", transparency=1)
    assert (np.asarray(read_image(tmp_path / "a.png")) == 255).all()


@pytest.mark.parametrize("shape", [(4, 5), (4, 5, 3)])
def test_sixteen_bit_is_scaled(tmp_path: Path, shape: tuple[int, ...], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    cv2.imwrite(str(tmp_path / "a.png"), np.full(shape, 200 * 257, np.uint16))
    image = read_image(tmp_path / "a.png")
    assert image.mode == "RGB" and image.size == (5, 4) and (np.asarray(image) == 200).all()
    assert "16 bit" in caplog.text


@pytest.mark.parametrize(("values", "expected"), [((0, 0.5, 1), (0, 128, 255)), ((-9, 100.4, 300), (0, 100, 255))])
def test_floating_point_is_scaled(tmp_path: Path, values: tuple[float, ...], expected: tuple[int, ...]) -> None:
    Image.fromarray(np.array([values], np.float32)).save(tmp_path / "a.tif")
    assert (np.asarray(read_image(tmp_path / "a.tif"))[0] == np.array(expected)[:, None]).all()
    Image.fromarray(np.array([[*values, np.nan]], np.float32)).save(tmp_path / "nan.tif")
    with pytest.raises(ValueError, match="NaN"):
        read_image(tmp_path / "nan.tif")


def test_exif_rotation(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = np.zeros((16, 32, 3), np.uint8)
    pixels[:, :16] = 255
    image = read_image(save(tmp_path / "a.jpg", pixels, exif=exif))
    assert image.size == (16, 32) and np.asarray(image)[0].min() > 200 and np.asarray(image)[-1].max() < 50
    assert "EXIF" in caplog.text


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.bmp", "a.tif", "a.gif"])
def test_truncated_image(tmp_path: Path, name: str) -> None:
    path = save(tmp_path / name, np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    for kept in (1, 20, path.stat().st_size // 2):
        (tmp_path / f"cut_{name}").write_bytes(path.read_bytes()[:kept])
        with pytest.raises(ValueError, match="cannot read image"):
            read_image(tmp_path / f"cut_{name}")


def test_what_is_not_an_image(tmp_path: Path, wav: Path) -> None:
    (tmp_path / "empty.png").touch()
    for path, words in [
        (wav, "not an image"),
        (tmp_path / "no.png", "no such file"),
        (tmp_path, "folder"),
        (tmp_path / "empty.png", "empty"),
    ]:
        with pytest.raises(ValueError, match=words) as error:
            read_image(path)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
@pytest.mark.parametrize("size", [(1, 1), (3, 2), (1, 3000), (3000, 1), (300, 200)])
def test_fit_gives_the_size_and_range(fit: str, size: tuple[int, int]) -> None:
    out = fit_image(Image.new("RGB", size, "white"), 48, 32, fit)
    assert out.shape == (3, 32, 48) and out.dtype == torch.float32 and out.max() == 1 and out.min() >= -1
    assert fit == "pad" or out.min() == 1


def test_crop_keeps_the_centre_and_pad_keeps_all() -> None:
    pixels = np.zeros((32, 96, 3), np.uint8)
    pixels[:, 32:64] = 255
    image = Image.fromarray(pixels)
    assert fit_image(image, 32, 32, "crop")[:, :, 3:-3].min() > 0.9
    assert fit_image(image, 96, 96, "pad")[:, [0, 31, 64, 95]].max() == -1
    assert torch.allclose(fit_image(image, 96, 32, "stretch"), torch.from_numpy(pixels / 127.5 - 1).permute(2, 0, 1).float())


def test_fit_shrinks_without_aliases() -> None:
    stripes = np.zeros((256, 256, 3), np.uint8)
    stripes[:, ::2] = 255
    assert fit_image(Image.fromarray(stripes), 32, 32).abs().max() < 0.05


def test_fit_refuses_bad_settings() -> None:
    image = Image.new("RGB", (8, 8))
    with pytest.raises(ValueError, match="0x16.*positive"):
        fit_image(image, 0, 16)
    with pytest.raises(ValueError, match="crop, pad or stretch"):
        fit_image(image, 16, 16, "zoom")  # type: ignore[arg-type]


# Sound


@pytest.mark.parametrize("rate", [8_000, 16_000, 44_100, 96_000])
@pytest.mark.parametrize("channels", [1, 2, 6, 8])
def test_any_rate_and_channels(tmp_path: Path, rate: int, channels: int, caplog: pytest.LogCaptureFixture) -> None:
    soundfile.write(tmp_path / "a.wav", tone(0.5, rate, channels), rate)
    with AudioTrack(tmp_path / "a.wav") as track:
        assert abs(track.samples - SAMPLE_RATE // 2) <= 1 and track.duration == track.samples / SAMPLE_RATE
        heard = track.read(400, 7600)
    expected = tone(0.5, SAMPLE_RATE)[400:7600, 0]
    gain = heard @ expected / (expected @ expected)  # films' low-frequency channel is left out of a mix
    assert np.abs(heard - gain * expected).max() < 0.02 and (channels > 2 or abs(gain - 1) < 0.01)
    assert ("8000 Hz" in caplog.text) == (rate == 8_000) and ("mixed" in caplog.text) == (channels > 2)


FORMATS = ["a.mp3", "a.m4a", "a.flac", "a.ogg", "a.opus", "a.aac", "a.aiff", "a.wma", "a.mkv", "a.mp4", "a.webm"]


@pytest.mark.parametrize("name", FORMATS)
def test_any_format(tmp_path: Path, wav: Path, name: str) -> None:
    picture = ["-f", "lavfi", "-i", "testsrc=s=64x64:d=1"] if name.endswith(("mkv", "mp4", "webm")) else []
    run_ffmpeg("-i", str(wav), *picture, str(tmp_path / name))
    with AudioTrack(tmp_path / name) as track:
        assert abs(track.duration - 1) < 0.1
        assert 0.3 < np.abs(track.read(0, track.samples)).max() < 0.7


def test_reads_are_padded_slices(wav: Path) -> None:
    with AudioTrack(wav) as track:
        whole = track.read(0, track.samples)
        padded = track.read(-100, track.samples + 100)
        assert whole.dtype == padded.dtype == np.float32
        assert np.array_equal(padded, np.pad(whole, 100)) and np.array_equal(track.read(123, 456), whole[123:456])
        assert not track.read(-20, -10).any() and not track.read(10**7, 10**7 + 5).any() and track.read(5, 5).size == 0


def test_odd_but_legal_sound(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    soundfile.write(tmp_path / "silent.wav", np.zeros(8000), 8000)
    soundfile.write(tmp_path / "short.wav", tone(0.01), 44_100)
    with AudioTrack(tmp_path / "silent.wav") as silent, AudioTrack(tmp_path / "short.wav") as short:
        assert silent.samples == SAMPLE_RATE and short.samples == 160
    assert "silent" in caplog.text and "less than one video frame" in caplog.text


def test_wav_from_a_pipe_is_legal(tmp_path: Path, wav: Path) -> None:
    (tmp_path / "-a:b.wav").write_bytes(run_ffmpeg("-i", str(wav), "-f", "wav", "-"))
    with AudioTrack(tmp_path / "-a:b.wav") as track:
        assert track.samples == SAMPLE_RATE


@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24", "FLOAT", "PCM_U8", "ULAW"])
@pytest.mark.parametrize("size", [None, 0, 0xFFFFFFFF], ids=["known", "zero", "unknown"])
def test_a_wav_of_16_khz_is_read_as_by_ffmpeg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, subtype: str, size: int | None) -> None:
    path = tmp_path / "a.wav"
    soundfile.write(path, tone(1.3, 16_000), 16_000, subtype=subtype)
    if size is not None:  # as written into a pipe
        before, found, after = path.read_bytes().partition(b"data")
        path.write_bytes(before + found + size.to_bytes(4, "little") + after[4:])
    with AudioTrack(path) as track:
        samples = track.read(0, track.samples)
    monkeypatch.setattr(media, "_is_as_kept", lambda path: False)
    with AudioTrack(path) as track:
        assert np.array_equal(samples, track.read(0, track.samples)) and len(samples) == 20_800


TOLD = {"front.mp4": ["-movflags", "+faststart"], "kept.wav": ["-ac", "1", "-ar", "16000"]}


@pytest.mark.parametrize("name", ["a.wav", "a.flac", "a.mp3", "a.m4a", "a.mkv", "a.aiff", "a.ogg", "a.opus", *TOLD])
def test_truncated_sound(tmp_path: Path, name: str) -> None:
    noise = np.random.default_rng(0).normal(0, 0.1, (88_200, 2))
    soundfile.write(tmp_path / "noise.wav", noise, 44_100)
    front = TOLD.get(name, [])
    run_ffmpeg("-y", "-i", str(tmp_path / "noise.wav"), *front, str(tmp_path / name))
    whole = (tmp_path / name).read_bytes()
    (tmp_path / f"cut_{name}").write_bytes(whole[: len(whole) // 2])
    AudioTrack(tmp_path / name).close()
    with pytest.raises(ValueError, match="truncated|cannot read audio"):
        AudioTrack(tmp_path / f"cut_{name}")


@pytest.mark.parametrize("rate", [16_000, 44_100])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_in_sound(tmp_path: Path, value: float, rate: int) -> None:
    samples = tone(rate=rate)
    samples[10_000] = value
    soundfile.write(tmp_path / "a.wav", samples, rate, subtype="FLOAT")
    with pytest.raises(ValueError, match="NaN or infinite"):
        AudioTrack(tmp_path / "a.wav")


def test_what_is_not_sound(tmp_path: Path) -> None:
    (tmp_path / "empty.wav").touch()
    (tmp_path / "text.wav").write_text("this is not sound\n" * 100)
    soundfile.write(tmp_path / "none.wav", np.zeros(0), 16_000)
    save(tmp_path / "a.png", np.zeros((8, 8, 3), np.uint8))
    run_ffmpeg("-f", "lavfi", "-i", "testsrc=s=64x64:d=1", str(tmp_path / "mute.mp4"))
    cases = {"empty.wav": "empty", "text.wav": "cannot read audio", "none.wav": "no samples", "no.wav": "no such file"}
    for name, words in {**cases, "a.png": "no audio stream", "mute.mp4": "no audio stream", ".": "folder"}.items():
        with pytest.raises(ValueError, match=words) as error:
            AudioTrack(tmp_path / name)
        assert "\n" not in str(error.value)


MEASURED = """
import resource, sys
from stableavatar.media import AudioTrack
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before = peak()
with AudioTrack(sys.argv[1]) as track:
    track.read(10**7, 10**7 + 52000)
    print(track.duration, peak() - before)
"""


def test_length_does_not_cost_memory(tmp_path: Path) -> None:
    run_ffmpeg("-f", "lavfi", "-i", "anoisesrc=d=900:r=16000:a=0.1", str(tmp_path / "long.wav"))
    out = subprocess.run([sys.executable, "-c", MEASURED, str(tmp_path / "long.wav")], check=True, capture_output=True, text=True)
    seconds, mebibytes = map(float, out.stdout.split())
    assert seconds == 900 and mebibytes < 40  # the samples are 55 MiB


@needs_real_input
def test_real_inputs() -> None:
    for name, seconds in [("speech_5s.wav", 5.02), ("speech_40s.wav", 40.12), ("two_people_man.mp3", 12.6), ("talking_head_15s.mp4", 15.0)]:
        with AudioTrack(REAL / name) as track:
            assert abs(track.duration - seconds) < 0.04
    assert fit_image(read_image(REAL / "portrait_a.png"), 64, 32).shape == (3, 32, 64)

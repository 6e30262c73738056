"""The sound of a clip, its scores and the thresholds."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from align_files import MODELLING
from clip_files import write_video
from insightface_files import bright_cell_detector
from skimage.data import astronaut
from skimage.filters import gaussian

from stableavatar.config import Config, help_text, load_config
from stableavatar.data.preparation import quality, scores
from stableavatar.data.preparation.filters import FilterConfig, ScoreConfig, decide, limits, not_taken
from stableavatar.data.preparation.pictures import video_pictures
from stableavatar.data.preparation.records import ClipFolder, Segment, Source
from stableavatar.data.preparation.voice import RECORDING, VOCALS, VoiceConfig, measure_level, process_voice
from stableavatar.evaluation.syncnet import SyncNet
from stableavatar.puppet.espeak import ESPEAK_RATE, synthesise

ROOT = Path(__file__).parents[1]


def clip_of(folder: Path, frames: int = 75, fps: float = 25.0, width: int = 128, height: int = 96) -> ClipFolder:
    source = Source("a-00000000", "a.mp4", "0" * 64, width, height, fps, True, frames / fps, 16_000, "mono")
    return ClipFolder("a-00000000-00000000", folder, Segment(source.id, 0.0, frames / fps), source, width, height, fps, frames)


def with_sound(folder: Path, samples: np.ndarray) -> ClipFolder:
    folder.mkdir(parents=True, exist_ok=True)
    soundfile.write(folder / "audio.wav", samples.clip(-1, 1), 16_000, subtype="PCM_16")
    return clip_of(folder, frames=round(len(samples) / 640))


def sine(decibels: float, seconds: float = 3.0, hertz: float = 997.0) -> np.ndarray:
    """Peak in dB of full scale."""
    return 10 ** (decibels / 20) * np.sin(2 * np.pi * hertz * np.arange(round(seconds * 16_000)) / 16_000)


def speech() -> np.ndarray:
    spoken = synthesise("The quick brown fox jumps over the lazy dog, and nobody minds it.", "en-us", "m3").samples / 32_768
    times = np.arange(round(len(spoken) * 16_000 / ESPEAK_RATE)) / 16_000
    return np.interp(times, np.arange(len(spoken)) / ESPEAK_RATE, spoken)


def test_a_reference_tone_has_its_loudness(tmp_path: Path) -> None:
    """ITU-R BS.1770: 997 Hz at full scale in one channel is -3.01 LUFS."""
    values = process_voice(with_sound(tmp_path, sine(-20)), VoiceConfig())
    assert values["loudness"] == pytest.approx(-23.0, abs=0.15) and values["peak"] == pytest.approx(-20, abs=0.2)
    assert values["gain"] == 0 == values["overdriven"] == values["silence"] and not values["vocals"]
    assert sorted(os.listdir(tmp_path)) == ["audio.wav"]


def test_silence_overdrive_and_voice_are_told(tmp_path: Path) -> None:
    half = np.concatenate([sine(-20), np.zeros(48_000)])
    assert process_voice(with_sound(tmp_path / "half", half), VoiceConfig())["silence"] == pytest.approx(0.5, abs=0.01)
    loud = process_voice(with_sound(tmp_path / "loud", sine(20)), VoiceConfig())
    assert loud["overdriven"] > 0.8 and loud["peak"] > -0.5
    spoken, quiet = speech(), np.r_[0.5, np.zeros(47_999)]
    talk = process_voice(with_sound(tmp_path / "talk", spoken), VoiceConfig())
    still = process_voice(with_sound(tmp_path / "still", quiet), VoiceConfig())
    mixed = process_voice(with_sound(tmp_path / "mixed", np.concatenate([spoken, np.zeros(len(spoken))])), VoiceConfig())
    assert talk["voice"] > 0.7 and still["voice"] < 0.05 and mixed["voice"] == pytest.approx(talk["voice"] / 2, abs=0.1)
    nothing = process_voice(with_sound(tmp_path / "nothing", np.zeros(48_000)), VoiceConfig(loudness=-23.0))
    assert nothing["loudness"] is None and nothing["peak"] is None and nothing["gain"] == 0


def test_loudness_is_changed_once_and_taken_back_whole(tmp_path: Path) -> None:
    clip = with_sound(tmp_path, sine(-20))
    before = (tmp_path / "audio.wav").read_bytes()
    for _ in range(2):
        values = process_voice(clip, VoiceConfig(loudness=-26.0))
        assert values["gain"] == pytest.approx(-3, abs=0.15) and values["loudness"] == pytest.approx(-26, abs=0.05)
        assert measure_level(tmp_path / "audio.wav").loudness == pytest.approx(-26, abs=0.15)
        assert (tmp_path / RECORDING).read_bytes() == before
    raised = process_voice(clip, VoiceConfig(loudness=-1.0))
    assert raised["peak"] == pytest.approx(-1, abs=0.05) and measure_level(tmp_path / "audio.wav").peak == pytest.approx(-1, abs=0.2)
    assert process_voice(clip, VoiceConfig())["gain"] == 0
    assert (tmp_path / "audio.wav").read_bytes() == before and sorted(os.listdir(tmp_path)) == ["audio.wav"]


def test_vocals_to_train_on_need_a_separator() -> None:
    with pytest.raises(ValueError, match=r"voice\.separator"):
        VoiceConfig(train_on_vocals=True).check()
    VoiceConfig(train_on_vocals=True, separator="Kim_Vocal_2.onnx").check()


def low_pass_model(path: Path) -> str:
    """An MDX network of the size of Kim_Vocal_2 for which everything below 2 kHz is the voice."""
    onnx = pytest.importorskip("onnx")
    keep = (np.arange(3072) * 44_100 / 7680 < 2000).astype(np.float32)[None, None, :, None] / 1.009
    ends = [onnx.helper.make_tensor_value_info(name, 1, ["batch", 4, 3072, 256]) for name in ("input", "output")]
    node = onnx.helper.make_node("Mul", ["input", "keep"], ["output"])
    graph = onnx.helper.make_graph([node], "low", ends[:1], ends[1:], [onnx.numpy_helper.from_array(keep, "keep")])
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 13)], ir_version=8), path)
    return str(path)


def test_the_separated_voice_is_in_step_and_can_replace_the_sound(tmp_path: Path) -> None:
    pytest.importorskip("audio_separator")
    model = low_pass_model(tmp_path / "Kim_Vocal_2.onnx")
    voice = sine(-20, 4.0, 300) * np.repeat([1, 0, 1, 1], 16_000)
    clip = with_sound(tmp_path / "clip", voice + sine(-20, 4.0, 5000))
    before = (clip.folder / "audio.wav").read_bytes()
    values = process_voice(clip, VoiceConfig(separator=model, device="cpu"))
    vocals, rate = soundfile.read(clip.folder / VOCALS)
    assert (rate, vocals.shape) == (16_000, voice.shape) and not values["vocals"]
    assert np.corrcoef(vocals, voice)[0, 1] > 0.99 and np.abs(vocals - voice)[2000:-2000].max() < 0.02
    assert (clip.folder / "audio.wav").read_bytes() == before
    assert process_voice(clip, VoiceConfig(separator=model, device="cpu", train_on_vocals=True))["vocals"]
    assert np.corrcoef(soundfile.read(clip.folder / "audio.wav")[0], voice)[0, 1] > 0.99
    assert (clip.folder / RECORDING).read_bytes() == before
    process_voice(clip, VoiceConfig())
    assert os.listdir(clip.folder) == ["audio.wav"] and (clip.folder / "audio.wav").read_bytes() == before


def test_the_face_of_separation_says_what_is_missing(tmp_path: Path) -> None:
    words = ["--audio_separator_model_file=no.onnx", f"--audio_file_path={tmp_path}/no.wav", f"--saved_vocal_path={tmp_path}/out/voice.wav"]
    run = subprocess.run([sys.executable, str(ROOT / "scripts" / "separate_vocals.py"), *words], capture_output=True, text=True)
    assert run.returncode == 2 and run.stderr.startswith("error: cannot read audio") and run.stderr.count("\n") == 1
    assert not list((tmp_path / "out").iterdir())


def test_every_threshold_rejects_on_its_side_and_none_is_off() -> None:
    bounds = limits(FilterConfig())
    assert decide(dict.fromkeys(bounds), FilterConfig()) == [] == decide({}, FilterConfig())
    off = FilterConfig(**dict.fromkeys(vars(FilterConfig())))
    assert not any(limits(off).values())
    for name, sides in bounds.items():
        for side, bound in sides:
            worse = bound - 0.25 if side == "at least" else bound + 0.25
            assert decide({name: bound}, FilterConfig()) == [] == decide({name: worse}, off)
            assert decide({name: worse}, FilterConfig()) == [f"{name} {worse:g} {'<' if side == 'at least' else '>'} {bound:g}"]


def test_reasons_read_as_sentences() -> None:
    values = {"sharpness": 0.121, "sync_offset": -5.0, "face_confidence": 0.89999, "quality": None}
    assert decide(values, FilterConfig()) == ["face_confidence 0.89999 < 0.9", "sharpness 0.121 < 0.3", "sync_offset -5 < -3"]


def test_thresholds_are_read_from_words() -> None:
    class Settings(FilterConfig, Config):
        pass

    settings = load_config(Settings, None, ["sharpness=none", "cuts=null", "aesthetics=2.5", "faces=2"])
    assert (settings.sharpness, settings.cuts, settings.aesthetics, settings.faces) == (None, None, 2.5, 2)
    with pytest.raises(ValueError, match="sharpness must be a number or none, got 'dull'"):
        load_config(Settings, None, ["sharpness=dull"])
    with pytest.raises(ValueError, match="at least 0 and at most 1"):
        load_config(Settings, None, ["sharpness=2"])
    assert "aesthetics  (default: none)" in help_text(Settings())


def test_what_is_not_taken_is_said() -> None:
    assert [line.rpartition(": ")[2] for line in not_taken(ScoreConfig())] == [f"scores.{name} is empty" for name in
                                                                               ("insightface", "syncnet", "qalign")]
    assert not_taken(ScoreConfig(insightface="a", syncnet="b", qalign="c")) == []


def blurred(pixels: np.ndarray, sigma: float) -> np.ndarray:
    return (gaussian(pixels, sigma, channel_axis=2) * 255).astype(np.uint8)


def test_sharpness_falls_with_blur_and_not_with_size_or_contrast() -> None:
    picture = astronaut()
    values = [quality.sharpness(blurred(picture, sigma) if sigma else picture, 256) for sigma in (0, 1, 2, 4, 8)]
    assert values == sorted(values, reverse=True) and values[0] > 0.5 > values[-1]
    large = np.kron(picture, np.ones((2, 2, 1), np.uint8))
    assert quality.sharpness(large, 256) == pytest.approx(values[0], abs=0.02)
    faint = (picture // 4 + 100).astype(np.uint8)
    assert quality.sharpness(faint, 256) == pytest.approx(values[0], abs=0.03)
    assert quality.sharpness(np.full((64, 64, 3), 90, np.uint8), 256) == 0
    # A small face is as soft as it looks when it is shown large.
    assert quality.sharpness(picture[::8, ::8], 256) < values[0] - 0.1


def test_cut_out_and_confidence_of_a_known_face() -> None:
    picture = np.arange(100 * 80 * 3, dtype=np.uint32).reshape(80, 100, 3).astype(np.uint8)
    assert np.array_equal(quality.cut_out(picture, [-5.0, 10.2, 20.4, 200.0]), picture[10:80, 0:20])
    assert quality.cut_out(picture, [95, 0, 120, 50]) is None
    found = np.array([[0, 0, 10, 10, 0.99], [40, 40, 60, 60, 0.8], [41, 40, 60, 60, 0.9]], np.float32)
    assert quality.confidence_at(found, [40, 40, 60, 62]) == pytest.approx(0.9)
    assert quality.confidence_at(found, [80, 0, 95, 20]) == 0 == quality.confidence_at(found[:0], [0, 0, 1, 1])


def test_insightface_finds_what_its_model_finds(tmp_path: Path) -> None:
    pytest.importorskip("insightface")
    bright_cell_detector(tmp_path / "models" / "buffalo_l" / "det_10g.onnx")
    picture = np.zeros((640, 640, 3), np.uint8)
    picture[224:256, 160:192] = 230
    found = quality.insightface_detector(str(tmp_path), "cpu")(picture)
    np.testing.assert_allclose(found, [[160, 224, 192, 256, (230 - 127.5) / 128]], atol=1e-3)
    # Half the size: the detector sees it at its own, and tells boxes in the picture's.
    half = quality.insightface_detector(str(tmp_path), "cpu")(picture[::2, ::2])
    np.testing.assert_allclose(half[0, :4], [80, 112, 96, 128], atol=1)


def test_insightface_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no InsightFace detector in .*buffalo_l"):
        quality.insightface_detector(str(tmp_path), "cpu")
    pytest.importorskip("insightface")
    model = tmp_path / "models" / "buffalo_l" / "det_10g.onnx"
    model.parent.mkdir(parents=True)
    model.write_bytes(b"x" * 1000)
    with pytest.raises(ValueError, match="det_10g.onnx is damaged"):
        quality.insightface_detector(str(tmp_path), "cpu")


def moving(frames: int, seed: int, width: int = 128, height: int = 96) -> np.ndarray:
    """A pattern that drifts."""
    pattern = np.kron(np.random.default_rng(seed).integers(0, 256, (30, 40, 3), dtype=np.uint8), np.ones((8, 8, 1), np.uint8))
    return np.stack([pattern[number : number + height, number : number + width] for number in range(frames)])


def test_a_survey_counts_cuts_and_black_and_still_pictures(tmp_path: Path) -> None:
    black = np.zeros((10, 96, 128, 3), np.uint8)
    still = np.repeat(moving(1, 3), 60, axis=0)
    write_video(tmp_path / "one.mp4", moving(60, 1), "25")
    write_video(tmp_path / "two.mp4", np.concatenate([moving(60, 1), moving(50, 2)]), "25")
    write_video(tmp_path / "dull.mp4", np.concatenate([moving(30, 1), black, still]), "25")
    one, two, dull = (quality.survey(video_pictures(tmp_path / f"{name}.mp4"), [5, 40]) for name in ("one", "two", "dull"))
    assert (one.cuts, one.black, one.still) == (0, 0, 0) and (two.cuts, two.black) == (1, 0)
    assert dull.black == pytest.approx(0.1) and dull.still == pytest.approx(0.6, abs=0.02)
    assert list(one.samples) == [5, 40] and np.abs(one.samples[40].astype(int) - moving(60, 1)[40]).max() < 8


def test_frames_on_another_grid() -> None:
    assert scores.nearest_frames(10, 25, 25) == list(range(10))
    assert scores.nearest_frames(6, 50, 25) == [0, 2, 4] and scores.nearest_frames(3, 12.5, 25) == [0, 0, 1, 1, 2, 2]
    frames = [np.full((2, 2, 3), number) for number in range(4)]
    assert [frame[0, 0, 0] for frame in scores.repeat_frames(iter(frames), [0, 0, 2, 3, 3])] == [0, 0, 2, 3, 3]
    assert scores.spread(100, 4) == [12, 37, 62, 87] and scores.spread(3, 8) == [0, 1, 2]


def test_boxes_are_known_everywhere() -> None:
    boxes = scores.whole_track([None, [0, 0, 10, 10], None, [4, 2, 14, 12], None])
    assert boxes.tolist() == [[0, 0, 10, 10], [0, 0, 10, 10], [2, 1, 12, 11], [4, 2, 14, 12], [4, 2, 14, 12]]


@pytest.fixture
def clip(tmp_path: Path) -> ClipFolder:
    """Two seconds at 30 fps that drift, with speech, and the head of an astronaut for a face."""
    folder = tmp_path / "clip"
    with_sound(folder, speech()[:32_000])
    pictures = moving(60, 4)
    pictures[:, 20:80, 30:80] = astronaut()[:240:4, 120:320:4]
    write_video(folder / "sub_clip.mp4", pictures, "30")
    return clip_of(folder, 60, 30.0)


def earlier_values(clip: ClipFolder) -> dict[str, dict]:
    masks = {"confidence_mean": 0.97, "faces_median": 1.0, "faces_max": 2, "missing_share": 0.1, "face_size": 0.6,
             "boxes": [None] * 6 + [[30.0, 20.0, 80.0, 80.0]] * 54}  # fmt: skip
    return {"crop": {"static_background": 0.25}, "voice": process_voice(clip, VoiceConfig()), "masks": masks}


def test_all_scores_of_a_clip(tmp_path: Path, clip: ClipFolder) -> None:
    torch.manual_seed(0)
    torch.save(SyncNet().state_dict(), tmp_path / "syncnet_v2.model")
    values = earlier_values(clip)
    plain = scores.score(clip, ScoreConfig(samples=3), values)
    assert list(plain) == list(limits(FilterConfig()))
    assert {name for name, value in plain.items() if value is None} == {
        "sync_confidence", "sync_distance", "sync_offset", "quality", "aesthetics"
    }
    assert (plain["face_confidence"], plain["static_background"]) == (0.97, 0.25) and plain["cuts"] == plain["black"] == plain["still"] == 0
    assert 0 < plain["sharpness"] < 1 and 0 < plain["face_sharpness"] < 1 and plain["voice"] > 0.7
    assert decide(plain, FilterConfig(sharpness=None, face_sharpness=None)) == ["faceless 0.1 > 0.05", "static_background 0.25 < 0.5"]
    synced = scores.score(clip, ScoreConfig(samples=3, syncnet=str(tmp_path / "syncnet_v2.model"), device="cpu"), values)
    assert abs(synced["sync_offset"]) <= 15 and synced["sync_distance"] > 0 and synced["sync_confidence"] >= 0
    assert {name: synced[name] for name in plain if not name.startswith("sync")} == {
        name: value for name, value in plain.items() if not name.startswith("sync")
    }


def test_insightface_takes_over_the_confidence(tmp_path: Path, clip: ClipFolder) -> None:
    pytest.importorskip("insightface")
    bright_cell_detector(tmp_path / "models" / "buffalo_l" / "det_10g.onnx")
    taken = scores.score(clip, ScoreConfig(samples=3, insightface=str(tmp_path), device="cpu"), earlier_values(clip))
    assert taken["face_confidence"] == 0 and any(reason.startswith("face_confidence 0 <") for reason in decide(taken, FilterConfig()))


def test_q_align_here_and_in_another_environment(tiny_align: Path, clip: ClipFolder) -> None:
    values = earlier_values(clip)
    config = ScoreConfig(samples=3, qalign=str(tiny_align), trust_remote_code=True, device="cpu")
    here = scores.score(clip, config, values)
    light = np.mean([pixels.mean() / 255 for pixels in video_pictures(clip.folder / "sub_clip.mp4").read(scores.spread(60, 3))])
    assert here["quality"] == pytest.approx(1 + 4 * light, abs=1e-4) and here["aesthetics"] == pytest.approx(5 - 4 * light, abs=1e-4)
    config.qalign_python = sys.executable
    assert scores.score(clip, config, values) == here


def test_q_align_needs_leave_and_says_what_is_wrong(tiny_align: Path, tmp_path: Path) -> None:
    for words, folder, options in [
        ("trust_remote_code=true", tiny_align, {}),
        ("no Q-Align in", tmp_path / "none", {}),
        ("no program .*nopython", tiny_align, {"trust_remote_code": True, "qalign_python": str(tmp_path / "nopython")}),
    ]:
        with pytest.raises(ValueError, match=words):
            scores.check_models(ScoreConfig(qalign=str(folder), **options))


def test_a_model_that_fails_is_no_fault_of_the_clip(tiny_align: Path, tmp_path: Path, clip: ClipFolder) -> None:
    values = earlier_values(clip)
    (tiny_align / "modeling_tiny.py").write_text(MODELLING.replace("return 1 +", "return 9 +"))
    with pytest.raises(OSError, match="quality of .*expected 1 to 5"):
        scores.score(clip, ScoreConfig(samples=1, qalign=str(tiny_align), trust_remote_code=True, device="cpu"), values)
    (tmp_path / "syncnet_v2.model").write_bytes(b"x")
    with pytest.raises(OSError, match="does not hold SyncNet's weights"):
        scores.score(clip, ScoreConfig(samples=1, syncnet=str(tmp_path / "syncnet_v2.model"), device="cpu"), values)
    with pytest.raises(ValueError, match="does not hold SyncNet's weights"):
        scores.check_models(ScoreConfig(syncnet=str(tmp_path / "syncnet_v2.model")))
    dead = tmp_path / "dead"
    dead.write_text("#!/bin/sh\necho out of luck >&2\n")
    dead.chmod(0o755)
    with pytest.raises(OSError, match="Q-Align ended in .*dead: out of luck"):
        scores.score(clip, ScoreConfig(samples=1, qalign=str(tiny_align), trust_remote_code=True, qalign_python=str(dead)), values)

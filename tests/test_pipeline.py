"""The whole walk with tiny real models: lengths, identities, strategies, memory modes."""

import logging

import numpy as np
import pytest
import soundfile
import torch
from accelerate import cpu_offload
from make_tiny_model import tiny_pipeline, tiny_transformer
from PIL import Image

from stableavatar.config import MemoryConfig
from stableavatar.media import AudioTrack
from stableavatar.pipeline import StableAvatarPipeline
from stableavatar.sampling.guidance import Text
from stableavatar.sampling.offload import place
from stableavatar.sampling.windows import Window

WINDOW = 21 * 640
"""Samples of a window of the tests' settings."""


@pytest.mark.parametrize(
    "samples, frames",
    [(160, 1), (640, 1), (1300, 2), (16_000, 25), (WINDOW, 21), (WINDOW + 640, 22), (51_840, 81), (52_480, 82), (160_000, 250)],
)
def test_a_video_is_as_long_as_its_audio(pipe, portrait, make_voice, settings, samples, frames):
    video = pipe(str(portrait), str(make_voice(samples)), "a man speaks", settings(steps=1, guidance__name="none"))
    assert video.shape == (frames, 32, 32, 3) and video.dtype == torch.uint8
    assert video.float().std() > 1


@pytest.mark.parametrize("tail", ["cut", "shift"])
@pytest.mark.parametrize("latents", [6, 7, 10, 11])
def test_the_end_is_as_lively_as_the_middle(pipe, make_voice, settings, latents, tail):
    """Every latent frame of every window, the last one too, has left the noise and holds a picture."""
    config = settings(windows__tail=tail, steps=4)
    with AudioTrack(make_voice((4 * latents - 3) * 640)) as track:
        conditioning = pipe.encode(torch.rand(3, 32, 32) * 2 - 1, track, "x", 4 * latents - 3, config)
        video = torch.cat(list(pipe.denoise(conditioning, 4 * latents - 3, config)), dim=1)
    spread, moves = video.std((0, 2, 3)), video.diff(dim=1).abs().mean((0, 2, 3))
    assert video.shape[1] == latents and spread.min() > 0.5 * spread.median() and spread.max() < 2 * spread.median()
    assert moves.min() > 0.3 * moves.median() and moves.max() < 3 * moves.median()


def test_frames_come_as_a_stream_in_order(pipe, portrait, make_voice, settings):
    config = settings()
    parts = list(pipe.stream(str(portrait), str(make_voice(40_000)), "", config))
    assert len(parts) > 5 and torch.equal(torch.cat(parts), pipe(str(portrait), str(make_voice(40_000)), "", config))


@pytest.mark.parametrize("change", [{"windows__order": "step_major"}, {"guidance__batched": True}])
def test_settings_that_change_only_how_give_the_same_video(pipe, portrait, make_voice, settings, change):
    videos = [pipe(str(portrait), str(make_voice(40_000)), "x", settings(**c)).short() for c in ({}, change)]
    assert (videos[0] - videos[1]).abs().max() <= 1


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1}, {"guidance__name": "audio_native"}, {"guidance__name": "none"}, {"guidance__audio_scale": 9.0}, {"guidance__end": 0.5},
        {"windows__weights": "none"}, {"windows__tail": "shift"}, {"windows__strategy": "motion_frame"}, {"solver": "unipc"},
        {"shift": 1.0}, {"noise_scale": 0.5}, {"steps": 3}, {"negative_prompt": "blurry"}, {"fit": "stretch"}, {"fps": 20.0},
    ],
)  # fmt: skip
def test_every_setting_has_an_effect(pipe, portrait, make_voice, settings, change):
    videos = [pipe(str(portrait), str(make_voice(40_000)), "x", settings(**c)) for c in ({}, change)]
    assert not torch.equal(*videos)


def test_voice_and_prompt_have_an_effect(pipe, portrait, make_voice, settings, tmp_path):
    config = settings()
    silence = tmp_path / "silence.wav"
    soundfile.write(silence, np.zeros(40_000, np.float32), 16_000)
    voice = str(make_voice(40_000))
    base, other, quiet = (pipe(str(portrait), *rest, config) for rest in ((voice, "x"), (voice, "another"), (str(silence), "x")))
    assert not torch.equal(base, other) and not torch.equal(base, quiet)
    with AudioTrack(make_voice(40_000)) as track:
        features = [pipe._encode_window(track, 25, Window(start, start + 3)) for start in (0, 4)]
    assert features[0].shape == features[1].shape and not torch.equal(*features)


def test_the_encoders_run_once(pipe, portrait, make_voice, settings):
    calls = {"text_encoder": 0, "image_encoder": 0, "audio_encoder": 0}

    def count(name):
        def hook(*_):
            calls[name] += 1

        return getattr(pipe, name).register_forward_hook(hook)

    handles = [count(name) for name in calls]
    pipe(str(portrait), str(make_voice(40_000)), "x", settings(steps=4))
    for handle in handles:
        handle.remove()
    assert calls == {"text_encoder": 1, "image_encoder": 1, "audio_encoder": 4}


def test_a_window_hears_exactly_its_frames(pipe, make_voice):
    with AudioTrack(make_voice(200_000)) as track:
        assert pipe._encode_window(track, 25, Window(16, 37)).shape == (1, 161, 32)
        late = pipe._encode_window(track, 25, Window(70, 91))
        assert late.shape == (1, 161, 32) and torch.isfinite(late).all()


def test_broken_weights_are_an_error_not_a_black_video(portrait, make_voice, settings):
    broken = tiny_pipeline()
    broken.set_progress_bar_config(disable=True)
    torch.nn.init.constant_(broken.transformer.head.head.bias, float("nan"))
    with pytest.raises(ValueError, match="NaN"):
        broken(str(portrait), str(make_voice(1300)), "x", settings())


@pytest.mark.parametrize("mode", ["RGBA", "L", "P"])
def test_a_picture_of_any_mode_is_taken(pipe, portrait, make_voice, settings, mode):
    with Image.open(portrait) as picture:
        assert pipe(picture.convert(mode), str(make_voice(640)), "", settings(steps=1)).shape == (1, 32, 32, 3)


@pytest.mark.parametrize("field, value", [("steps", 0), ("width", 0), ("fps", 0.0), ("solver", "magic")])
def test_settings_are_checked_here_too(pipe, portrait, make_voice, settings, field, value):
    config = settings()
    setattr(config, field, value)
    with pytest.raises(ValueError, match=field):
        pipe(str(portrait), str(make_voice(640)), "", config)


def test_parts_of_different_models_are_an_error(pipe):
    parts = dict(pipe.components) | {"transformer": tiny_transformer(audio_dim=48)}
    with pytest.raises(ValueError, match="speech encoder gives 32"):
        StableAvatarPipeline(**parts)


def test_motion_frames_need_an_overlap(settings):
    with pytest.raises(ValueError, match="overlap"):
        settings(windows__strategy="motion_frame", windows__overlap=0)


def test_cfg_alone_needs_the_negative_prompt(pipe, portrait, make_voice, settings):
    with AudioTrack(make_voice(1000)) as track:
        pixels = torch.zeros(3, 32, 32)
        assert set(pipe.encode(pixels, track, "x", 1, settings()).text) == {Text.POSITIVE, Text.NEGATIVE}
        assert set(pipe.encode(pixels, track, "x", 1, settings(guidance__name="audio_native")).text) == {Text.POSITIVE}


def test_motion_frames_continue_the_clip_before(pipe, portrait, make_voice, settings):
    """The next clip's reference gives the last pixels of the one before, exactly as the VAE encodes them."""
    clip = torch.randn(16, 6, 4, 4)
    channels = pipe._continue_reference(clip, 2)
    assert channels.shape == (20, 6, 4, 4) and channels[:4, :2].min() == 1 and not channels[:4, 2:].any()
    frames = torch.cat(list(pipe.vae.decode_stream([clip])), dim=1)[:, -5:]
    again = torch.cat(list(pipe.vae.encode_stream([frames])), dim=1)
    torch.testing.assert_close(channels[4:, :2], again)


def test_odd_sizes_are_rounded_with_a_message(pipe, portrait, make_voice, settings, caplog):
    with caplog.at_level(logging.WARNING, "stableavatar"):
        video = pipe(str(portrait), str(make_voice(640)), "", settings(width=50, height=23, steps=1))
    assert video.shape[1:3] == (16, 48) or video.shape[1:3] == (32, 48)
    assert "rounded" in caplog.text


@pytest.mark.parametrize("strategy", ["sliding", "motion_frame"])
def test_a_killed_generation_goes_on_bit_for_bit(pipe, portrait, make_voice, settings, tmp_path, strategy):
    inputs = (str(portrait), str(make_voice(40_000)), "x")
    plain = settings(windows__strategy=strategy)
    whole = pipe(*inputs, plain)
    config = settings(windows__strategy=strategy, work_dir=str(tmp_path / "work"), save_every=0.0)
    stream = pipe.stream(*inputs, config)
    for _ in range(9):
        next(stream)
    stream.close()
    assert torch.equal(whole, pipe(*inputs, config))
    with pytest.raises(ValueError, match="differs in: prompt"):
        pipe(*inputs[:2], "y", config)


def test_saved_and_loaded_it_makes_the_same_video(pipe, tiny_folder, portrait, make_voice, settings):
    again = StableAvatarPipeline.from_config(settings(model=str(tiny_folder)))
    inputs = (str(portrait), str(make_voice(20_000)), "x", settings())
    assert torch.equal(pipe(*inputs), again(*inputs))


@pytest.mark.parametrize("change", [{"memory__fp8": True}, {"memory__vae_tiling": True}, {"dtype": "bfloat16"}])
def test_memory_modes_stay_close(tiny_folder, portrait, make_voice, settings, change):
    size = {"width": 272, "height": 272, "windows__frames": 5, "windows__overlap": 1} if "memory__vae_tiling" in change else {}
    videos = []
    for settings_of_run in (size, size | change):
        config = settings(model=str(tiny_folder), steps=1, guidance__name="none", **settings_of_run)
        videos.append(StableAvatarPipeline.from_config(config)(str(portrait), str(make_voice(1400)), "x", config).float())
    difference = (videos[0] - videos[1]).abs()
    assert 0 < difference.max() and difference.mean() < 0.1 * (videos[0] - videos[0].mean()).abs().mean() + 2


@pytest.mark.parametrize("mode", ["model_offload", "group_offload", "sequential_offload"])
def test_offloading_on_a_cpu_says_that_it_does_nothing(tiny_folder, settings, caplog, mode):
    with caplog.at_level(logging.WARNING, "stableavatar"):
        StableAvatarPipeline.from_config(settings(model=str(tiny_folder), memory__mode=mode, device="cpu"))
    assert mode in caplog.text


@pytest.mark.parametrize("mode", ["model_offload", "group_offload", "sequential_offload"])
def test_offloaded_models_make_the_same_video(pipe, portrait, make_voice, settings, mode):
    """The library's hooks work from host to host as well: what they would break on a GPU, they break here."""
    inputs = (str(portrait), str(make_voice(20_000)), "x", settings())
    offloaded = tiny_pipeline()
    offloaded.set_progress_bar_config(disable=True)
    if mode == "sequential_offload":  # the pipeline's own call trips over tied weights where host and device are the same
        for module in filter(lambda part: isinstance(part, torch.nn.Module), offloaded.components.values()):
            cpu_offload(module, torch.device("cpu"), offload_buffers=True)
    else:
        place(offloaded, MemoryConfig(mode), torch.device("cpu"))
    assert (offloaded(*inputs).short() - pipe(*inputs).short()).abs().max() <= 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("mode", ["full", "model_offload", "group_offload", "sequential_offload"])
def test_every_memory_mode_on_a_gpu_gives_the_same_video(tiny_folder, portrait, make_voice, settings, mode):
    inputs = (str(portrait), str(make_voice(20_000)), "x")
    config = settings(model=str(tiny_folder), memory__mode=mode, device="cuda", dtype="float32")
    video = StableAvatarPipeline.from_config(config)(*inputs, config)
    assert (video.short() - tiny_pipeline()(*inputs, config).short()).abs().max() <= 2


@pytest.mark.parametrize("device", ["quantum", "cuda:99", "meta"])
def test_a_device_that_is_not_there_is_an_error(device, tiny_folder, settings):
    with pytest.raises(ValueError, match="device must be"):
        StableAvatarPipeline.from_config(settings(model=str(tiny_folder), device=device))

"""Samples are encoded as the pipeline encodes its conditions, wherever the encoders live meanwhile."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from make_tiny_model import tiny_pipeline

from stableavatar.data.samples import TENSORS, Bucket, EncodedSample, Item, Sample, stack
from stableavatar.encoders import encode_text
from stableavatar.media import AudioTrack
from stableavatar.sampling.guidance import Text
from stableavatar.sampling.windows import Window
from stableavatar.training import encode
from stableavatar.training.encode import SampleEncoder
from stableavatar.training.parts import FROZEN

FRAMES, LENGTH = 9, 40
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def parts(pipe) -> dict:
    return {name: pipe.components[name] for name in FROZEN}


def make_sample(seed: int = 0, prompt: str = "a man talks", frames: int = FRAMES) -> Sample:
    random = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (frames, 32, 48, 3), generator=random, dtype=torch.uint8)
    waveform = torch.randn(640 * frames, generator=random).numpy()
    masks = torch.rand((2, (frames + 3) // 4, 4, 6), generator=random)
    return Sample(Item(seed, Bucket(48, 32, frames), 0, 0, 0, 0, 1), f"clip{seed}", prompt, pixels, waveform, masks)


def assert_equal(a: EncodedSample, b: EncodedSample) -> None:
    assert (a.item, a.name) == (b.item, b.name)
    for name in TENSORS:
        assert torch.equal(getattr(a, name), getattr(b, name)), name


def test_a_sample_is_encoded_as_the_pipeline_encodes_its_conditions(pipe, parts, make_voice, settings) -> None:
    sample, length = make_sample(), pipe.transformer.config.text_length
    with AudioTrack(make_voice(640 * FRAMES)) as track:
        portrait = (sample.pixels[0] / 127.5 - 1).permute(2, 0, 1)
        conditioning = pipe.encode(portrait, track, sample.prompt, FRAMES, settings(guidance__name="none"))
        sample = Sample(**vars(sample) | {"waveform": track.read(0, 640 * FRAMES)})
        features = conditioning.audio(Window(0, 3))
    (encoded,) = SampleEncoder(parts, length, CPU).encode([sample])
    batch = stack([encoded], length, CPU)
    assert torch.equal(batch.reference, conditioning.reference[None, 4:])
    assert torch.equal(batch.text, conditioning.text[Text.POSITIVE])
    assert torch.equal(batch.image, conditioning.image)
    assert torch.equal(batch.audio, features)
    assert torch.equal(encoded.masks, sample.masks) and (encoded.item, encoded.name) == (sample.item, sample.name)
    assert not any(getattr(encoded, name).requires_grad for name in TENSORS)


def test_latents_are_those_of_the_whole_video(pipe, parts) -> None:
    sample = make_sample(frames=13)
    (encoded,) = SampleEncoder(parts, LENGTH, CPU).encode([sample])
    video = (sample.pixels.float() / 127.5 - 1).permute(3, 0, 1, 2)
    expected = torch.cat(list(pipe.vae.encode_stream([video])), dim=1)
    assert torch.equal(encoded.latents, expected) and encoded.latents.shape == (16, *sample.item.bucket.latents)
    assert encoded.latents.std() > 0.1 and not torch.equal(encoded.latents, encoded.reference)


def test_neighbours_and_the_hand_over_change_nothing(parts) -> None:
    samples = [make_sample(seed, prompt) for seed, prompt in enumerate(["a man talks", "a woman sings a long song", "a man talks"])]
    together = SampleEncoder(parts, LENGTH, CPU).encode(samples)
    alone = [SampleEncoder(parts, LENGTH, CPU, handover=True).encode([sample])[0] for sample in samples]
    for a, b in zip(together, alone, strict=True):
        assert_equal(a, b)


def test_text_is_the_prompts_own_tokens_cut_to_the_length(pipe, parts) -> None:
    prompts = ["", "hm", "a man talks", "word " * 30]
    encoded = SampleEncoder(parts, LENGTH, CPU).encode([make_sample(prompt=prompt) for prompt in prompts])
    assert [len(sample.text) for sample in encoded] == [1, 3, 12, LENGTH]  # bytes and the end-of-sequence token
    expected = torch.cat([encode_text(pipe.text_encoder, pipe.tokenizer, [prompt], LENGTH) for prompt in prompts])
    assert torch.equal(stack(encoded, LENGTH, CPU).text, expected)


def moves(parts: dict, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """A growing list of (model, where it was moved to)."""
    seen: list[tuple[str, str]] = []

    def follow(name: str, move: Callable) -> Callable:
        return lambda place: (seen.append((name, str(place))), move(place))[1]

    for name in ("vae", "text_encoder", "image_encoder", "audio_encoder"):
        monkeypatch.setattr(parts[name], "to", follow(name, parts[name].to))
    return seen


def test_one_model_at_a_time_visits_the_device_for_a_whole_list(parts, monkeypatch) -> None:
    seen = moves(parts, monkeypatch)
    samples = [make_sample(seed) for seed in range(3)]
    SampleEncoder(parts, LENGTH, torch.device("cpu:0"), handover=True).encode(samples)
    visits = ["vae", "text_encoder", "image_encoder", "audio_encoder"]
    assert seen == [(name, place) for name in visits for place in ("cpu:0", "cpu")]


def test_a_visit_ends_when_encoding_fails(parts, monkeypatch) -> None:
    seen = moves(parts, monkeypatch)
    sample = Sample(**vars(make_sample()) | {"pixels": torch.zeros(6, 32, 48, 3, dtype=torch.uint8)})
    with pytest.raises(ValueError, match="1 \\+ 4k"):
        SampleEncoder(parts, LENGTH, torch.device("cpu:0"), handover=True).encode([sample])
    assert seen == [("vae", "cpu:0"), ("vae", "cpu")]


def test_kept_models_move_only_when_released(parts, monkeypatch) -> None:
    seen = moves(parts, monkeypatch)
    encoder = SampleEncoder(parts, LENGTH, torch.device("cpu:0"))
    encoder.encode([make_sample()])
    assert {place for _, place in seen} == {"cpu:0"}
    seen.clear()
    encoder.release()
    assert sorted(seen) == [(name, "cpu") for name in ("audio_encoder", "image_encoder", "text_encoder", "vae")]
    seen.clear()
    with encoder.resident():
        assert len(seen) == 4 and {place for _, place in seen} == {"cpu:0"}


def test_known_prompts_leave_the_text_encoder_alone(parts, monkeypatch) -> None:
    monkeypatch.setattr(encode, "REMEMBERED", 2)
    encoder = SampleEncoder(parts, LENGTH, CPU)
    first = encoder.encode([make_sample(prompt=prompt) for prompt in "abc"])
    seen = moves(parts, monkeypatch)
    assert_equal(encoder.encode([make_sample(prompt="c")])[0], first[2])
    assert "text_encoder" not in dict(seen)
    assert_equal(encoder.encode([make_sample(prompt="a")])[0], first[0])  # forgotten, and encoded again
    assert "text_encoder" in dict(seen)


def test_encoders_in_bfloat16_give_text_and_image_in_it() -> None:
    pipe = tiny_pipeline()
    parts = {name: pipe.components[name] for name in FROZEN}
    for name in ("text_encoder", "image_encoder"):
        parts[name].bfloat16()
    (encoded,) = SampleEncoder(parts, LENGTH, CPU).encode([make_sample()])
    wide = {name for name in TENSORS if getattr(encoded, name).dtype == torch.float32}
    assert wide == {"latents", "reference", "audio", "masks"} and encoded.text.dtype == encoded.image.dtype == torch.bfloat16


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_hand_over_leaves_nothing_behind() -> None:
    device, samples = torch.device("cuda"), [make_sample(seed) for seed in range(2)]
    pipe = tiny_pipeline()
    parts = {name: pipe.components[name] for name in FROZEN}
    kept = SampleEncoder(parts, LENGTH, device)
    expected = kept.encode(samples)
    assert parts["vae"].device.type == "cuda"
    kept.release()
    before = torch.cuda.memory_allocated()
    encoded = SampleEncoder(parts, LENGTH, device, handover=True).encode(samples)
    assert {parts[name].device.type for name in ("vae", "text_encoder", "image_encoder", "audio_encoder")} == {"cpu"}
    for a, b in zip(encoded, expected, strict=True):
        assert a.latents.device.type == "cuda"
        for name in TENSORS:
            torch.testing.assert_close(getattr(a, name), getattr(b, name))
    held = sum(getattr(sample, name).untyped_storage().nbytes() for sample in encoded for name in TENSORS)
    assert torch.cuda.memory_allocated() - before <= held + 2**20
    assert np.isfinite(encoded[0].latents.cpu().numpy()).all()

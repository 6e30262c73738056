"""Encoders: what each prepares for its model, and what it gives back."""

from copy import deepcopy

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import CLIPVisionModel

from stableavatar.encoders import CLIP_MEAN, CLIP_STD, clean_prompt, encode_audio, encode_image, encode_pixels, encode_text


def test_prompts_are_cleaned() -> None:
    assert clean_prompt("  a\n\tman &amp;amp; a\u3000woman  ") == "a man & a woman"


def test_text_is_zero_after_each_prompt_and_independent_of_its_neighbours(pipe) -> None:
    prompts = ["a person talks", "hm", "", "   "]
    together = encode_text(pipe.text_encoder, pipe.tokenizer, prompts, length=24)
    assert together.shape == (4, 24, 32)
    assert not together.requires_grad
    for prompt, embedding in zip(prompts, together, strict=True):
        used = len(prompt.strip().encode()) + 1  # bytes and the end-of-sequence token
        assert embedding[:used].abs().sum(1).all() and not embedding[used:].any()
        torch.testing.assert_close(encode_text(pipe.text_encoder, pipe.tokenizer, [prompt], length=24)[0], embedding)


def test_long_prompts_are_cut(pipe) -> None:
    embeddings = encode_text(pipe.text_encoder, pipe.tokenizer, ["word " * 100], length=12)
    assert embeddings.shape == (1, 12, 32)
    assert embeddings.abs().sum(2).all()


def test_image_is_resized_normalised_and_read_before_the_last_block(pipe) -> None:
    model = pipe.image_encoder
    images = torch.rand(2, 3, 40, 56) * 2 - 1
    got = encode_image(model, images)
    assert got.shape == (2, 257, 32) and not got.requires_grad
    pixels = functional.interpolate((images + 1) / 2, (224, 224), mode="bicubic")
    pixels = (pixels - torch.tensor(CLIP_MEAN)[:, None, None]) / torch.tensor(CLIP_STD)[:, None, None]
    torch.testing.assert_close(got, encode_pixels(model, pixels))
    last = model.vision_model.encoder.layers[-1]
    with torch.no_grad():
        after = last(got, attention_mask=None)
        torch.testing.assert_close(after[0] if isinstance(after, tuple) else after, model(pixel_values=pixels).last_hidden_state)


def test_image_tower_with_and_without_projection_agree(pipe) -> None:
    tower = CLIPVisionModel(pipe.image_encoder.config).eval()
    tower.load_state_dict(pipe.image_encoder.vision_model.state_dict())
    images = torch.rand(1, 3, 224, 224)
    torch.testing.assert_close(encode_image(tower, images), encode_image(pipe.image_encoder, images))


@pytest.mark.parametrize(("samples", "tokens"), [(51_840, 161), (640, 1), (26_240, 81)])
def test_audio_tokens_per_window_do_not_depend_on_loudness_or_offset(pipe, samples: int, tokens: int) -> None:
    waveform = np.sin(np.arange(samples) / 5).astype(np.float32) * np.linspace(0.1, 1, samples, dtype=np.float32)
    features = encode_audio(pipe.audio_encoder, pipe.audio_processor, waveform)
    assert features.shape == (1, tokens, 32) and not features.requires_grad
    shifted = encode_audio(pipe.audio_encoder, pipe.audio_processor, waveform * 0.3 + 0.2)
    torch.testing.assert_close(shifted, features, rtol=1e-3, atol=1e-4)


def test_silence_encodes_to_finite_numbers(pipe) -> None:
    assert encode_audio(pipe.audio_encoder, pipe.audio_processor, np.zeros(3200, np.float32)).isfinite().all()


def test_results_have_the_models_precision(pipe) -> None:
    encoder, waveform = deepcopy(pipe.audio_encoder).bfloat16(), np.ones(3200, np.float32)
    assert encode_audio(encoder, pipe.audio_processor, waveform).dtype == torch.bfloat16

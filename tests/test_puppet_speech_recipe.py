"""Training of the puppet world's speech encoder, and its frozen companions."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Wav2Vec2FeatureExtractor, Wav2Vec2Model

from stableavatar.encoders import encode_audio, encode_image, encode_text
from stableavatar.geometry import IMAGE_TOKENS, SAMPLE_RATE
from stableavatar.puppet import speech_recipe
from stableavatar.puppet.parts import IMAGE_DIM, TEXT_DIM, frozen_parts
from stableavatar.puppet.speech_pool import (
    Segment,
    augment,
    classes_at,
    draw_segments,
    spoken,
    token_count,
    token_times,
    training_batch,
)  # fmt: skip
from stableavatar.puppet.speech_recipe import SpeechConfig, SpeechTrainer, edit_distance, greedy, speech_model, train_speech
from stableavatar.puppet.visemes import PHONEMES


def small_model() -> torch.nn.Module:
    """The same weights in whatever order tests run."""
    torch.manual_seed(0)
    return speech_model(hidden=32, layers=1)


def settings(folder: Path, **changes: object) -> SpeechConfig:
    return SpeechConfig(**{"output": str(folder), "steps": 4, "batch": 2, "pool": 4, "held_out": 3, "warmup": 1} | changes)


@pytest.fixture(scope="module")
def pool() -> list[Segment]:
    return draw_segments(4, seed=1)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, pool: list[Segment]) -> None:
    """train_speech with a small model and utterances that are already there."""
    monkeypatch.setattr(speech_recipe, "speech_model", small_model)
    monkeypatch.setattr(speech_recipe, "draw_segments", lambda count, *_, **__: pool[:count])


def test_segments_follow_from_seed_and_number(pool: list[Segment]) -> None:
    again = draw_segments(2, seed=1)
    assert np.array_equal(again[1].waveform, pool[1].waveform) and again[1].phonemes == pool[1].phonemes
    assert not np.array_equal(pool[0].waveform, pool[1].waveform)
    assert not np.array_equal(draw_segments(1, seed=1, held_out=True)[0].waveform, pool[0].waveform)


def test_tokens_are_those_of_the_model() -> None:
    model = small_model().wav2vec2
    for samples in (399, 400, 719, 720, 26_240, 51_840):
        assert token_count(samples) == max(0, int(model._get_feat_extract_output_lengths(samples)))
    assert token_times(3) == pytest.approx([0.0125, 0.0325, 0.0525])


def test_phonemes_of_a_cut() -> None:
    phonemes = [(3, -0.1, 0.05), (0, 0.05, 0.1), (5, 0.1, 0.2), (6, 0.2, 0.5)]
    assert spoken(phonemes, 0.3) == [5]
    assert classes_at(phonemes, np.array([0.01, 0.06, 0.1, 0.19, 0.2, 0.6])).tolist() == [3, 0, 5, 5, 6, 0]


def test_batch_is_normalised_and_aligned(pool: list[Segment]) -> None:
    batch = training_batch(pool, 3, np.random.default_rng(0))
    assert batch.waveforms.dtype == torch.float32 and 1.6 * SAMPLE_RATE < batch.waveforms.shape[1] < 3.3 * SAMPLE_RATE
    assert batch.waveforms.mean(1).abs().max() < 1e-3 and (batch.waveforms.std(1) - 1).abs().max() < 1e-2
    assert batch.classes.shape == (3, token_count(batch.waveforms.shape[1]))
    closed = torch.tensor([PHONEMES.index(letter) for letter in ("p", "b", "m")])
    assert batch.mouths.shape == (*batch.classes.shape, 2) and batch.mouths.min() >= 0 and batch.mouths.max() <= 1
    apertures = batch.mouths[..., 0]
    assert apertures[torch.isin(batch.classes, closed)].mean() < 0.15 < 0.35 < apertures[batch.classes == PHONEMES.index("a")].mean()
    for labels, classes in zip(batch.labels, batch.classes):
        heard, said = [i for i in torch.unique_consecutive(classes).tolist() if i], [i for i in labels.tolist() if i > 0]
        assert edit_distance(heard, said) <= 0.3 * len(said)  # phonemes shorter than a token, and cut ones


def test_augmentation_keeps_the_sound(pool: list[Segment]) -> None:
    waveform = pool[0].waveform[:32_000]
    altered = [augment(waveform, np.random.default_rng(seed)) for seed in range(8)]
    assert all(each.dtype == np.float32 and each.shape == waveform.shape for each in altered)
    correlations = [np.corrcoef(waveform, each)[0, 1] for each in altered]
    assert min(correlations) > 0.5 and max(correlations) < 1


@pytest.mark.parametrize(("one", "other", "distance"), [([], [], 0), ([1, 2], [], 2), ([1, 2, 3], [1, 3], 1), ([1, 2], [2, 1], 2)])
def test_edit_distance(one: list[int], other: list[int], distance: int) -> None:
    assert edit_distance(one, other) == edit_distance(other, one) == distance


def test_greedy_joins_repeats() -> None:
    assert greedy(torch.eye(4)[[0, 2, 2, 0, 2, 3, 3, 1]]) == [2, 2, 3, 1]


def test_steps_lower_the_loss(pool: list[Segment]) -> None:
    trainer = SpeechTrainer(SpeechConfig(steps=60, batch=2, warmup=5, lr=5e-3), small_model())
    losses = np.array([trainer.advance(pool) for _ in range(30)])
    ctc, aligned, mouth = losses[-5:].mean(0) / losses[:5].mean(0)
    assert ctc < 0.8 and aligned < 1 and mouth < 0.5


def test_ctc_is_the_librarys(pool: list[Segment]) -> None:
    trainer = SpeechTrainer(SpeechConfig(), small_model())
    batch = training_batch(pool, 2, np.random.default_rng(0))
    theirs = trainer.model(batch.waveforms, labels=batch.labels).loss
    assert trainer.losses(batch)[0].item() == pytest.approx(theirs.item(), rel=1e-5)


def test_resumed_equals_uninterrupted(tmp_path: Path, pool: list[Segment]) -> None:
    config = settings(tmp_path)
    whole = SpeechTrainer(config, small_model())
    start = {name: value.clone() for name, value in whole.model.state_dict().items()}
    for _ in range(3):
        whole.advance(pool)
    half, rest = (SpeechTrainer(config, small_model()) for _ in range(2))
    half.model.load_state_dict(start)
    half.advance(pool)
    half.save(tmp_path / "state.pt")
    rest.load(tmp_path / "state.pt")
    for _ in range(2):
        rest.advance(pool)
    assert all(torch.equal(value, rest.model.state_dict()[name]) for name, value in whole.model.state_dict().items())


def test_another_training_is_refused(tmp_path: Path) -> None:
    SpeechTrainer(settings(tmp_path), small_model()).save(tmp_path / "state.pt")
    with pytest.raises(ValueError, match="with batch=2"):
        SpeechTrainer(settings(tmp_path, batch=3), small_model()).load(tmp_path / "state.pt")


@pytest.mark.usefixtures("small")
def test_folder_is_what_the_pipeline_loads(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "stableavatar"):
        train_speech(settings(tmp_path / "speech"))
        train_speech(settings(tmp_path / "speech"))  # finished: measures again
    assert "goes on from step 4" in caplog.text
    figures = json.loads((tmp_path / "speech" / "figures.json").read_text())
    assert figures["steps"] == 4 and {"phoneme_error_rate", "r2_aperture", "r2_width"} < set(figures)
    model = Wav2Vec2Model.from_pretrained(tmp_path / "speech")
    processor = Wav2Vec2FeatureExtractor.from_pretrained(tmp_path / "speech")
    waveform = np.random.default_rng(0).normal(size=51_840).astype(np.float32)
    features = encode_audio(model, processor, waveform)
    assert features.shape == (1, 161, 32) and features.isfinite().all()


def test_frozen_parts_follow_from_the_seed() -> None:
    before = torch.random.get_rng_state()
    one, same, other = frozen_parts(3), frozen_parts(3), frozen_parts(4)
    assert torch.equal(before, torch.random.get_rng_state())
    for name in ("text_encoder", "image_encoder"):
        weights = [list(parts[name].parameters()) for parts in (one, same, other)]
        assert all(torch.equal(left, right) and not left.requires_grad for left, right in zip(weights[0], weights[1]))
        assert any(not torch.equal(left, right) for left, right in zip(weights[0], weights[2]))


def test_frozen_features_tell_things_apart() -> None:
    parts = frozen_parts()
    prompts = [f"a woman with {hair} hair in a {wall} room" for hair, wall in (("red", "blue"), ("blue", "red"), ("red", "blue"))]
    text = encode_text(parts["text_encoder"], parts["tokenizer"], prompts)
    assert text.shape == (3, 512, TEXT_DIM) and torch.equal(text[0], text[2])
    assert (text[0].sum(0) - text[1].sum(0)).abs().max() > 1  # the same bytes in another order, seen in the average too
    images = torch.zeros(2, 3, 64, 64)
    images[0, 0, :, :32] = images[1, 0, :, 32:] = 1  # red on the left, red on the right
    image = encode_image(parts["image_encoder"], images)
    assert image.shape == (2, IMAGE_TOKENS, IMAGE_DIM)
    assert torch.corrcoef(image.flatten(1))[0, 1] < 0.95
    across_positions = image[0].var(0).mean()
    assert across_positions > 0.2

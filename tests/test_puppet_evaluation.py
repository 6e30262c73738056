"""The figures of evaluation: ideal for the truth, and each worse for what it is to catch."""

import json
import os

import cv2
import numpy as np
import pytest

from stableavatar.config import InferenceConfig
from stableavatar.evaluation.pairs import seam_frames
from stableavatar.evaluation.signals import correlation
from stableavatar.puppet import metrics
from stableavatar.puppet.evaluation import EvaluateConfig, Truth, background_mask, evaluate, measure, weights
from stableavatar.puppet.observer import observe
from stableavatar.puppet.world import draw_scene
from stableavatar.sampling.windows import WindowPlan

FRAMES = 100


@pytest.fixture(scope="module")
def scene():
    return draw_scene(900_002, frames=FRAMES, held_out=True, style="puppet", framing="bust")


@pytest.fixture(scope="module")
def frames(scene):
    return np.stack([frame.pixels for frame in scene.frames()])


@pytest.fixture(scope="module")
def truth(scene, frames):
    detail = metrics.fine_detail(frames, observe(frames))
    return Truth(scene.motion.aperture, scene.motion.width, frames[0], background_mask(scene), detail)


@pytest.fixture(scope="module")
def others():
    return [draw_scene(seed, frames=FRAMES, held_out=True).motion.aperture for seed in range(900_010, 900_018)]


def test_the_truth_is_ideal(frames, truth, others):
    values = measure(frames, truth, [], others)
    assert values["aperture_correlation"] > 0.99 and values["width_correlation"] > 0.95
    assert values["lag"] == values["broken_frames"] == 0
    assert abs(values["swapped_correlation"]) < 0.35
    assert values["background_de"] < 1e-3 and values["background_ssim"] > 0.999 and values["drift_background"] < 1e-3
    assert values["identity_ssim"] > 0.6 and values["skin_de"] < 1.5 and values["drift_colour"] < 1
    assert values["sharpness"] == pytest.approx(1, abs=0.1)
    assert values["seam_jitter"] is None


def test_a_video_that_stands_still_follows_nothing(frames, truth):
    values = measure(np.repeat(frames[:1], FRAMES, axis=0), truth, [], [])
    assert abs(values["aperture_correlation"]) < 0.05 and values["swapped_correlation"] is None
    assert values["blinks_per_minute"] == 0


@pytest.mark.parametrize("late", [-3, 0, 2, 5])
def test_the_lag_is_found_exactly(frames, truth, late):
    assert metrics.lag(observe(np.roll(frames, late, axis=0)).aperture, truth.aperture) == late


def test_tracks():
    rising = np.linspace(0, 1, 50)
    assert correlation(rising, 3 - 2 * rising) == pytest.approx(-1)
    assert correlation(rising, np.full(50, 0.3)) == 0
    with pytest.raises(ValueError, match="as many"):
        correlation(rising, rising[1:])
    blinks = np.zeros(250)
    blinks[[20, 21, 100, 101, 180]] = 1
    assert metrics.blink_rate(blinks) == pytest.approx(18)


def test_silence_counts_from_the_fourth_closed_frame_on():
    track = np.array([1, 0, 0, 0, 0, 0, 1, 0, 0, 0, 1.0])
    assert np.flatnonzero(metrics.silent_frames(track)).tolist() == [4, 5]
    seen = np.where(np.arange(11) == 5, 0.4, 0.0)
    assert metrics.silence(seen, track) == (pytest.approx(0.2), pytest.approx(0.5))
    assert np.isnan(metrics.silence(seen, np.ones(11))).all()


def test_colours_that_shift_are_seen(frames, truth):
    fade = np.linspace(0, 25, FRAMES)[:, None, None, None]
    values = measure((frames + fade * (1, 0, -1)).clip(0, 255).astype(np.uint8), truth, [], [])
    assert values["background_de"] > 2 and values["skin_de"] > 2 and values["drift_background"] > 4 and values["drift_colour"] > 4
    assert values["aperture_correlation"] > 0.98


def test_another_person_is_seen(frames, truth):
    other = draw_scene(900_003, frames=FRAMES, held_out=True, style="cartoon", framing="bust")
    values = measure(np.stack([frame.pixels for frame in other.frames()]), truth, [], [])
    ideal = measure(frames, truth, [], [])
    assert values["identity_ssim"] < ideal["identity_ssim"] - 0.2
    assert values["background_de"] > 3 and values["background_ssim"] < 0.95
    assert values["aperture_correlation"] < 0.6


def test_blur_costs_sharpness(frames, truth):
    values = measure(np.stack([cv2.GaussianBlur(frame, (0, 0), 1.0) for frame in frames]), truth, [], [])
    assert values["sharpness"] < 0.6 and values["aperture_correlation"] > 0.98


def test_broken_frames_are_counted(frames, truth):
    rng, worse = np.random.default_rng(0), frames.copy()
    worse[20:23] = rng.integers(0, 256, worse[20:23].shape)
    worse[40] = 128
    worse[60] = np.clip(worse[60].astype(int) + 60, 0, 255)
    seen = observe(truth.reference[None])
    head = metrics.head_cuts(truth.reference[None], seen)[0]

    def found(shown, background):
        alike = metrics.face_likeness(metrics.head_cuts(shown, observe(shown)), head)
        return metrics.broken_frames(shown, observe(shown), alike, truth.reference, background)

    eyes, reach = seen.eyes[0].astype(int), int(0.8 * np.linalg.norm(seen.mouth[0] - seen.eyes[0]))
    worse[80, eyes[1] - reach // 2 : eyes[1] + reach // 2, eyes[0] - reach : eyes[0] + reach] = worse[80, eyes[1] + reach // 2, eyes[0]]
    broken = found(worse, truth.background)
    assert {20, 21, 22, 40, 60, 80} <= set(np.flatnonzero(broken)) <= {20, 21, 22, 23, 40, 41, 60, 80, 81}
    assert not found(frames, truth.background).any()
    shifted = frames.copy()
    shifted[50:] = np.roll(shifted[50:], 14, axis=2)
    assert found(shifted, np.zeros_like(truth.background)).nonzero()[0].tolist() == [50]


def test_seams(frames):
    assert seam_frames(WindowPlan.sliding(31, 21, 5), 121) == [61, 81]
    assert seam_frames(WindowPlan.sliding(21, 21, 5), 81) == []
    jumping = frames.copy()
    jumping[61:81] = np.clip(jumping[61:81].astype(int) + 12, 0, 255)
    assert metrics.seam_jitter(jumping, [61, 81]) > 2 * metrics.seam_jitter(frames, [61, 81])
    assert np.isnan(metrics.seam_jitter(frames, []))


def test_the_background_leaves_the_person_out(scene, truth):
    drawn = scene.render(FRAMES // 2)
    assert 0.1 < truth.background.mean() < 0.7
    assert not truth.background[drawn.face > 0].any() and truth.background[:8, :8].all()


def test_weights_are_known_by_their_content(tmp_path):
    part, other = tmp_path / "model/vae/model.safetensors", tmp_path / "transformer.pt"
    part.parent.mkdir(parents=True)
    for path in (part, other):
        path.write_bytes(b"weights")
    plain = InferenceConfig(model=str(tmp_path / "model"))
    named = InferenceConfig(model=str(tmp_path / "model"), transformer=str(other))
    first = weights(plain), weights(named)
    os.utime(part, (0, 0))
    assert (weights(plain), weights(named)) == first and first[0] != first[1]
    other.write_bytes(b"weighty")
    assert weights(plain) == first[0] and weights(named) != first[1]
    part.write_bytes(b"heights")
    assert weights(plain) != first[0]


def test_an_evaluation_runs_and_goes_on(tiny_folder, tmp_path):
    output, words = tmp_path / "figures.json", "steps=1 guidance.name=none windows.frames=5 windows.overlap=1"
    options = {"output": str(output), "config": "configs/inference/puppet.yaml", "settings": words, "model": str(tiny_folder), "frames": 9}
    evaluate(EvaluateConfig(**options, cases=1))
    first = json.loads(output.read_text())
    evaluate(EvaluateConfig(**options, cases=2))
    second = json.loads(output.read_text())
    assert second["cases"][0] == first["cases"][0] and len(second["cases"]) == 2
    assert second["summary"]["model"]["broken_frames"]["count"] == 2 and second["summary"]["oracle"]["background_de"]["low"] >= 0
    with pytest.raises(ValueError, match="other settings"):
        evaluate(EvaluateConfig(**options, cases=2, seed=1))

"""The shipped puppet model: whole and small, talks with unseen faces, voices and sentences, and is what the demo shows."""

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from scripts.convert_checkpoint import main as convert
from stableavatar.config import InferenceConfig, load_config
from stableavatar.media import AudioTrack
from stableavatar.models.checkpoint_files import Checkpoint
from stableavatar.pipeline import StableAvatarPipeline
from stableavatar.puppet.evaluation import EvaluateConfig, draw_scenes, evaluate_cases, inference_config

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "examples/puppet"
SHIPPED = ROOT / "configs/inference/puppet.yaml"
PARTS = ("transformer", "vae", "text_encoder", "image_encoder", "audio_encoder")
LARGEST, ALL = 20_000_000, 40_000_000
"""Bytes of a file, and of the folder."""
BARS = {"aperture_correlation": 0.9, "swapped_correlation": 0.2, "background_de": 1.5, "identity_ssim": 0.65, "sharpness": 0.7}
FRESH_SEED = 4711
"""Of cases that no choice was made with."""


def test_the_folder_is_small_and_in_bfloat16():
    sizes = [file.stat().st_size for file in MODEL.rglob("*") if file.is_file()]
    assert max(sizes) < LARGEST and sum(sizes) <= ALL
    for part in PARTS:
        kinds = {tensor.dtype for _, tensor in Checkpoint(MODEL / part).read() if tensor.is_floating_point()}
        assert kinds <= {torch.bfloat16, torch.float32} and torch.bfloat16 in kinds, part


def test_the_card_says_what_was_measured():
    card = (MODEL / "README.md").read_text(encoding="utf-8")
    measured = json.loads((MODEL / "evaluation.json").read_text(encoding="utf-8"))["summary"]["model"]
    for name in ("aperture_correlation", "swapped_correlation", "background_de", "sharpness", "broken_frames"):
        figures = " | ".join(f"{measured[name][key]:.3f}" for key in ("mean", "low", "high"))
        assert f"{name}` | {figures} |" in card, f"{name}: {figures}"
    for heading in ("## Data", "## Recipe", "## Figures", "## Limits"):
        assert heading in card


def test_it_goes_through_the_released_names_and_back(tmp_path):
    names = ["--transformer", "Avatar/weights.pt", "--base", "Wan", "--wav2vec", "speech"]
    assert convert(["to-released", str(MODEL), str(tmp_path / "released"), *names]) == 0
    assert convert(["to-diffusers", str(tmp_path / "released"), str(tmp_path / "again"), *names]) == 0
    for part in PARTS:
        before, after = (dict(Checkpoint(folder / part).read()) for folder in (MODEL, tmp_path / "again"))
        assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before), part
    shipped, again = (StableAvatarPipeline.from_pretrained(folder, local_files_only=True) for folder in (MODEL, tmp_path / "again"))
    assert again.transformer.config.audio_positions and again.vae.config.latents_std == shipped.vae.config.latents_std
    assert again.transformer.config.adapter_heads == shipped.transformer.config.adapter_heads


@pytest.fixture(scope="module")
def cases() -> list[dict]:
    """Two unseen people with unseen voices, as the shipped settings make them."""
    config = EvaluateConfig(config=str(SHIPPED), model=str(MODEL), seed=FRESH_SEED, cases=2, frames=81)
    inference = inference_config(config)
    return evaluate_cases(StableAvatarPipeline.from_config(inference), inference, draw_scenes(config))


def mean(cases: list[dict], name: str) -> float:
    """Of a figure over the cases."""
    return float(np.mean([case["model"][name] for case in cases]))


def test_lips_follow_the_voice(cases):
    assert mean(cases, "aperture_correlation") > BARS["aperture_correlation"]
    assert mean(cases, "swapped_correlation") < BARS["swapped_correlation"]
    assert {case["model"]["lag"] for case in cases} <= {-1.0, 0.0, 1.0}


def test_the_person_and_the_place_stay(cases):
    assert mean(cases, "background_de") < BARS["background_de"]
    assert mean(cases, "identity_ssim") > BARS["identity_ssim"]
    assert mean(cases, "sharpness") > BARS["sharpness"]
    assert sum(case["model"]["broken_frames"] for case in cases) == 0


def test_the_demo_makes_a_video_of_the_example(tmp_path):
    output = tmp_path / "fresh" / "demo.mp4"
    command = ["bash", str(ROOT / "scripts/demo.sh"), f"output={output}"]
    made = subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path)
    assert str(output) in made.stdout
    with AudioTrack(output) as track, AudioTrack(ROOT / "examples/ada/audio.wav") as voice:
        assert abs(track.samples - voice.samples) <= 16_000 / 25
    record = json.loads(output.with_suffix(".json").read_text(encoding="utf-8"))["settings"]
    shipped = load_config(InferenceConfig, SHIPPED, [])
    assert [record[name] for name in ("model", "width", "height")] == [shipped.model, shipped.width, shipped.height]
    assert shipped.model == "examples/puppet"

"""The dress rehearsal on tiny models: what it writes loads as a release does, and the program runs on it."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch

from stableavatar.models.key_maps import AUDIO_TENSOR
from stableavatar.pipeline import StableAvatarPipeline

ROOT = Path(__file__).resolve().parents[1]
KEYS = ROOT.parent / "shared" / "reference" / "checkpoint_keys.json"
sys.path.insert(0, str(ROOT / "scripts"))

from dress_rehearsal import MARK, RELEASE_1_3B, Release, main, parts, write_inputs, write_release  # noqa: E402
from make_tiny_model import tiny_pipeline  # noqa: E402

SMALL = tiny_pipeline()
TINY = Release(
    transformer={key: SMALL.transformer.config[key] for key in ("dim", "num_heads", "num_layers", "ffn_dim", "freq_dim")}
    | {key: SMALL.transformer.config[key] for key in ("text_dim", "image_dim", "audio_dim")},
    vae={"base_dim": SMALL.vae.config.base_dim},
    text=SMALL.text_encoder.config,
    image=SMALL.image_encoder.config,
    speech=SMALL.audio_encoder.config,
)


@pytest.fixture
def checkpoints(tmp_path: Path) -> Path:
    """A tiny random release."""
    write_release(tmp_path / "checkpoints", TINY)
    return tmp_path / "checkpoints"


@pytest.mark.skipif(not KEYS.is_file(), reason="reference folder is absent")
def test_full_size_files_have_the_released_names_and_shapes() -> None:
    keys = json.loads(KEYS.read_text())
    expected = dict(keys)
    expected["base"] = {name: shape for name, shape in keys["stableavatar_transformer_1.3b"].items() if not AUDIO_TENSOR.match(name)}
    kinds = ("stableavatar_transformer_1.3b", "base", "wan_vae", "umt5_xxl_encoder", "clip_visual")
    for kind, part in zip(kinds, parts(Path("checkpoints"), RELEASE_1_3B), strict=True):
        written = {name: list(shape) for name, (_, shape) in part.specs().items() if name not in part.besides}
        assert written == {part.prefix + name: shape for name, shape in expected[kind].items()}


def test_a_written_release_loads_strictly_and_makes_a_video(checkpoints: Path, settings) -> None:
    pipe = StableAvatarPipeline.from_released(checkpoints, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    assert (pipe.transformer.config.num_heads, pipe.transformer.config.num_layers) == (4, 2)
    write_inputs(checkpoints, seconds=0.4)
    frames = pipe(str(checkpoints / "portrait.png"), str(checkpoints / "voice.wav"), "A person is talking", settings())
    assert frames.shape == (10, 32, 32, 3)
    assert frames.float().std(dim=(1, 2, 3)).min() > 1


def test_the_base_models_file_gets_fresh_audio_tensors(checkpoints: Path) -> None:
    file = "Wan2.1-Fun-V1.1-1.3B-InP/diffusion_pytorch_model.safetensors"
    pipe = StableAvatarPipeline.from_released(checkpoints, transformer=file, dtype=torch.float32)
    assert not pipe.transformer.blocks[0].cross_attn.k_audio.weight.any()
    again = StableAvatarPipeline.from_released(checkpoints, transformer=file, dtype=torch.float32).transformer
    adapter = dict(pipe.transformer.audio_adapter.named_parameters())
    assert all(torch.equal(adapter[name], p) for name, p in again.audio_adapter.named_parameters()), "a LoRA on it fits it again"


def test_only_what_is_not_whole_is_written_again(checkpoints: Path) -> None:
    files = {path: path.stat().st_mtime_ns for path in checkpoints.rglob("*") if path.suffix in (".pt", ".pth", ".safetensors")}
    contents = {path: path.read_bytes() for path in files}
    damaged = next(path for path in files if path.name == "Wan2.1_VAE.pth")
    os.truncate(damaged, damaged.stat().st_size // 2)
    write_release(checkpoints, TINY)
    assert [path for path, written in files.items() if path.stat().st_mtime_ns != written] == [damaged]
    assert damaged.read_bytes() == contents[damaged]


def test_the_whole_rehearsal_measures_the_program_and_clears_up(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    folder = tmp_path / "checkpoints"
    assert main([str(folder), "--width", "32", "--height", "32", "--seconds", "0.2"], TINY) == 0
    printed = capfd.readouterr().out
    assert "5 frames of 32x32" in printed
    rows = dict(line.strip("| ").split(" | ", 1) for line in printed.splitlines() if line.startswith("| "))
    for phase in ("write the checkpoints", "load", "encode", "denoise", "decode", "whole run"):
        seconds, resident, _ = map(float, rows[phase].split(" | "))
        assert seconds >= 0 and 0 < resident < 24
    assert not folder.exists()


def test_training_is_rehearsed_too(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    assert main([str(tmp_path / "checkpoints"), "--train", "--width", "32", "--height", "32", "--seconds", "0.4"], TINY) == 0
    printed = capfd.readouterr().out
    assert "9 frames of 32x32; loss" in printed and "| encode a clip |" in printed and "| train a step |" in printed


def test_a_folder_with_other_files_is_refused_and_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "real.pt").write_text("precious")
    assert main([str(tmp_path)], TINY) == 2
    assert "not this script's" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["real.pt"] and not (tmp_path / MARK).exists()


def test_a_run_that_fails_is_one_line(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    assert main([str(tmp_path / "new"), "--dtype", "float31"], TINY) == 2
    assert "the program ended with exit code 2" in capfd.readouterr().err.splitlines()[-1]

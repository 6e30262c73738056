"""A pipeline folder becomes released files and comes back with every tensor the same."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

from stableavatar.models import weights
from stableavatar.models.checkpoint_files import Checkpoint
from stableavatar.pipeline import StableAvatarPipeline

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

from convert_checkpoint import main  # noqa: E402

PARTS = ("transformer", "vae", "text_encoder", "image_encoder", "audio_encoder")
NAMES = ["--transformer", "Avatar/weights.pt", "--base", "Wan", "--wav2vec", "speech"]


@pytest.fixture(scope="module")
def released(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny pipeline as released files."""
    checkpoints = tmp_path_factory.mktemp("released") / "checkpoints"
    assert main(["to-released", str(tiny_folder), str(checkpoints), *NAMES]) == 0
    return checkpoints


def tensors(path: Path) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in Checkpoint(path).read()}


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)


def test_there_and_back_again(tiny_folder: Path, released: Path, tmp_path: Path) -> None:
    assert main(["to-diffusers", str(released), str(tmp_path / "folder"), *NAMES]) == 0
    for part in PARTS:
        assert_same(tensors(tmp_path / "folder" / part), tensors(tiny_folder / part))
    assert json.loads((tmp_path / "folder/model_index.json").read_text()) == json.loads((tiny_folder / "model_index.json").read_text())
    assert main(["to-released", str(tmp_path / "folder"), str(tmp_path / "again"), *NAMES]) == 0
    for file in released.rglob("*.pt*"):
        assert_same(tensors(tmp_path / "again" / file.relative_to(released)), tensors(file))
    assert (tmp_path / "again/Wan/config.json").read_text() == (released / "Wan/config.json").read_text()


def test_both_forms_are_pipelines_with_the_same_tensors(tiny_folder: Path, released: Path) -> None:
    names = {"transformer": "Avatar/weights.pt", "base": "Wan", "wav2vec": "speech"}
    ours = StableAvatarPipeline.from_released(released, **names, dtype=torch.float32)
    theirs = StableAvatarPipeline.from_pretrained(tiny_folder)
    for part in PARTS:
        assert_same(getattr(ours, part).state_dict(), getattr(theirs, part).state_dict())
    assert ours.transformer.config.num_heads == theirs.transformer.config.num_heads
    prompts = ["talks", "listens"]
    assert ours.tokenizer(prompts).input_ids == theirs.tokenizer(prompts).input_ids


def test_base_file_chosen_as_the_transformer_starts_fresh(released: Path) -> None:
    base = {name: tensor for name, tensor in tensors(released / "Avatar/weights.pt").items() if "vocal" not in name}
    torch.save(base, released / "Wan/base.pt")
    torch.save(base, released / "Avatar/base.pt")
    loaded = weights.load_released(released, "Wan/base.pt", "Wan", "speech", torch.float32)
    assert not loaded["transformer"].blocks[0].cross_attn.k_audio.weight.any()
    with pytest.raises(ValueError, match="no audio tensors"):
        weights.load_released(released, "Avatar/base.pt", "Wan", "speech", torch.float32)


def test_lost_settings_are_said(released: Path, tiny_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert main(["to-released", str(tiny_folder), str(tmp_path), "--only", "image_encoder"]) == 0
    assert "num_attention_heads=2" in caplog.text


def test_single_parts_need_nothing_else(tiny_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_folder / "vae", tmp_path / "folder/vae")
    assert main(["to-released", str(tmp_path / "folder"), str(tmp_path / "released"), *NAMES, "--only", "vae"]) == 0
    assert main(["to-diffusers", str(tmp_path / "released"), str(tmp_path / "back"), *NAMES, "--only", "vae"]) == 0
    assert_same(tensors(tmp_path / "back/vae"), tensors(tiny_folder / "vae"))
    assert not (tmp_path / "back/model_index.json").exists()


@pytest.mark.parametrize("direction", ["to-diffusers", "to-released"])
def test_missing_files_are_one_line(direction: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main([direction, str(tmp_path / "nothing"), str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and "does not exist" in line
    assert not (tmp_path / "out").exists()


def test_damaged_small_parts_are_one_line(released: Path, tmp_path: Path) -> None:
    shutil.copytree(released, tmp_path / "copy")
    file = tmp_path / "copy/speech/model.safetensors"
    whole = file.read_bytes()
    for content in (whole[:-50], b"junk"):
        file.write_bytes(content)
        with pytest.raises(ValueError, match="speech") as error:
            weights.load_small_parts(tmp_path / "copy/Wan/google/umt5-xxl", tmp_path / "copy/speech")
        assert "\n" not in str(error.value)
    file.write_bytes(whole)
    with pytest.raises(ValueError, match="does not exist"):
        weights.load_small_parts(tmp_path / "copy/Wan/google/umt5", tmp_path / "copy/speech")

"""Pipeline folders load whole, or not at all with one line that says why."""

import shutil
from pathlib import Path

import pytest
import torch

from stableavatar.folders import load_folder
from stableavatar.pipeline import StableAvatarPipeline

DTYPES = {"default": torch.float32}


def cut_in_half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_a_whole_folder_loads(tiny_folder):
    pipe = load_folder(StableAvatarPipeline, tiny_folder, DTYPES)
    assert not any(tensor.is_meta for tensor in pipe.transformer.state_dict().values())


def test_what_is_saved_again_names_no_folder_of_this_machine(tiny_folder, tmp_path):
    load_folder(StableAvatarPipeline, tiny_folder, DTYPES).save_pretrained(tmp_path)
    assert not [file for file in tmp_path.rglob("*.json") if str(tiny_folder) in file.read_text(encoding="utf-8")]


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        ("transformer/diffusion_pytorch_model.safetensors", cut_in_half, "transformer/diffusion_pytorch_model.safetensors"),
        ("text_encoder/model.safetensors", cut_in_half, "cannot load the pipeline"),
        ("vae/diffusion_pytorch_model.safetensors", Path.unlink, "diffusion_pytorch_model.safetensors"),
        ("vae", shutil.rmtree, "lacks vae"),
        ("", shutil.rmtree, "has no model_index.json"),
        ("model_index.json", cut_in_half, "is not JSON"),
        ("model_index.json", lambda path: path.write_text('{"_class_name": "WanPipeline"}'), "holds a WanPipeline"),
        ("model_index.json", lambda path: path.write_text("[]"), "holds a None"),
        ("transformer/config.json", lambda path: path.write_text(path.read_text().replace('"dim": 64', '"dim": 128')), "shape"),
        ("transformer/config.json", lambda path: path.write_text(path.read_text().replace('"dim": 64', '"dim": "x"')), "config.json"),
        ("transformer/config.json", lambda path: path.write_text(path.read_text().replace('"dim": 64', '"dim": -64')), "config.json"),
        ("text_encoder/config.json", lambda path: path.write_text('{"model_type": "umt5", "d_model": []}'), "config.json"),
        ("audio_encoder/config.json", lambda path: path.write_text('{"model_type": "wav2vec2", "hidden_act": "x"}'), "config.json"),
        (
            "transformer/diffusion_pytorch_model.safetensors",
            lambda path: shutil.copy(path.parents[1] / "vae" / path.name, path),
            "transformer is of another model than its config.json: it lacks audio_adapter",
        ),
    ],
)
def test_a_damaged_or_foreign_folder_is_one_line(tiny_folder, tmp_path, file, damage, message):
    folder = tmp_path / "damaged"
    shutil.copytree(tiny_folder, folder)
    damage(folder / file)
    with pytest.raises(ValueError, match=r"^[^\n]+$") as caught:
        load_folder(StableAvatarPipeline, folder, DTYPES)
    assert message in str(caught.value)

"""Training finds its models, whole or in parts, and tells what is missing before it loads anything large."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from make_tiny_model import tiny_transformer
from safetensors.torch import save_file

from stableavatar.config import load_config
from stableavatar.machine import fast_precision
from stableavatar.models.checkpoint_files import Checkpoint
from stableavatar.models.strict_loading import export_state_dict
from stableavatar.pipeline import StableAvatarPipeline
from stableavatar.puppet import recipe
from stableavatar.training.config import TrainConfig
from stableavatar.training.parts import (
    FROZEN,
    check_model,
    encoding_identity,
    load_frozen_parts,
    load_training_transformer,
    text_length,
)
from stableavatar.training.processes import training_dtype

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

from convert_checkpoint import main as convert  # noqa: E402

MODELS = ("vae", "text_encoder", "image_encoder", "audio_encoder")


def settings(**values: object) -> TrainConfig:
    return load_config(TrainConfig, None, [f"{key}={value}" for key, value in values.items()])


@pytest.fixture(scope="module")
def released(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny pipeline as released files; the base model has its own weights, without audio."""
    folder = tmp_path_factory.mktemp("released") / "checkpoints"
    names = ["--transformer", "Avatar/weights.pt", "--base", "Wan", "--wav2vec", "speech"]
    assert convert(["to-released", str(tiny_folder), str(folder), *names]) == 0
    tensors = {name: tensor.clone() for name, tensor in Checkpoint(folder / "Avatar/weights.pt").read() if "vocal" not in name}
    save_file(tensors, folder / "Wan/diffusion_pytorch_model.safetensors")
    return folder


@pytest.fixture
def from_released(released: Path) -> Callable[..., TrainConfig]:
    return lambda **values: settings(**{"checkpoints": released, "base": "Wan", "wav2vec": "speech", "dtype": "float32"} | values)


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    tiny_transformer(num_layers=1, text_length=99).save_config(tmp_path / "scratch")
    return tmp_path / "scratch/config.json"


def load_parts(config: TrainConfig) -> StableAvatarPipeline:
    """Both halves, compared by the pipeline."""
    check_model(config)
    return StableAvatarPipeline(load_training_transformer(config), **load_frozen_parts(config))


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name].to(a[name])) for name in a)


def test_all_sources_give_the_pipelines_models(tiny_folder, from_released, pipe) -> None:
    for config in (settings(model=tiny_folder, dtype="float32"), from_released(transformer="Avatar/weights.pt")):
        loaded = load_parts(config)
        assert {*loaded.components} == {"transformer", *FROZEN}
        assert all(same(loaded.components[name], pipe.components[name]) for name in ("transformer", *MODELS))
        assert not any(parameter.requires_grad for name in MODELS for parameter in loaded.components[name].parameters())
        assert {parameter.dtype for parameter in loaded.transformer.parameters()} == {torch.float32}


def test_either_half_loads_alone(tiny_folder, released, from_released, tmp_path) -> None:
    for half, absent in (("transformer", FROZEN), ("frozen", ("transformer",))):
        folder, files = tmp_path / half, tmp_path / f"{half}_files"
        shutil.copytree(tiny_folder, folder)
        shutil.copytree(released, files)
        for name in absent:
            shutil.rmtree(folder / name)
        for name in ("speech", "Wan/google", "Wan/Wan2.1_VAE.pth") if half == "transformer" else ("Avatar",):
            shutil.rmtree(files / name) if (files / name).is_dir() else (files / name).unlink()
        for config in (settings(model=folder), from_released(checkpoints=files, transformer="Avatar/weights.pt")):
            (load_training_transformer if half == "transformer" else load_frozen_parts)(config)
            with pytest.raises(ValueError, match=r"^[^\n]*lacks? [^\n]+$"):
                load_parts(config)


def test_frozen_parts_have_the_pipelines_precisions(tiny_folder, from_released) -> None:
    for config in (settings(model=tiny_folder), from_released(dtype="bfloat16")):
        frozen = load_frozen_parts(config)
        assert [frozen[name].dtype for name in MODELS] == [torch.float32, torch.bfloat16, torch.bfloat16, torch.float32]


def test_the_base_models_own_weights_are_meant_without_a_name(from_released, pipe) -> None:
    first, again = (load_training_transformer(from_released(seed=seed)) for seed in (1, 2))
    assert same(first, again)
    assert torch.equal(first.patch_embedding.weight, pipe.transformer.patch_embedding.weight)
    assert first.config.audio_dim == 32 and not first.blocks[0].cross_attn.k_audio.weight.any()


def test_scratch_starts_from_the_seed(scratch, tiny_folder) -> None:
    state = torch.get_rng_state()
    first, again, other = (load_training_transformer(settings(scratch=scratch, seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert same(first, again) and not same(first, other)
    assert len(first.blocks) == 1 and text_length(settings(scratch=scratch)) == 99
    load_parts(settings(scratch=scratch, model=tiny_folder))
    scratch.write_text(scratch.read_text().replace('"audio_dim": 32', '"audio_dim": 48'))
    with pytest.raises(ValueError, match="the speech encoder gives 32 channels, the transformer expects 48"):
        load_parts(settings(scratch=scratch, model=tiny_folder))


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "no readable config.json"), ("[]", "no settings by name"), ('{"dims": 64}', "has not: dims"), ('{"dim": "x"}', "no transformer"),
     ('{"dim": 64, "num_heads": 5}', "no transformer that can be built")],
)  # fmt: skip
def test_a_wrong_scratch_file_is_one_line(scratch, content, message) -> None:
    scratch.write_text(content)
    with pytest.raises(ValueError, match=r"^[^\n]+$") as caught:
        load_training_transformer(settings(scratch=scratch))
    assert message in str(caught.value)


def test_other_weights_replace_a_folders_own(tiny_folder, from_released, released, tmp_path) -> None:
    torch.manual_seed(5)
    other = tiny_transformer(text_length=77)
    other.save_pretrained(tmp_path / "saved")
    torch.save(export_state_dict(other), tmp_path / "other.pt")
    torch.save(export_state_dict(other), released / "Avatar/other.pt")
    shutil.copytree(tmp_path / "saved", released / "Avatar/saved")
    for make, weights in ((settings, tmp_path / "other.pt"), (from_released, "Avatar/other.pt")):
        config = make(**{"transformer": weights} | ({"model": tiny_folder} if make is settings else {}))
        assert same(load_training_transformer(config), other) and text_length(config) == 512
    for make, weights in ((settings, tmp_path / "saved"), (from_released, "Avatar/saved")):
        config = make(**{"transformer": weights} | ({"model": tiny_folder} if make is settings else {}))
        assert same(load_training_transformer(config), other) and text_length(config) == 77


def test_what_is_missing_is_one_line(tiny_folder, scratch, from_released, tmp_path) -> None:
    wrong = {
        "no model is named": settings(),
        "scratch starts from random weights": settings(scratch=scratch, transformer="x.pt"),
        "scratch absent.json does not exist": settings(scratch="absent.json", model=tiny_folder),
        "transformer absent.pt does not exist": settings(transformer="absent.pt", model=tiny_folder),
        "no pipeline folder": settings(model=tmp_path),
        "absent.pt; the README": from_released(transformer="absent.pt"),
        "absent/Wan2.1_VAE.pth": from_released(base="absent"),
    }
    for message, config in wrong.items():
        with pytest.raises(ValueError, match=r"^[^\n]+$") as caught:
            check_model(config)
        assert message in str(caught.value)
    check_model(settings(scratch=scratch), frozen=False)


def test_encoded_samples_are_known_by_settings_and_weights(tiny_folder, from_released, scratch, tmp_path) -> None:
    identity = encoding_identity(settings(model=tiny_folder))
    assert {*MODELS} <= identity.keys() and json.loads(json.dumps(identity)) == identity
    moved = tmp_path / "moved"
    shutil.copytree(tiny_folder, moved)
    assert encoding_identity(settings(model=moved)) == identity
    weights = moved / "vae/diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    changed = encoding_identity(settings(model=moved))
    assert [key for key in identity if changed[key] != identity[key]] == ["vae"]
    shutil.rmtree(moved / "vae")
    assert encoding_identity(settings(model=moved)).keys() == identity.keys() - {"vae"}
    for key, value in {"data.seed": 1, "data.fps": 24, "data.source_fps": 30, "dtype": "float32"}.items():
        other = encoding_identity(settings(**{"model": tiny_folder, key: value}))
        assert [name for name in identity if other[name] != identity[name]] == [key]
    assert not {*MODELS} & encoding_identity(settings(scratch=scratch)).keys()
    assert {*MODELS} <= encoding_identity(from_released()).keys()


@pytest.mark.parametrize("known", [True, False])
def test_auto_is_bfloat16_where_the_processor_has_it(known, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: known)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    wanted = torch.bfloat16 if known else torch.float32
    assert training_dtype(TrainConfig(dtype="auto", device="cpu")) == wanted
    assert fast_precision(torch.device("cuda")) == torch.bfloat16
    assert training_dtype(TrainConfig(dtype="float32", device="cpu")) == torch.float32
    assert recipe.in_bfloat16("auto") == known and recipe.in_bfloat16("bfloat16") and not recipe.in_bfloat16("float32")

"""The models that training starts from: the transformer, the frozen parts around it, or either alone."""

import hashlib
import inspect
import json
from pathlib import Path
from typing import Any

import torch

from stableavatar.folders import check_named, load_folder, load_model
from stableavatar.models.dit import AvatarTransformer
from stableavatar.models.strict_loading import place
from stableavatar.models.weights import BASE_CONFIG_FILE, ReleasedFiles, load_transformer, read_base_config
from stableavatar.pipeline import StableAvatarPipeline
from stableavatar.training.config import TrainConfig
from stableavatar.training.processes import training_dtype

FROZEN = ("vae", "text_encoder", "tokenizer", "image_encoder", "audio_encoder", "audio_processor")
"""The pipeline's components that never train."""
CONFIG_FILE = "config.json"
SAMPLED_BYTES = 2**20
"""Bytes at either end of a file that tell it from others of its size; the end of a torch file has checksums of all its tensors."""


def check_model(config: TrainConfig, transformer: bool = True, frozen: bool = True) -> None:
    """Raise ValueError if what is needed for the transformer, or for the frozen parts, is not named or not there."""
    if config.scratch and config.transformer:
        raise ValueError("scratch starts from random weights and transformer from trained ones; give only one of them")
    own = transformer and not (config.scratch or _is_saved_model(_transformer_path(config)))
    if own or frozen:
        without = [*(() if frozen else FROZEN), *(() if own else ("transformer",))]
        check_named(StableAvatarPipeline, config.model, config.checkpoints, without)
        if not config.model:
            _released(config).check(own, frozen)
    for key, path in (("scratch", Path(config.scratch)), ("transformer", _transformer_path(config))):
        if transformer and getattr(config, key) and not path.exists():
            raise ValueError(f"{key} {path} does not exist")


def load_training_transformer(config: TrainConfig, dtype: torch.dtype | None = None) -> AvatarTransformer:
    """The transformer to train, on the host; one from scratch follows from config.seed alone.

    Args:
        dtype: of its weights; None keeps those of released files as they are (every process of a machine reads them, and bfloat16 takes
            half of the memory) and makes others float32.

    Raises:
        ValueError: what `check_model` raises, files that are damaged or of another model.
    """
    check_model(config, frozen=False)
    path = _transformer_path(config)
    if config.scratch:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(config.seed)
            return from_scratch(Path(config.scratch), dtype or torch.float32)
    if _is_saved_model(path):
        return load_model(AvatarTransformer, path, dtype or torch.float32)
    if not config.model:
        return _released(config).load_transformer(dtype)
    if config.transformer:
        return load_transformer(path, dtype, config=_read_settings(Path(config.model) / "transformer" / CONFIG_FILE))
    return load_folder(StableAvatarPipeline, Path(config.model), {"default": dtype or torch.float32}, without=FROZEN).transformer


def load_frozen_parts(config: TrainConfig) -> dict[str, Any]:
    """The components of FROZEN by name, on the host: text and image encoder in the precision of training, VAE and wav2vec2 in float32.

    Raises:
        ValueError: what `check_model` raises, files that are damaged or of another model.
    """
    check_model(config, transformer=False)
    dtype = training_dtype(config)
    if not config.model:
        parts = _released(config).load_encoders(dtype)
    else:
        dtypes = {"default": dtype, "vae": torch.float32, "audio_encoder": torch.float32}
        parts = load_folder(StableAvatarPipeline, Path(config.model), dtypes, without=("transformer",)).components
    return {name: parts[name].eval().requires_grad_(False) if isinstance(parts[name], torch.nn.Module) else parts[name] for name in FROZEN}


def text_length(config: TrainConfig) -> int:
    """Tokens that the transformer to train takes of a prompt, without loading it."""
    return transformer_settings(config)["text_length"]


def transformer_settings(config: TrainConfig) -> dict[str, Any]:
    """AvatarTransformer's settings of the transformer to train, without loading it."""
    if config.scratch:
        settings = _read_settings(Path(config.scratch))
    elif _is_saved_model(path := _transformer_path(config)):
        settings = _read_settings(path / CONFIG_FILE)
    elif config.model:
        settings = _read_settings(Path(config.model) / "transformer" / CONFIG_FILE)
    else:
        settings = read_base_config(_released(config).base / BASE_CONFIG_FILE)
    return {name: known.default for name, known in inspect.signature(AvatarTransformer).parameters.items()} | settings


def encoding_identity(config: TrainConfig) -> dict[str, Any]:
    """What encoded samples depend on beside clip, run and bucket; weights are left out where their files are not at hand."""
    identity = {
        "data.seed": config.data.seed,
        "data.fps": config.data.fps,
        "data.source_fps": config.data.source_fps,
        "dtype": str(training_dtype(config)).removeprefix("torch."),
        "text_length": text_length(config),
    }
    if config.model:
        homes = {name: Path(config.model) / name for name in FROZEN}
    else:
        homes = _released(config).encoder_files if config.checkpoints else {}
    weights = {name: _fingerprints(path) for name, path in homes.items() if path.exists()}
    return identity | {name: found for name, found in weights.items() if found}


def _fingerprints(path: Path) -> list[str]:
    """Name, size and checksum of a weight file, or of all those in a folder."""
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    return [f"{file.name} {file.stat().st_size} {_checksum(file)}" for file in files]


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256(file.read(SAMPLED_BYTES))
        file.seek(max(0, path.stat().st_size - SAMPLED_BYTES))
        digest.update(file.read())
    return digest.hexdigest()[:16]


def _released(config: TrainConfig) -> ReleasedFiles:
    """The released files; without `transformer` the base model's own weights."""
    checkpoints = Path(config.checkpoints)
    return ReleasedFiles(_transformer_path(config) or checkpoints / config.base, checkpoints / config.base, checkpoints / config.wav2vec)


def _transformer_path(config: TrainConfig) -> Path | None:
    """What `transformer` means: a path in checkpoints or, with `model`, one of its own."""
    if not config.transformer:
        return None
    return Path(config.transformer) if config.model else Path(config.checkpoints) / config.transformer


def _is_saved_model(path: Path | None) -> bool:
    """Whether a path is a folder that save_pretrained wrote, as a run's checkpoints hold it."""
    file = path / CONFIG_FILE if path else Path()
    return file.is_file() and _read_json(file).get("_class_name") == AvatarTransformer.__name__


def _read_settings(path: Path) -> dict[str, Any]:
    """AvatarTransformer's settings in a config.json, without what the library notes for itself."""
    return {key: value for key, value in _read_json(path).items() if not key.startswith("_")}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is no readable config.json of a transformer ({error})") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} is no config.json of a transformer: it holds no settings by name")
    return found


def from_scratch(path: Path, dtype: torch.dtype) -> AvatarTransformer:
    """A transformer of random weights with the settings of a config.json. Raises ValueError if none can be built from them."""
    settings = _read_settings(path)
    known = inspect.signature(AvatarTransformer).parameters
    if unknown := sorted(settings.keys() - known.keys()):
        raise ValueError(f"{path} has settings that a transformer has not: {', '.join(unknown)}; known are {', '.join(known)}")
    try:
        model = AvatarTransformer(**settings)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path} describes no transformer that can be built: {' '.join(str(error).split())}") from error
    for name, parameter in list(model.named_parameters()):
        place(model, name, parameter.detach(), dtype, "cpu")
    return model.eval()

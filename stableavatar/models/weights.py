"""Released checkpoints into our models: strict, by name, tensor after tensor (see `strict_loading`).

Every loader takes a file as published, its `dtype` (None keeps the file's; what a class marks so stays in float32) and `device`,
and raises ValueError for an unreadable file and for tensors that are missing, left over or of another shape.
"""

import json
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    UMT5Config,
    UMT5EncoderModel,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Model,
)
from transformers.utils import logging as library_logging

from stableavatar.models.audio_adapter import AudioAdapter
from stableavatar.models.checkpoint_files import TORCH_ERRORS, Checkpoint
from stableavatar.models.dit import AvatarTransformer
from stableavatar.models.key_maps import (
    AUDIO_TENSOR,
    CLIP_PREFIX,
    Config,
    image_config,
    released_sources,
    text_config,
    transformer_config,
    vae_config,
)
from stableavatar.models.strict_loading import empty_model, fill, place
from stableavatar.vae import WanVAE

logger = logging.getLogger(__name__)

Loaded = TypeVar("Loaded")

VAE_FILE = "Wan2.1_VAE.pth"
TEXT_ENCODER_FILE = "models_t5_umt5-xxl-enc-bf16.pth"
IMAGE_ENCODER_FILE = "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
TOKENIZER_FOLDER = "google/umt5-xxl"
BASE_CONFIG_FILE = "config.json"
"""Inside the folder of a Wan base model, as published."""

BASE_CONFIG_KEYS = {
    "dim": "dim",
    "ffn_dim": "ffn_dim",
    "freq_dim": "freq_dim",
    "in_dim": "in_channels",
    "out_dim": "out_channels",
    "num_heads": "num_heads",
    "num_layers": "num_layers",
    "text_len": "text_length",
    "eps": "eps",
    "adapter_heads": "adapter_heads",
    "audio_positions": "audio_positions",
}
"""A Wan transformer's config.json -> AvatarTransformer's settings; a published one lacks the last two, which are ours.

eps is a positive number, audio_positions true or false, the others positive whole numbers.
"""
_KINDS = {"eps": ((int, float), "a positive number"), "audio_positions": ((bool,), "true or false")}

FRESH_AUDIO_SEED = 0
UNUSED_AUDIO_TENSORS = {"masked_spec_embed"}
"""Of wav2vec2, for training only; not every published file has it."""


def load_released(checkpoints: Path, transformer: str, base: str, wav2vec: str, dtype: torch.dtype) -> dict[str, Any]:
    """All components of the pipeline from the released files as they are laid out on disk.

    Args:
        checkpoints: folder that the other paths are relative to.
        transformer: StableAvatar's weights, or the base model's own, which lie in `base` and get fresh audio tensors.
        base: folder of the Wan base model; wav2vec: folder of the speech encoder.
        dtype: of transformer, text and image encoder; the VAE and wav2vec2 are in float32.
    """
    files = ReleasedFiles(checkpoints / transformer, checkpoints / base, checkpoints / wav2vec)
    files.check()
    return {"transformer": files.load_transformer(dtype), **files.load_encoders(dtype)}


@dataclass(frozen=True)
class ReleasedFiles:
    """Where the released files lie: the transformer's weights, the folder of the Wan base model, that of the speech encoder."""

    transformer: Path
    base: Path
    wav2vec: Path

    @property
    def fresh_audio(self) -> bool:
        """Whether the weights are the base model's own, which have no audio tensors."""
        return self.transformer.resolve().is_relative_to(self.base.resolve())

    @property
    def encoder_files(self) -> dict[str, Path]:
        """Component -> the file or folder with its weights, for the components that never train."""
        names = {"vae": VAE_FILE, "text_encoder": TEXT_ENCODER_FILE, "image_encoder": IMAGE_ENCODER_FILE, "tokenizer": TOKENIZER_FOLDER}
        return {component: self.base / name for component, name in names.items()} | {"audio_encoder": self.wav2vec}

    def check(self, transformer: bool = True, encoders: bool = True) -> None:
        """Raise ValueError if a file is not there that loading the transformer, or the encoders, needs."""
        needed = [self.transformer, self.base / BASE_CONFIG_FILE, *([self.wav2vec] if self.fresh_audio else [])] if transformer else []
        needed += self.encoder_files.values() if encoders else []
        missing = [str(path) for path in dict.fromkeys(needed) if not path.exists()]
        if missing:
            raise ValueError(f"checkpoints lack {', '.join(missing)}; the README's section 'Weights' shows the layout")

    def load_transformer(self, dtype: torch.dtype) -> AvatarTransformer:
        """The transformer; the base model's own weights get fresh audio tensors."""
        width = None
        if self.fresh_audio:  # a base file cannot tell how wide the speech encoder is
            speech = _from_folder(self.wav2vec, lambda folder: Wav2Vec2Config.from_pretrained(folder, local_files_only=True))
            width = {"audio_dim": speech.hidden_size}
        return load_transformer(
            self.transformer, dtype, base_config=self.base / BASE_CONFIG_FILE, config=width, fresh_audio=self.fresh_audio
        )

    def load_encoders(self, dtype: torch.dtype) -> dict[str, Any]:
        """All other components; the VAE and wav2vec2 in float32."""
        files = self.encoder_files
        return {
            "vae": load_vae(files["vae"], torch.float32),
            "text_encoder": load_text_encoder(files["text_encoder"], dtype),
            "image_encoder": load_image_encoder(files["image_encoder"], dtype),
            **load_small_parts(files["tokenizer"], files["audio_encoder"]),
        }


def load_small_parts(tokenizer: Path, wav2vec: Path) -> dict[str, Any]:
    """Tokenizer, speech encoder (float32) and its feature extractor, from folders in the libraries' own format."""
    encoder, report = _from_folder(
        wav2vec, lambda folder: Wav2Vec2Model.from_pretrained(folder, local_files_only=True, output_loading_info=True)
    )
    lacking = sorted(set(report["missing_keys"]) - UNUSED_AUDIO_TENSORS) + [str(key) for key in report["mismatched_keys"]]
    if lacking:
        raise ValueError(f"speech encoder {wav2vec} lacks {len(lacking)} tensors or has them in another shape, first {lacking[0]}")
    return {
        "tokenizer": _from_folder(tokenizer, lambda folder: AutoTokenizer.from_pretrained(folder, local_files_only=True)),
        "audio_encoder": encoder.float().eval(),
        "audio_processor": _from_folder(wav2vec, lambda folder: Wav2Vec2FeatureExtractor.from_pretrained(folder, local_files_only=True)),
    }


def _from_folder(folder: Path, load: Callable[[Path], Loaded]) -> Loaded:
    """What a library reads from a folder; its own complaint as one line."""
    if not folder.is_dir():
        raise ValueError(f"folder {folder} does not exist")
    try:
        with _quiet_library():
            return load(folder)
    except (OSError, SafetensorError, StrictDataclassError, *TORCH_ERRORS) as error:
        raise ValueError(f"{folder} is incomplete or damaged: {' '.join(str(error).split())[:200]}") from error


@contextmanager
def _quiet_library() -> Iterator[None]:
    """Keeps transformers' table of missing and spare tensors off the screen: what matters of it is checked and said here."""
    before = library_logging.get_verbosity()
    library_logging.set_verbosity_error()
    try:
        yield
    finally:
        library_logging.set_verbosity(before)


def load_transformer(
    path: str | Path,
    dtype: torch.dtype | None = torch.bfloat16,
    device: str | torch.device = "cpu",
    base_config: str | Path | None = None,
    config: Config | None = None,
    fresh_audio: bool = False,
) -> AvatarTransformer:
    """The transformer of a StableAvatar file or, with `fresh_audio`, of a plain Wan image-to-video one.

    Args:
        path: see `Checkpoint`.
        base_config: config.json of the base model, for what shapes do not tell (heads, text length, eps).
        config: settings of AvatarTransformer that go over all others.
        fresh_audio: initialise all audio tensors if the file has none of them, as a new model has them.
    """
    file = Checkpoint(path)
    model = empty_transformer(file, base_config, config)
    if any(AUDIO_TENSOR.match(name) for name in file.shapes):
        return fill(model, file, dtype, device).eval()
    if not fresh_audio:
        raise ValueError(f"{path} holds no audio tensors, like a base Wan model: choose a StableAvatar file, or fresh_audio to train")
    absent = {source.name: ours for ours, source in released_sources(model).items() if AUDIO_TENSOR.match(source.name)}
    fill(model, file, dtype, device, absent)
    logger.info("%s: %d audio tensors are not in the file and start fresh", file.path, len(absent))
    _start_audio(model, list(absent.values()), dtype, device)
    return model.eval()


def load_vae(path: str | Path, dtype: torch.dtype | None = torch.float32, device: str | torch.device = "cpu") -> WanVAE:
    """The VAE of `Wan2.1_VAE.pth`."""
    file = Checkpoint(path)
    return fill(empty_vae(file), file, dtype, device).eval()


def load_text_encoder(path: str | Path, dtype: torch.dtype | None = torch.bfloat16, device: str | torch.device = "cpu") -> UMT5EncoderModel:
    """The text encoder of `models_t5_umt5-xxl-enc-bf16.pth`."""
    file = Checkpoint(path)
    return fill(empty_text_encoder(file), file, dtype, device).eval()


def load_image_encoder(
    path: str | Path,
    dtype: torch.dtype | None = torch.bfloat16,
    device: str | torch.device = "cpu",
    config: Config | None = None,
) -> CLIPVisionModelWithProjection:
    """The image tower of `models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth`; its text tower is passed over.

    Args:
        config: settings of CLIPVisionConfig that go over those from shapes (heads, activation, eps).
    """
    file = Checkpoint(path, CLIP_PREFIX)
    return fill(empty_image_encoder(file, config), file, dtype, device).eval()


def empty_transformer(file: Checkpoint, base_config: str | Path | None = None, config: Config | None = None) -> AvatarTransformer:
    """The transformer that a file is of, without memory for its parameters."""
    settings = transformer_config(file) | (read_base_config(base_config) if base_config else {}) | (config or {})
    return empty_model(lambda: AvatarTransformer(**settings))


def empty_vae(file: Checkpoint) -> WanVAE:
    """The VAE that a file is of, without memory for its parameters."""
    settings = vae_config(file)
    return empty_model(lambda: WanVAE(**settings))


def empty_text_encoder(file: Checkpoint) -> UMT5EncoderModel:
    """The text encoder that a file is of, without memory for its parameters."""
    settings = UMT5Config(**text_config(file))
    return empty_model(lambda: UMT5EncoderModel(settings))


def empty_image_encoder(file: Checkpoint, config: Config | None = None) -> CLIPVisionModelWithProjection:
    """The image encoder that a file is of, without memory for its parameters."""
    settings = CLIPVisionConfig(**image_config(file) | (config or {}))
    return empty_model(lambda: CLIPVisionModelWithProjection(settings))


def read_base_config(path: str | Path) -> Config:
    """AvatarTransformer's settings from a Wan model's config.json; other keys are ignored with a note."""
    try:
        found = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"base model config {path} is missing or not JSON ({error})") from error
    if not isinstance(found, dict):
        raise ValueError(f"base model config {path} holds no settings by name")
    for key in BASE_CONFIG_KEYS.keys() & found.keys():
        kinds, expected = _KINDS.get(key, ((int,), "a positive whole number"))
        if type(found[key]) not in kinds or bool not in kinds and not 0 < found[key] < math.inf:
            raise ValueError(f"base model config {path}: {key} must be {expected}, got {json.dumps(found[key])[:80]}")
    ignored = sorted(found.keys() - BASE_CONFIG_KEYS.keys() - {"model_type"})
    if ignored:
        logger.info("%s: keys without a use here: %s", path, ", ".join(ignored))
    return {ours: found[theirs] for theirs, ours in BASE_CONFIG_KEYS.items() if theirs in found}


def base_config(model: AvatarTransformer) -> Config:
    """What a base model's config.json says of a transformer: the inverse of `read_base_config`."""
    return {"model_type": "i2v"} | {theirs: model.config[ours] for theirs, ours in BASE_CONFIG_KEYS.items()}


def _start_audio(model: AvatarTransformer, names: list[str], dtype: torch.dtype | None, device: str | torch.device) -> None:
    """Audio tensors as a new model has them: the adapter's own initialisation, then zero keys and values in the blocks.

    The same ones every time, so that a LoRA trained on a base model fits that base model again.
    """
    c = model.config
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(FRESH_AUDIO_SEED)
        adapter = AudioAdapter(c.audio_dim, tuple(c.audio_hidden_dims), c.dim, c.adapter_heads, c.adapter_layers, c.eps, c.adapter)
    start = {f"audio_adapter.{name}": parameter.detach() for name, parameter in adapter.named_parameters()}
    for name in names:
        place(model, name, start[name] if name in start else torch.empty(model.get_parameter(name).shape), dtype, device)
    model.init_audio_branches()

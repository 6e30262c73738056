"""The components of the puppet world's model as one pipeline folder."""

import logging
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import Wav2Vec2FeatureExtractor, Wav2Vec2Model

from stableavatar.config import Config, setting
from stableavatar.folders import INDEX_FILE, library_errors, load_model
from stableavatar.models.dit import AvatarTransformer
from stableavatar.pipeline import StableAvatarPipeline
from stableavatar.puppet.parts import frozen_parts
from stableavatar.puppet.vae import PuppetVAE
from stableavatar.training.parts import from_scratch

logger = logging.getLogger(__name__)


@dataclass
class AssembleConfig(Config):
    """The settings of `puppet.py assemble`."""

    vae: str = setting("runs/puppet/vae", "folder of the trained VAE, or of a pipeline that has it")
    speech: str = setting("runs/puppet/speech", "folder of the trained speech encoder, or of a pipeline that has it")
    transformer: str = setting("", "folder of a trained transformer, as in a run's checkpoints; empty for random weights")
    settings: str = setting("configs/train/puppet_transformer.json", "settings of a transformer of random weights")
    output: str = setting("runs/puppet/model", "pipeline folder to write")
    seed: int = setting(0, "seed of the parts that never train", low=0, high=2**31 - 1)
    dtype: str = setting("bfloat16", "precision of the files", choices=("float32", "bfloat16"))


def assemble(config: AssembleConfig) -> None:
    """Puts the components together into one pipeline folder, whole or not at all; it takes the place of an earlier one.

    Raises:
        ValueError: a component that is missing or damaged, an output that holds something else than a pipeline.
    """
    output = Path(config.output)
    if output.is_dir() and any(output.iterdir()) and not (output / INDEX_FILE).is_file():
        raise ValueError(f"output {output} holds something else than a pipeline (it has no {INDEX_FILE}); give a new name")
    pipe = StableAvatarPipeline(
        transformer=_transformer(config).eval(),
        vae=load_model(PuppetVAE, _part(config.vae, "vae"), torch.float32).eval(),
        audio_encoder=_speech_encoder(_part(config.speech, "audio_encoder")).eval(),
        audio_processor=_speech_processor(_part(config.speech, "audio_processor")),
        **frozen_parts(config.seed),
    )
    part = output.with_name(output.name + ".partial")
    shutil.rmtree(part, ignore_errors=True)
    pipe.to(getattr(torch, config.dtype)).save_pretrained(part)
    shutil.rmtree(output, ignore_errors=True)
    part.rename(output)
    size = sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
    logger.info("%s: %.1f MB", output, size / 1e6)


def _transformer(config: AssembleConfig) -> AvatarTransformer:
    if config.transformer:
        return load_model(AvatarTransformer, Path(config.transformer), torch.float32)
    torch.manual_seed(config.seed)
    return from_scratch(Path(config.settings), torch.float32)


def _part(folder: str, name: str) -> Path:
    """A component of a pipeline folder; of any other folder the folder itself."""
    return Path(folder) / name if (Path(folder) / INDEX_FILE).is_file() else Path(folder)


def _speech_encoder(folder: Path) -> Wav2Vec2Model:
    with library_errors(f"the speech encoder in {folder}"):
        return Wav2Vec2Model.from_pretrained(folder, local_files_only=True)


def _speech_processor(folder: Path) -> Wav2Vec2FeatureExtractor:
    with library_errors(f"the speech encoder's settings in {folder}"):
        return Wav2Vec2FeatureExtractor.from_pretrained(folder, local_files_only=True)

"""Weights of the right shapes for the networks of evaluation, and videos of a talking head."""

from pathlib import Path

import numpy as np
import soundfile
import torch
from clip_files import write_video
from face_files import head
from insightface_files import bright_cell_detector, colour_recogniser
from torch import Tensor, nn

from stableavatar.evaluation.networks.inception import InceptionV3
from stableavatar.evaluation.pairs import Pair
from stableavatar.evaluation.syncnet import SyncNet

ARCFACE_POINTS = np.array([[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]]) / 112
"""Where ArcFace wants eyes, nose and corners of the mouth, in sides of the aligned picture."""


def inception_weights(path: Path) -> Path:
    """Random weights of Inception whose features vary as much as its layers let them."""
    torch.manual_seed(0)
    model = InceptionV3().train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.inference_mode():
        model(torch.randn(2, 3, 299, 299))
    torch.save(model.state_dict(), path)
    return path


class TinyI3D(nn.Module):
    """Takes what StyleGAN-V's I3D takes: a strided convolution over space and time, its mean and spread, 400 mixtures of them."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv3d(3, 16, (3, 16, 16), stride=(1, 16, 16))
        self.mixture = nn.Linear(32, 400)

    def forward(self, x: Tensor, rescale: bool = True, resize: bool = True, return_features: bool = False) -> Tensor:
        """[B, 3, T, 224, 224] -> [B, 400]."""
        assert not rescale and not resize and return_features and x.shape[3] == 224 and x.shape[4] == 224
        found = torch.tanh(self.convolution(x)).flatten(2)
        return self.mixture(torch.cat([found.mean(2), found.std(2)], 1))


def i3d_program(path: Path) -> Path:
    """A TorchScript program that is called as I3D is."""
    torch.manual_seed(0)
    torch.jit.script(TinyI3D().eval()).save(str(path))
    return path


def face_pack(folder: Path) -> Path:
    """A folder as buffalo_l.zip unpacks to: a cell of 32 pixels is a face if it is bright, and its colours are its identity."""
    bright_cell_detector(folder / "det_10g.onnx", ARCFACE_POINTS)
    colour_recogniser(folder / "w600k_r50.onnx")
    return folder


def syncnet_weights(path: Path) -> Path:
    """Random weights of SyncNet."""
    torch.manual_seed(0)
    torch.save(SyncNet().state_dict(), path)
    return path


def dino_folder(folder: Path) -> Path:
    """A tiny random DINOv2 as transformers saves it."""
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 14, "image_size": 224}
    Dinov2Model(Dinov2Config(**sizes)).save_pretrained(folder)
    return folder


def openings(frames: int, seed: int = 0) -> np.ndarray:
    """A mouth's opening by frames, in pixels of `head`: it opens and closes at an uneven pace; float64 [T]."""
    pace = np.cumsum(np.random.default_rng(seed).uniform(0.4, 1.2, frames))
    return 5 * (1 - np.cos(pace))


def talking_head(track: np.ndarray) -> np.ndarray:
    """The astronaut's head with its mouth open by `track`, uint8 [T, 192, 192, 3]."""
    return np.stack([head(opening)[32:224, 32:224] for opening in track])


def voice(track: np.ndarray, rate: int = 16_000) -> np.ndarray:
    """A hum that is as loud as a mouth at 25 frames a second is open, float64 [samples]."""
    samples = len(track) * rate // 25
    loudness = np.repeat(track / 20, rate // 25)[:samples]
    return loudness * np.sin(2 * np.pi * 150 * np.arange(samples) / rate)


def make_pair(folder: Path, name: str, frames: np.ndarray, sound: np.ndarray, truth: Path | None = None, fps: str = "25") -> Pair:
    """A generated video, its sound, and as its true video `truth` or itself."""
    folder.mkdir(parents=True, exist_ok=True)
    write_video(folder / f"{name}.mp4", frames, fps)
    soundfile.write(folder / f"{name}.wav", sound.astype(np.float32), 16_000)
    return Pair(name, "ours", 0, folder / f"{name}.mp4", folder / f"{name}.wav", None, truth or folder / f"{name}.mp4", ())

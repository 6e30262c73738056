"""Training of the small VAE on clips held in memory; it can be stopped and goes on from its state file."""

import logging
import math
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers.training_utils import EMAModel
from PIL import Image
from torch import Tensor
from torch.nn import functional
from torch.optim import Optimizer

from stableavatar.config import Config, setting
from stableavatar.data.clips import IMAGES, MASKS, frame_file, read_lists
from stableavatar.files import filling
from stableavatar.folders import load_model
from stableavatar.geometry import SPATIAL_STRIDE, TEMPORAL_STRIDE, frames_to_latents
from stableavatar.media import from_pixels
from stableavatar.puppet.recipe import PRECISIONS, Trainer, autocast, in_bfloat16
from stableavatar.puppet.vae import PuppetVAE, blocks
from stableavatar.training.config import OptimizerConfig
from stableavatar.training.optimizer import MUON_REGIONS, make_optimizer

logger = logging.getLogger(__name__)

STATE_FILE = "state.pt"
VALIDATION_FRAMES = 17
"""Frames of a held-out clip that are measured."""
STATISTICS_CLIPS = 40
"""Clips whose latents are measured for their mean and standard deviation."""
COMPONENT_BATCHES = 100
"""Batches whose blocks of pixels the principal components are of."""
CHARBONNIER = 1e-3
"""Where the Charbonnier loss turns from squared to absolute error, of pixels in [-1, 1]."""


@dataclass
class VAEConfig(Config):
    """The settings of `puppet.py vae`."""

    lists: str = setting("", "text files with one clip folder per line (images/, face_masks/, lip_masks/), separated by commas")
    output: str = setting("runs/puppet/vae", "folder to write; the state of the training is in it too")
    start: str = setting("", "folder of a VAE to begin with; a new one if empty")
    decoder_only: bool = setting(False, "leave the encoder as it is, so that latents in use stay valid")
    clips: int = setting(1000, "at most so many of them, spread over the lists; all are held in memory, a GB for 150 of 81 frames", low=2)
    held_out: int = setting(16, "clips spread over the lists that it does not see, to measure with", low=1)
    steps: int = setting(4000, "the learning rate is down at zero after so many", low=1)
    minutes: float = setting(0.0, "or after so many minutes, if that is sooner; 0 for no such limit", low=0)
    batch: int = setting(5, "clips of a step", low=1)
    frames: int = setting(9, "frames of each, 1 + 4k", low=1 + TEMPORAL_STRIDE)
    crop: int = setting(64, "their height and width in pixels, a multiple of 8", low=8)
    lr: float = setting(3e-3, "largest learning rate", low=0)
    warmup: int = setting(50, "steps until it is reached", low=1)
    decay: float = setting(0.995, "of the moving average of the weights, which is what is kept", low=0, high=1)
    face_weight: float = setting(3.0, "how much more an error within the face mask counts", low=0)
    lip_weight: float = setting(10.0, "how much more again within the lip mask", low=0)
    lip_crops: float = setting(0.3, "part of the crops that are around the mouth", low=0, high=1)
    edge_weight: float = setting(1.0, "of the loss of differences between neighbouring pixels, in time too", low=0)
    kl_weight: float = setting(1e-6, "of the divergence of latents from normal ones", low=0)
    jitter: float = setting(0.05, "noise on the decoder's latents, in their standard deviations", low=0)
    dtype: str = setting("auto", "precision of computation; auto is bfloat16 where the CPU has instructions for it", choices=PRECISIONS)
    seed: int = setting(0, "seed of everything", low=0, high=2**31 - 1)
    save_every: float = setting(60.0, "seconds between saved states", low=0)
    validate_every: int = setting(200, "steps between measurements", low=1)

    def check(self) -> None:
        if self.frames % TEMPORAL_STRIDE != 1 or self.crop % SPATIAL_STRIDE:
            raise ValueError(f"frames must be 1 + 4k and crop a multiple of 8, got {self.frames} and {self.crop}")


class ClipStore:
    """Clips in memory: pixels uint8 [T, H, W, 3] and masks of face and lips uint8 [T, H, W, 2], 0 to 255, of each."""

    def __init__(self, pixels: Sequence[np.ndarray], masks: Sequence[np.ndarray]) -> None:
        if not pixels or len(pixels) != len(masks):
            raise ValueError(f"got {len(pixels)} clips and masks of {len(masks)}; expected as many, at least one")
        for number, (shown, masked) in enumerate(zip(pixels, masks)):
            if shown.shape[:3] != masked.shape[:3]:
                sizes = f"pictures of {shown.shape[:3]} and masks of {masked.shape[:3]} (T, H, W)"
                raise ValueError(f"clip {number} has {sizes}; expected the same")
        self.pixels, self.masks = list(pixels), list(masks)

    @classmethod
    def read(cls, lists: str, most: int) -> "ClipStore":
        """The clip folders of path lists (`images/`, `face_masks/`, `lip_masks/`), evenly chosen if there are more than `most`.

        Raises:
            ValueError, OSError: they cannot be read.
        """
        folders = read_lists(lists)
        folders = [folders[i] for i in spread(len(folders), most)]
        with ThreadPoolExecutor(2) as pool:
            pixels = list(pool.map(lambda folder: _read_frames(folder / IMAGES, "RGB"), folders))
            masks = list(pool.map(lambda folder: np.stack([_read_frames(folder / name, "L") for name in MASKS], -1), folders))
        return cls(pixels, masks)

    def only(self, numbers: Iterable[int]) -> "ClipStore":
        """Some of the clips."""
        numbers = list(numbers)
        return ClipStore([self.pixels[i] for i in numbers], [self.masks[i] for i in numbers])

    def batch(self, rng: np.random.Generator, config: VAEConfig) -> tuple[Tensor, Tensor]:
        """Random crops of random runs: pixels [B, T, crop, crop, 3] in [-1, 1], masks [B, T, crop, crop, 2] in [0, 1]."""
        crops = [self._crop(rng, config) for _ in range(config.batch)]
        pixels, masks = (torch.from_numpy(np.stack(parts)) for parts in zip(*crops))
        return from_pixels(pixels), masks.float() / 255

    def _crop(self, rng: np.random.Generator, config: VAEConfig) -> tuple[np.ndarray, np.ndarray]:
        clip = rng.integers(len(self.pixels))
        pixels, masks = self.pixels[clip], self.masks[clip]
        free = np.array(masks.shape[1:3]) - config.crop
        if (free < 0).any() or len(pixels) < config.frames:
            raise ValueError(f"clip of {pixels.shape[:3]} (T, H, W) is smaller than {config.frames} crops of {config.crop}")
        start = rng.integers(len(pixels) - config.frames + 1)
        corner = rng.integers(free + 1)
        mouth = np.argwhere(masks[start, ..., 1])
        if rng.random() < config.lip_crops and len(mouth):
            corner = np.clip(mouth.mean(0).astype(int) - rng.integers(config.crop // 4, config.crop * 3 // 4, 2), 0, free)
        window = (slice(start, start + config.frames), *(slice(i, i + config.crop) for i in corner))
        return pixels[window], masks[window]


def spread(count: int, most: int) -> list[int]:
    """At most so many of the numbers below `count`, evenly spread from the first to the last."""
    return np.linspace(0, count - 1, min(most, count)).astype(int).tolist()


def _read_frames(folder: Path, mode: str) -> np.ndarray:
    """All frame_i.png of a folder from 0 on, uint8 [T, H, W(, 3)]."""
    count = len(list(folder.glob("frame_*.png")))
    if not count:
        raise ValueError(f"{folder} holds no frame_0.png")
    return np.stack([np.asarray(Image.open(frame_file(folder, i)).convert(mode)) for i in range(count)])


def weights(masks: Tensor, config: VAEConfig) -> Tensor:
    """Of the errors of pixels [..., 1], from their masks of face and lips [..., 2]."""
    face, lips = masks.split(1, dim=-1)
    return 1 + config.face_weight * face + config.lip_weight * lips


def reconstruction_loss(result: Tensor, pixels: Tensor, weight: Tensor, config: VAEConfig) -> Tensor:
    """Charbonnier loss of pixels and of their differences to neighbours in time and space, weighted; all [B, T, H, W, .]."""
    error = result - pixels
    loss = (weight * (error**2 + CHARBONNIER**2).sqrt()).mean()
    for dim in (1, 2, 3):
        loss = loss + config.edge_weight / 2 * (weight.narrow(dim, 1, weight.shape[dim] - 1) * error.diff(dim=dim).abs()).mean()
    return loss


def divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """Of the latents from the standard normal distribution, per number."""
    return (mean**2 + log_variance.exp() - 1 - log_variance).mean() / 2


class VAETrainer(Trainer):
    """The model, its optimiser, the average of its weights and how far they are."""

    free = frozenset({"lists", "output", "start", "held_out", "steps", "minutes", "save_every", "validate_every"})
    counters = ("step", "seconds")
    config: VAEConfig

    def __init__(self, vae: PuppetVAE, config: VAEConfig) -> None:
        vae.encoder.requires_grad_(not config.decoder_only)
        self.vae, self.seconds, self.average = vae.train(), 0.0, EMAModel(vae.parameters(), decay=config.decay)
        super().__init__(config, _optimizer(vae, config.lr), vae=vae, average=self.average)

    @property
    def progress(self) -> float:
        """0 at the start, 1 at the end."""
        spent = self.seconds / 60 / self.config.minutes if self.config.minutes else 0.0
        return min(1.0, max(spent, self.step / self.config.steps))

    def advance(self, clips: ClipStore) -> float:
        """One step; the loss."""
        began, config = time.monotonic(), self.config
        rng = np.random.default_rng([config.seed, self.step])
        pixels, masks = clips.batch(rng, config)
        self.set_rate(config.lr, (self.step + 1) / config.warmup, self.progress)
        loss = self._loss(pixels, masks, rng)
        self.descend(loss)
        self.average.step(self.vae.parameters())
        self.seconds += time.monotonic() - began
        return loss.item()

    def _loss(self, pixels: Tensor, masks: Tensor, rng: np.random.Generator) -> Tensor:
        config, (batch, frames, height, width, _) = self.config, pixels.shape
        shape = (batch, frames_to_latents(frames), height // SPATIAL_STRIDE, width // SPATIAL_STRIDE, self.vae.config.z_dim)
        noise = torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))
        with autocast(config.dtype):
            result, mean, log_variance = self.vae(pixels, noise, config.jitter)
        loss = reconstruction_loss(result.float(), pixels, weights(masks, config), config)
        return loss + config.kl_weight * divergence(mean, log_variance)


def _optimizer(vae: PuppetVAE, lr: float) -> Optimizer:
    """Muon for the matrices between hidden channels, which are more than a latent's; AdamW for all else."""
    groups = {name: {"name": name, "params": [], "lr": lr, "weight_decay": 1e-3} for name in (MUON_REGIONS[0], "others")}
    for weight in vae.parameters():
        hidden = weight.ndim == 2 and min(weight.shape) > vae.config.z_dim
        groups[MUON_REGIONS[0] if hidden else "others"]["params"].append(weight)
    return make_optimizer(list(groups.values()), OptimizerConfig("muon", lr, beta1=0.95, beta2=0.99, eps=1e-8))


def train_vae(config: VAEConfig) -> None:
    """Trains the small video VAE and writes it into `config.output`, with the statistics of its latents.

    Raises:
        ValueError, OSError: clips, `config.start` or the state of an earlier training cannot be read, the output cannot be written.
    """
    clips = ClipStore.read(config.lists, config.clips)
    if len(clips.pixels) <= config.held_out:
        raise ValueError(f"held_out={config.held_out} leaves none of {len(clips.pixels)} clips to train with")
    unseen = set(spread(len(clips.pixels), config.held_out))
    parts = (clips.only(i for i in range(len(clips.pixels)) if (i in unseen) == held_out) for held_out in (False, True))
    start = load_model(PuppetVAE, Path(config.start), torch.float32) if config.start else None
    train_on(*parts, config, start)


def train_on(clips: ClipStore, held_out: ClipStore, config: VAEConfig, start: PuppetVAE | None = None) -> PuppetVAE:
    """Trains until the end, from a saved state if there is one, and writes the model (save_pretrained).

    Args:
        held_out: clips that it does not see; their PSNR is logged.
        start: what it begins with; None for a new one of the default widths.

    Raises:
        ValueError: the state file there is damaged, or of another training.
    """
    torch.manual_seed(config.seed)
    output, state = Path(config.output), Path(config.output) / STATE_FILE
    output.mkdir(parents=True, exist_ok=True)
    vae = start or PuppetVAE()
    if not start and not state.exists():
        vae.set_components(*principal_components(clips, config, vae.config.z_dim))
    trainer = VAETrainer(vae, config)
    if state.exists():
        trainer.load(state)
    while trainer.progress < 1:
        loss = trainer.advance(clips)
        if trainer.step % config.validate_every == 0:
            _validate(trainer, held_out, loss)
        trainer.save(state, config.save_every)
    trainer.save(state)
    trainer.average.copy_to(trainer.vae.parameters())
    vae.eval()
    if not config.decoder_only:
        vae.set_statistics(*latent_statistics(vae, clips))
    vae.register_to_config(bfloat16=in_bfloat16(config.dtype))
    with filling(output) as part:
        vae.save_pretrained(part)
    logger.info("PSNR %.2f dB, of the mouth %.2f dB", *psnr(vae, held_out))
    return vae


def _validate(trainer: VAETrainer, held_out: ClipStore, loss: float) -> None:
    parameters = list(trainer.vae.parameters())
    trainer.average.store(parameters)
    trainer.average.copy_to(parameters)
    whole, mouth = psnr(trainer.vae, held_out)
    trainer.average.restore(parameters)
    logger.info("step %d, %.1f min: loss %.4f, PSNR %.2f dB, of the mouth %.2f dB", trainer.step, trainer.seconds / 60, loss, whole, mouth)


def _start(pixels: np.ndarray, frames: int) -> Tensor:
    """The first frames of a clip [1, n, H, W, 3] in [-1, 1], n = 1 + 4k."""
    count = (min(len(pixels), frames) - 1) // TEMPORAL_STRIDE * TEMPORAL_STRIDE + 1
    return from_pixels(torch.from_numpy(pixels[:count]))[None]


@torch.no_grad()
def psnr(vae: PuppetVAE, clips: ClipStore) -> tuple[float, float]:
    """Mean PSNR in dB of reconstructed clips, and that of the pixels within the lip masks."""
    whole, mouth = [], []
    for pixels, masks in zip(clips.pixels, clips.masks):
        frames = _start(pixels, VALIDATION_FRAMES)
        squared = functional.mse_loss(vae(frames)[0].clamp(-1, 1), frames, reduction="none")[0] / 4
        inside = squared[torch.from_numpy(masks[: frames.shape[1], ..., 1]) > 127]
        whole.append(-10 * math.log10(squared.mean()))
        mouth.append(-10 * math.log10(inside.mean()) if len(inside) else math.nan)
    return float(np.mean(whole)), float(np.nanmean(mouth))


def principal_components(clips: ClipStore, config: VAEConfig, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean [768], first `count` components [count, 768] and deviations along them [count] of blocks of pixels, by `weights`."""
    rng, found, weighed = np.random.default_rng([config.seed, 0]), [], []
    for _ in range(COMPONENT_BATCHES):
        pixels, masks = clips.batch(rng, config)
        found.append(blocks(pixels[:, 1:]).flatten(0, 3).double())
        weighed.append(blocks(weights(masks, config)[:, 1:].expand(-1, -1, -1, -1, 3)).flatten(0, 3).mean(1).double())
    pixels, weight = torch.cat(found), torch.cat(weighed)[:, None]
    mean = (weight * pixels).sum(0) / weight.sum()
    variances, vectors = torch.linalg.eigh((weight * (pixels - mean)).T @ (pixels - mean) / weight.sum())
    return mean.float(), vectors.T[-count:].flip(0).float(), variances[-count:].flip(0).sqrt().float()


@torch.no_grad()
def latent_statistics(vae: PuppetVAE, clips: ClipStore) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each latent channel over the first clips."""
    found = [vae(_start(pixels, VALIDATION_FRAMES))[1].reshape(-1, vae.config.z_dim) for pixels in clips.pixels[:STATISTICS_CLIPS]]
    latents = torch.cat(found)
    return latents.mean(0).tolist(), latents.std(0).tolist()

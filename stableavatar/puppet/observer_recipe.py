"""Trains the observer on renders with random mouths, made worse in every way that must not fool it.

First all of it on whole frames, then the reader of the mouth alone on close-ups, which is cheap: the mouth is what has to be exact.
"""

import logging
import math
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from stableavatar.config import Config, setting
from stableavatar.files import replacing
from stableavatar.folders import load_model
from stableavatar.puppet.evaluation import round_trip
from stableavatar.puppet.face import EYE_Y, MOUTH_Y, Pose, lip_outline
from stableavatar.puppet.identity import KINDS, Identity, draw_identity
from stableavatar.puppet.motion import Motion, draw_motion
from stableavatar.puppet.observer import MOUTH_VIEW, STRIDE, WEIGHTS, Observer, cut_out, load_observer, peaks
from stableavatar.puppet.recipe import Trainer, autocast
from stableavatar.puppet.renderer import PLACES, render
from stableavatar.puppet.vae import PuppetVAE
from stableavatar.puppet.world import SHAPES, draw_scene

logger = logging.getLogger(__name__)

SHARES = {"square": 0.6, "vec": 0.2, "rec": 0.2}
"""Of the world's shapes among the frames; a pool of frames each, in this order."""
FRAMES_OF_ONE = 8
CLIP = 100
"""Length of the movement from which the frames of one identity are taken."""
CLOSED = 0.25
"""Share of mouths that are all but closed."""
JITTER, FINE_JITTER = 0.08, 0.03
"""The readers learn at places that are off by up to about this much, in distances of mouth and eyes; the latter in close-ups."""
CLOSE_UP = 1.6
"""Half the side of a close-up, in these distances."""
VAE_CLIPS, VAE_FRAMES, VAE_SHARE = 30, 13, 0.25
"""Clips of each size that go through the VAE, their length, and their share of the close-ups."""
BATCH, WARMUP = 64, 100
NORM = 5.0
"""Of the gradient, at most."""
SAVE_EVERY = 60.0
"""Seconds between two saves of the state."""


@dataclass
class ObserverConfig(Config):
    """The settings of `puppet.py observer`."""

    output: str = setting(str(WEIGHTS), "the weights to write, .safetensors; the state of the training is next to it while it runs")
    start: str = setting("", "weights to begin with, for a short finish after the renderer has changed a little; empty for fresh ones")
    seed: int = setting(0, "seed of everything", low=0, high=2**31 - 1)
    frames: int = setting(30000, "frames drawn before the training", low=BATCH)
    steps: int = setting(1500, "steps on whole frames; 0.2 to 0.3 s each on one core", low=0)
    mouth_steps: int = setting(8000, "steps on close-ups of the mouth after them; 0.1 s each", low=0)
    vae: str = setting("", "folder of a VAE whose decoded clips are among those of the close-ups; empty for none")
    lr: float = setting(3e-3, "largest learning rate", low=0)


@dataclass(frozen=True)
class Frames:
    """Frames of one size: pixels uint8 [N, H, W, 3], points [N, 2, 2] (mouth, eyes; x, y), values [N, 3] (aperture, width, blink)."""

    pixels: np.ndarray
    points: np.ndarray
    values: np.ndarray


def draw_frames(seed: int, size: tuple[int, int], count: int) -> Frames:
    """Random faces with random mouths, drawn one by one."""
    rng, found = np.random.default_rng([seed, *size]), []
    for _ in tqdm(range(0, count, FRAMES_OF_ONE), f"frames {size[0]}x{size[1]}"):
        identity = draw_identity(int(rng.integers(2**31)))
        aperture, width = rng.uniform(0, 1, (2, CLIP))
        aperture[rng.random(CLIP) < CLOSED] *= 0.1
        motion = draw_motion(int(rng.integers(2**31)), aperture, width, str(rng.choice(list(KINDS), p=(0.4, 0.2, 0.4))))
        motion.blink[:] = rng.uniform(-0.5, 1.5, CLIP).clip(0, 1)
        for frame in rng.choice(CLIP, FRAMES_OF_ONE, replace=False).tolist():
            found.append(draw_frame(identity, motion, frame, size))
    return Frames(*(np.stack(parts) for parts in zip(*found)))


def draw_decoded(seed: int, size: tuple[int, int], vae: PuppetVAE) -> Frames:
    """Frames of training scenes of that size that went through the VAE."""
    parts = []
    for number in tqdm(range(VAE_CLIPS), f"VAE {size[0]}x{size[1]}"):
        scene = draw_scene(seed + number, size=size, frames=VAE_FRAMES)
        pixels, *truth = (np.stack(part) for part in zip(*(draw_frame(scene.identity, scene.motion, i, size) for i in range(VAE_FRAMES))))
        parts.append((round_trip(vae, pixels), *truth))
    return Frames(*(np.concatenate(part) for part in zip(*parts)))


def draw_frame(identity: Identity, motion: Motion, frame: int, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pixels [H, W, 3], points [2, 2] and values [3] of one frame; the points are reckoned from where the lip mask is."""
    drawn = render(identity, motion, frame, size)
    now = {name: float(track[frame]) for name, track in vars(motion).items()}
    pose = Pose(*(now[name] for name in Pose.__dataclass_fields__))
    lips = centroid(cv2.moments(lip_outline(identity, pose).astype(np.float32)))
    unit = PLACES[identity.framing][0] * min(size[1], 1.2 * size[0])
    turn = np.array([[math.cos(now["roll"]), -math.sin(now["roll"])], [math.sin(now["roll"]), math.cos(now["roll"])]])
    places = np.array([(pose.slide(1.15), MOUTH_Y), (pose.slide(1), EYE_Y)]) - lips
    points = centroid(cv2.moments(drawn.lips, binaryImage=True)) + unit * places @ turn.T
    return drawn.pixels, points.astype(np.float32), np.array([now[name] for name in ("aperture", "width", "blink")], dtype=np.float32)


def centroid(moments: dict[str, float]) -> np.ndarray:
    """[2] x and y."""
    return np.array([moments["m10"], moments["m01"]]) / moments["m00"]


def worsen(rng: np.random.Generator, pixels: np.ndarray, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A frame moved, painted over beside the mouth, discoloured, blurred, compressed, with noise: each sometimes; and its points."""
    if rng.random() < 0.7:
        pixels, points = moved(rng, pixels, points)
    if rng.random() < 0.5:
        pixels = blotched(rng, pixels, points)
    if rng.random() < 0.8:
        pixels = discoloured(rng, pixels)
    if rng.random() < 0.25:
        scale = rng.uniform(0.55, 1)
        small = cv2.resize(pixels, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
        pixels = cv2.resize(small, pixels.shape[1::-1], interpolation=cv2.INTER_CUBIC)
    elif rng.random() < 0.6:
        pixels = cv2.GaussianBlur(pixels, (0, 0), rng.uniform(0.2, 1.3))
    if rng.random() < 0.35:
        pixels = cv2.imdecode(cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(25, 95))])[1], cv2.IMREAD_COLOR)
    if rng.random() < 0.4:
        pixels = (pixels + rng.normal(0, rng.uniform(0, 6), pixels.shape).astype(np.float32)).clip(0, 255).astype(np.uint8)
    return pixels, points


def close_up(pixels: np.ndarray, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The part of a frame around the mouth, and the points in it."""
    reach = CLOSE_UP * np.linalg.norm(points[0] - points[1])
    low = np.maximum((points[0] - reach).astype(int), 0)
    high = np.maximum((points[0] + reach).astype(int) + 1, low + 8)
    return np.ascontiguousarray(pixels[low[1] : high[1], low[0] : high[0]]), (points - low).astype(np.float32)


def moved(rng: np.random.Generator, pixels: np.ndarray, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mirrored half of the time, a little turned, scaled and shifted."""
    height, width = pixels.shape[:2]
    matrix = cv2.getRotationMatrix2D((width / 2, height / 2), rng.uniform(-5, 5), rng.uniform(0.88, 1.15))
    matrix[:, 2] += rng.uniform(-0.05, 0.05, 2) * (width, height)
    if rng.random() < 0.5:
        matrix = matrix @ np.array([[-1, 0, width - 1], [0, 1, 0], [0, 0, 1.0]])
    mode = cv2.BORDER_REFLECT_101 if rng.random() < 0.5 else cv2.BORDER_REPLICATE
    return cv2.warpAffine(pixels, matrix, (width, height), borderMode=mode), (points @ matrix[:, :2].T + matrix[:, 2]).astype(np.float32)


def blotched(rng: np.random.Generator, pixels: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Soft or hard ellipses of any colour, some of them close to the mouth, none on it."""
    height, width = pixels.shape[:2]
    unit, mouth = float(np.linalg.norm(points[0] - points[1])), points[0] + 0.2 * (points[0] - points[1])
    free = 1 - ellipse((height, width), mouth, (0.8 * unit, 0.55 * unit), 0)
    result = pixels.astype(np.float32)
    for _ in range(rng.integers(1, 6)):
        where = rng.uniform(0, 1, 2) * (width, height) if rng.random() < 0.5 else mouth + rng.normal(0, 1.2 * unit, 2)
        blob = ellipse((height, width), where, rng.uniform(0.08, 0.9, 2) * unit, rng.uniform(0, 180))
        alpha = cv2.GaussianBlur(blob, (0, 0), rng.uniform(0.5, 4)) * free * rng.uniform(0.3, 1)
        result += alpha[..., None] * (rng.uniform(0, 255, 3).astype(np.float32) - result)
    return result.astype(np.uint8)


def ellipse(shape: tuple[int, int], middle: np.ndarray, axes: np.ndarray | tuple[float, float], angle: float) -> np.ndarray:
    """float32 [H, W]: 1 inside, 0 outside."""
    return cv2.ellipse(np.zeros(shape, np.float32), (tuple(map(float, middle)), tuple(2 * float(axis) for axis in axes), angle), 1.0, -1)


def discoloured(rng: np.random.Generator, pixels: np.ndarray) -> np.ndarray:
    """Another gain, offset and gamma of each channel."""
    gamma = rng.uniform(0.7, 1.4) * rng.uniform(0.93, 1.07, 3)
    ramp = (np.arange(256)[:, None] / 255) ** gamma
    table = (ramp * rng.uniform(0.7, 1.15) * rng.uniform(0.88, 1.12, 3) + rng.uniform(-0.08, 0.12) + rng.uniform(-0.05, 0.05, 3)) * 255
    return cv2.LUT(pixels, table.clip(0, 255).astype(np.uint8)[None])


def heat_loss(logits: Tensor, points: Tensor) -> Tensor:
    """Cross entropy between heat maps [B, 2, h, w] and a bump of one cell around each point [B, 2, 2]."""
    rows, columns = (torch.arange(n) for n in logits.shape[2:])
    cells = (points + 0.5) / STRIDE - 0.5
    exponent = (columns - cells[..., :1]).square()[:, :, None] + (rows - cells[..., 1:]).square()[..., None]
    target = (-exponent.clamp(max=40) / 2).exp().flatten(2)
    return -(target / target.sum(dim=2, keepdim=True) * logits.flatten(2).log_softmax(dim=2)).sum(dim=2).mean()


def jittered(points: Tensor, amount: float, generator: torch.Generator) -> Tensor:
    """Points [B, 2, 2] off by normal noise of up to `amount` times their distance, drawn for each of the B."""
    spread = amount * torch.rand((len(points), 1, 1), generator=generator) * (points[:, :1] - points[:, 1:]).norm(dim=2, keepdim=True)
    return points + spread * torch.randn(points.shape, generator=generator)


class ObserverTrainer(Trainer):
    """The network, its optimiser and how far they are; every step's frames follow from the seed and the step."""

    free = frozenset({"output", "start"})
    config: ObserverConfig

    def __init__(self, config: ObserverConfig) -> None:
        torch.manual_seed(config.seed)
        self.observer = (deepcopy(load_observer(Path(config.start))) if config.start else Observer()).train()
        optimizer = torch.optim.AdamW(self.observer.parameters(), config.lr, weight_decay=1e-3)
        super().__init__(config, optimizer, observer=self.observer)

    @property
    def progress(self) -> float:
        """0 at the start, 1 at the end; of whole frames, then of close-ups."""
        whole = self.config.steps
        return self.step / whole if self.step < whole else (self.step - whole) / max(self.config.mouth_steps, 1)

    @property
    def finished(self) -> bool:
        return self.step >= self.config.steps + self.config.mouth_steps

    def advance(self, pools: list[Frames]) -> dict[str, float]:
        """One step; mean errors: of the points in pixels, of the values."""
        rng, since = np.random.default_rng([self.config.seed, self.step]), self.step - self.config.steps
        if since >= 0:
            self.set_rate(self.config.lr / 2, (since + 1) / WARMUP, self.progress)
            return self._mouth_step(rng, pools)
        self.set_rate(self.config.lr, (self.step + 1) / WARMUP, self.progress)
        return self._whole_step(rng, pools[: len(SHARES)])

    def _whole_step(self, rng: np.random.Generator, pools: list[Frames]) -> dict[str, float]:
        pool = pools[rng.choice(len(pools), p=list(SHARES.values()))]
        chosen = rng.integers(len(pool.pixels), size=BATCH)
        pixels, points = (np.stack(parts) for parts in zip(*(worsen(rng, pool.pixels[i], pool.points[i]) for i in chosen)))
        frames, generator = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255, torch.Generator().manual_seed(self.step)
        places, values = jittered(torch.from_numpy(points), JITTER, generator), torch.from_numpy(pool.values[chosen])
        with autocast("auto"):
            logits = self.observer.locator(frames).float()
        read = self.observer.read(frames, places)
        self.descend(0.2 * heat_loss(logits, torch.from_numpy(points)) + 20 * functional.mse_loss(read, values), NORM)
        error = (read - values).detach().abs().mean(dim=0).tolist()
        away = (peaks(logits.detach())[0] - torch.from_numpy(points)).norm(dim=2).mean().item()
        return {"pixels": away, **dict(zip(("aperture", "width", "blink"), error))}

    def _mouth_step(self, rng: np.random.Generator, pools: list[Frames]) -> dict[str, float]:
        cuts, values, generator = [], [], torch.Generator().manual_seed(self.step)
        for _ in range(BATCH):
            drawn, decoded = pools[: len(SHARES)], pools[len(SHARES) :]
            pool = (decoded if decoded and rng.random() < VAE_SHARE else drawn)[rng.integers(len(SHARES))]
            chosen = rng.integers(len(pool.pixels))
            pixels, points = worsen(rng, *close_up(pool.pixels[chosen], pool.points[chosen]))
            places = jittered(torch.from_numpy(points)[None], FINE_JITTER, generator)
            cuts.append(cut_out(torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255, places, 0, MOUTH_VIEW))
            values.append(pool.values[chosen, :2])
        read, wanted = self.observer.mouth(torch.cat(cuts)), torch.from_numpy(np.stack(values))
        self.descend(20 * functional.mse_loss(read, wanted), NORM)
        return dict(zip(("aperture", "width"), (read - wanted).detach().abs().mean(dim=0).tolist()))


def train_observer(config: ObserverConfig) -> None:
    """Draws the frames, trains, and writes the weights in half precision; goes on from `OUTPUT.state` if that is there.

    Raises:
        ValueError: the state is damaged, or of another training; the VAE cannot be loaded.
    """
    output, state = Path(config.output), Path(config.output + ".state")
    trainer = ObserverTrainer(config)
    if state.exists():
        trainer.load(state)
    pools = [draw_frames(config.seed, SHAPES[name], int(config.frames * share)) for name, share in SHARES.items()]
    if config.vae:
        vae = load_model(PuppetVAE, Path(config.vae), torch.float32).eval()
        pools += [draw_decoded(config.seed, SHAPES[name], vae) for name in SHARES]
    while not trainer.finished:
        errors = trainer.advance(pools)
        if trainer.step % 100 == 0:
            logger.info("step %d: %s", trainer.step, " ".join(f"{k} {v:.3f}" for k, v in errors.items()))
        trainer.save(state, SAVE_EVERY)
    save(trainer.observer, output)
    state.unlink(missing_ok=True)


def save(observer: Observer, path: Path) -> None:
    """The weights in half precision, whole or not at all."""
    weights = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in observer.state_dict().items()}
    with replacing(path) as part:
        save_file(weights, part)

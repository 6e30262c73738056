"""From a batch to its losses: noise, audio drops, prediction, masked velocity loss (paper section 3.4, equation 11).

Shapes: B batch, F latent frames, h x w latent height and width.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from stableavatar.data.samples import Batch, Item
from stableavatar.models.dit import AudioFeatures, Conditions
from stableavatar.models.layout import TokenLayout
from stableavatar.sampling.conditioning import reference_channels
from stableavatar.sampling.flow import TRAIN_TIMESTEPS, add_noise, logit_normal, mode, shift_sigma, velocity_target
from stableavatar.training.config import ObjectiveConfig

SAMPLE_SALT, STEP_SALT = 1, 2
"""Keep the numbers drawn here for a sample and for a step apart from each other and from those that choose its frames."""


@dataclass(frozen=True)
class Draws:
    """All that is random about one sample's loss.

    Attributes:
        u: where in its density the noise level lies, in 0..1.
        q: chooses the mask (equation 11).
        null_audio, drop_tokens, clip_audio: the sample's features are zeros; its refined tokens are zeros; it asks for clip-level
            audio, which is the whole forward's, so that the first sample of a batch decides.
        noise_seed: of the noise.
    """

    u: float
    q: float
    null_audio: bool
    drop_tokens: bool
    clip_audio: bool
    noise_seed: int


@dataclass(frozen=True)
class Losses:
    """Of a batch.

    Attributes:
        per_sample: what training minimises [B], with its gradient; weights of samples are not applied.
        parts: without gradient, [B] each: `velocity`, the plain mean squared error, which is comparable between steps; `masked`,
            that of equation 11; `motion`, that of differences between frames, if it has a share.
    """

    per_sample: Tensor
    parts: dict[str, Tensor]


class Objective:
    """The loss of a batch. What is drawn for a sample follows from the seed and its item alone, on every device and process.

    Args:
        config: densities, shares and rates.
        seed: of the run.
    """

    def __init__(self, config: ObjectiveConfig, seed: int) -> None:
        self.config = config
        self.seed = seed

    def __call__(self, model: Callable[..., Tensor], batch: Batch) -> Losses:
        """Runs the model once, with `AvatarTransformer`'s arguments, on the batch's noisy latents."""
        draws = [self.draw(item) for item in batch.items]
        sigma = self.sigmas([draw.u for draw in draws]).to(batch.latents.device)
        noise = torch.stack([seeded_noise(batch.latents.shape[1:], draw.noise_seed) for draw in draws]).to(batch.latents.device)
        layout = TokenLayout.full(batch.latents.shape[2], clip_audio=draws[0].clip_audio)
        noisy = add_noise(batch.latents, noise, sigma)
        velocity = model(noisy, TRAIN_TIMESTEPS * sigma, make_conditions(batch, draws), layout).float()
        weights = torch.stack([self.mask(masks, draw.q) for masks, draw in zip(batch.masks, draws)])
        return self.losses(velocity, velocity_target(batch.latents, noise), weights)

    def draw(self, item: Item) -> Draws:
        """A sample's draws: jitter, q, null audio, token drop, clip-level audio, seed of the noise, in this order.

        The noise level is stratified over the samples of an optimiser step, whichever process has them: sample `slot` of `of`
        draws from its own of `of` equal parts of 0..1, dealt out anew at every step.
        """
        generator = np.random.default_rng([self.seed, item.epoch, item.clip, SAMPLE_SALT])
        jitter, q, null, drop, clip = generator.random(5).tolist()
        strata = np.random.default_rng([self.seed, item.epoch, item.step, STEP_SALT]).permutation(item.of)
        return Draws(
            u=(int(strata[item.slot % item.of]) + jitter) / item.of,  # one that only fills a place may have any slot
            q=q,
            null_audio=null < self.config.null_audio,
            drop_tokens=drop < self.config.drop_tokens,
            clip_audio=clip < self.config.clip_audio,
            noise_seed=int(generator.integers(2**63)),
        )

    def sigmas(self, u: list[float]) -> Tensor:
        """Noise levels [B] of the configured density, shifted."""
        config, uniform = self.config, torch.tensor(u, dtype=torch.float64)
        if config.density == "logit_normal":
            level = logit_normal(uniform, config.logit_mean, config.logit_std)
        elif config.density == "mode":
            level = mode(uniform, config.mode_scale)
        else:
            level = uniform
        return shift_sigma(level, config.shift).float()

    def mask(self, masks: Tensor, q: float) -> Tensor:
        """`choose_mask` with the configured shares and area of the lips; ones without masks."""
        if not self.config.masks:
            return torch.ones_like(masks[0])
        if area := self.config.lip_area:
            face, lips = masks
            masks = torch.stack([face, lips * (area / lips.mean().clamp(min=1e-6))])  # none where no lips are seen
        return choose_mask(masks, q, self.config.face_share, self.config.lip_share, self.config.lip_weight)

    def losses(self, velocity: Tensor, target: Tensor, weights: Tensor) -> Losses:
        """The losses of a prediction.

        The paper writes the mask inside the square, the released program multiplies the squared error by it, as here: the same for
        masks of zeros and ones, while 1 + face + lips then counts once and not squared.

        Args:
            velocity, target: [B, 16, F, h, w].
            weights: of the elements [B, F, h, w].
        """
        error = velocity - target
        masked = per_sample_mean(weights.unsqueeze(1) * error.square())
        parts = {"velocity": per_sample_mean(error.square()), "masked": masked}
        loss = masked
        if share := self.config.motion:
            parts["motion"] = per_sample_mean(error.diff(dim=2).square())  # difference of differences over the frames
            loss = (1 - share) * masked + share * parts["motion"]
        return Losses(loss, {name: part.detach() for name, part in parts.items()})


def choose_mask(masks: Tensor, q: float, face_share: float, lip_share: float, lip_weight: float = 1.0) -> Tensor:
    """The weight of each element's squared error (equation 11): the lip mask for the largest q, below it the face mask, else
    1 + face + lip_weight lips.

    Args:
        masks: face and lips [2, F, h, w].
        q: in 0..1.
        face_share, lip_share: parts of 0..1 for which the loss is the face's or the lips' alone.
        lip_weight: 1 in the paper.

    Returns:
        [F, h, w]
    """
    face, lips = masks
    if q >= 1 - lip_share:
        return lips
    return face if q >= 1 - lip_share - face_share else 1 + face + lip_weight * lips


def make_conditions(batch: Batch, draws: list[Draws]) -> Conditions:
    """What the network is told: null audio is zero features into the adapter, dropped tokens are zeros after it."""
    heard = batch.audio.new_tensor([not draw.null_audio for draw in draws]).view(-1, 1, 1)
    keep = batch.audio.new_tensor([not draw.drop_tokens for draw in draws])
    reference = torch.stack([reference_channels(latents, known=1) for latents in batch.reference])
    return Conditions(batch.text, batch.image, reference, AudioFeatures(batch.audio * heard, keep))


def seeded_noise(shape: torch.Size, seed: int) -> Tensor:
    """Standard normal noise, drawn on the host so that it is the same for every device."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def per_sample_mean(x: Tensor) -> Tensor:
    """[B, ...] -> [B]"""
    return x.flatten(1).mean(1)


def without_drops(config: ObjectiveConfig) -> ObjectiveConfig:
    """The objective of a validation loss: all audio is heard, locally. Its `velocity` part, of items with a fixed epoch, compares
    weights on equal terms."""
    return replace(config, null_audio=0.0, drop_tokens=0.0, clip_audio=0.0)

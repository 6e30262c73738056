"""What travels from clip folders to the objective: an order for a sample, the sample, its encoded form, a batch of those.

Shapes: B batch, T pixel frames, F latent frames, H x W pixels, h x w latent height and width.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from stableavatar.geometry import PATCH, SPATIAL_STRIDE, frames_to_latents


@dataclass(frozen=True)
class Bucket:
    """Samples of one shape: pixels and frames at the training rate."""

    width: int
    height: int
    frames: int

    @property
    def latents(self) -> tuple[int, int, int]:
        """(F, h, w) of a sample's latents."""
        return frames_to_latents(self.frames), self.height // SPATIAL_STRIDE, self.width // SPATIAL_STRIDE

    @property
    def tokens(self) -> int:
        """Latent tokens of a sample."""
        return math.prod(self.latents) // PATCH**2


@dataclass(frozen=True)
class Item:
    """An order for one sample. All that is random about a sample follows from the seed and this record, on any number of processes.

    Attributes:
        clip: index into the list of clips; bucket: shape to deliver.
        run: which run of the clip's frames to take: a number that, with the seed and the clip's name, decides where it starts.
        epoch, step: step counts optimiser steps within the epoch.
        slot, of: this is sample `slot` of the `of` samples of the step, over all processes and accumulated batches.
        weight: 1, or 0 for a sample that only fills a place (the end of a bucket, a broken clip) and must not count.
    """

    clip: int
    bucket: Bucket
    run: int
    epoch: int
    step: int
    slot: int
    of: int
    weight: int = 1


@dataclass(frozen=True)
class Sample:
    """A run of frames as it was read.

    Attributes:
        name: the clip's folder; prompt: what it shows.
        pixels: uint8 [T, H, W, 3]; the first frame is the reference.
        waveform: float32 [samples], 16 kHz mono, exactly the T frames.
        masks: float32 [2, F, h, w], face and lips at latent size.
    """

    item: Item
    name: str
    prompt: str
    pixels: Tensor
    waveform: np.ndarray
    masks: Tensor


@dataclass(frozen=True)
class EncodedSample:
    """A sample as the frozen encoders give it, float32 or bfloat16; this is what a latent cache holds.

    Attributes:
        latents: normalised VAE latents [16, F, h, w]; reference: those of the first frame followed by zeros [16, F, h, w].
        image: CLIP tokens [257, C]; text: the prompt's own tokens [K, E], not padded; audio: wav2vec features [Ta, A].
        masks: [2, F, h, w], face and lips.
    """

    item: Item
    name: str
    latents: Tensor
    reference: Tensor
    image: Tensor
    text: Tensor
    audio: Tensor
    masks: Tensor


TENSORS = ("latents", "reference", "image", "text", "audio", "masks")
"""The tensors of an EncodedSample."""


@dataclass(frozen=True)
class Batch:
    """Encoded samples of one bucket, stacked: text [B, text_length, E], zeros after each prompt's own tokens; the rest as in
    `EncodedSample` with B in front."""

    items: tuple[Item, ...]
    names: tuple[str, ...]
    latents: Tensor
    reference: Tensor
    image: Tensor
    text: Tensor
    audio: Tensor
    masks: Tensor

    @property
    def weights(self) -> Tensor:
        """[B], 1 for samples that count."""
        return self.latents.new_tensor([item.weight for item in self.items])


def stack(samples: Sequence[EncodedSample], text_length: int, device: torch.device) -> Batch:
    """A float32 batch on a device."""
    assert len({sample.item.bucket for sample in samples}) == 1, "a batch is of one bucket"

    def padded(text: Tensor) -> Tensor:
        return functional.pad(text, (0, 0, 0, text_length - len(text)))

    tensors = {name: [getattr(sample, name) for sample in samples] for name in TENSORS}
    tensors["text"] = [padded(text) for text in tensors["text"]]
    stacked = {name: torch.stack(values).to(device, torch.float32) for name, values in tensors.items()}
    return Batch(tuple(sample.item for sample in samples), tuple(sample.name for sample in samples), **stacked)

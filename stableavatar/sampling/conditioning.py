"""What a generation is conditioned on, encoded once, and its cut for one window and a list of guidance passes."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from stableavatar.geometry import MASK_CHANNELS
from stableavatar.models.dit import AudioFeatures, Conditions
from stableavatar.sampling.guidance import Audio, Pass, Text
from stableavatar.sampling.windows import Window


def reference_channels(latents: Tensor, known: int) -> Tensor:
    """The reference input of image-to-video: mask channels, then latents.

    Args:
        latents: encoded conditioning video [16, F, h, w].
        known: latent frames at the start that are given rather than to be generated.

    Returns:
        [20, F, h, w]; in the mask, a latent frame's four channels are its four pixel frames (the first one repeated).
    """
    mask = torch.zeros_like(latents[:1]).expand(MASK_CHANNELS, -1, -1, -1).clone()
    mask[:, :known] = 1
    return torch.cat([mask, latents])


@dataclass(frozen=True)
class Conditioning:
    """The encoded inputs of one generation, on the device that denoises.

    Attributes:
        text: for each prompt, [1, text_length, text_dim].
        image: [1, 257, image_dim].
        reference: [20, F, h, w] for a window of full length. The VAE is causal, so shorter windows take its first frames.
        encode_audio: features [1, Ta, A] of a window.
    """

    text: dict[Text, Tensor]
    image: Tensor
    reference: Tensor
    encode_audio: Callable[[Window], Tensor]
    _features: dict[Window, Tensor] = field(default_factory=dict)

    def audio(self, window: Window) -> Tensor:
        """Features of a window, encoded when first asked for."""
        if window not in self._features:
            self._features[window] = self.encode_audio(window)
        return self._features[window]

    def forget(self, window: Window) -> None:
        """Lets go of a window that is finished."""
        self._features.pop(window, None)

    def conditions(self, window: Window, passes: tuple[Pass, ...]) -> Conditions:
        """One batch row per pass."""
        features, rows = self.audio(window), len(passes)
        heard = features.new_tensor([p.audio is not Audio.NULL for p in passes]).view(-1, 1, 1)
        keep = features.new_tensor([p.audio is not Audio.DROPPED for p in passes])
        return Conditions(
            text=torch.cat([self.text[p.text] for p in passes]),
            image=self.image.expand(rows, -1, -1),
            reference=self.reference[:, : window.stop - window.start].expand(rows, -1, -1, -1, -1),
            audio=AudioFeatures(features * heard, keep),
        )

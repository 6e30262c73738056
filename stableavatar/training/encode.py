"""Samples through the frozen encoders: while training, or once for the latent cache."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from stableavatar.data.samples import EncodedSample, Sample
from stableavatar.encoders import encode_audio, encode_image, encode_text
from stableavatar.geometry import TEMPORAL_STRIDE, frames_to_latents
from stableavatar.media import from_pixels
from stableavatar.puppet.vae import VideoVAE

REMEMBERED = 256
"""Prompts whose text tokens are kept on the host; a data set has few."""


class SampleEncoder:
    """The frozen parts at work, one sample after another, so that a result does not depend on its neighbours.

    Args:
        parts: the pipeline's components by name: vae, text_encoder, tokenizer, image_encoder, audio_encoder, audio_processor.
        text_length: tokens that a prompt is cut to.
        device: where they work.
        handover: each model visits the device for its part of a list; otherwise it stays there from its first use.
    """

    def __init__(self, parts: Mapping[str, Any], text_length: int, device: torch.device, handover: bool = False) -> None:
        self.parts, self.text_length, self.device, self.handover = dict(parts), text_length, device, handover
        self._texts: dict[str, Tensor] = {}

    @torch.no_grad()
    def encode(self, samples: Sequence[Sample]) -> list[EncodedSample]:
        """Encoded samples on the device: what VAE and wav2vec2 give in float32, text and image in their encoders' precision."""
        with self._on_device("vae") as vae:
            videos = [self._encode_video(vae, sample.pixels) for sample in samples]
        texts = self._encode_prompts([sample.prompt for sample in samples])
        with self._on_device("image_encoder") as model:
            images = [encode_image(model, self._frames(sample.pixels[:1])[None, :, 0], self.device)[0] for sample in samples]
        with self._on_device("audio_encoder") as model:
            processor = self.parts["audio_processor"]
            sounds = [encode_audio(model, processor, sample.waveform, self.device)[0].float() for sample in samples]
        return [
            EncodedSample(sample.item, sample.name, *video, image, text, audio, sample.masks.to(self.device))
            for sample, video, image, text, audio in zip(samples, videos, images, texts, sounds, strict=True)
        ]

    @contextmanager
    def resident(self) -> Iterator[None]:
        """Within it all models are on the device; after it where they belong."""
        for part in self.parts.values():
            if isinstance(part, nn.Module):
                part.to(self.device)
        try:
            yield
        finally:
            if self.handover:
                self.release()

    def release(self) -> None:
        """Moves every model to the host; the next samples bring back what they need."""
        for part in self.parts.values():
            if isinstance(part, nn.Module):
                part.to("cpu")

    @contextmanager
    def _on_device(self, name: str) -> Iterator[Any]:
        model = self.parts[name].to(self.device)
        try:
            yield model
        finally:
            if self.handover:
                model.to("cpu")

    def _frames(self, pixels: Tensor) -> Tensor:
        """uint8 [n, H, W, 3] -> [3, n, H, W] in [-1, 1] on the device."""
        return from_pixels(pixels.to(self.device)).permute(3, 0, 1, 2)

    def _encode_video(self, vae: VideoVAE, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Latents of all frames, and of the first one as the reference; only a few frames at a time are floats."""
        latents = torch.cat(list(vae.encode_stream(map(self._frames, pixels.split(TEMPORAL_STRIDE)))), dim=1)
        return latents, vae.encode_reference(self._frames(pixels[:1]), frames_to_latents(len(pixels)))

    def _encode_prompts(self, prompts: list[str]) -> list[Tensor]:
        """Each prompt's own tokens [K, E]."""
        if new := [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._texts]:
            with self._on_device("text_encoder") as model:
                self._texts |= {prompt: self._encode_prompt(model, prompt).cpu() for prompt in new}
        texts = [self._texts[prompt].to(self.device) for prompt in prompts]
        for prompt in list(self._texts)[:-REMEMBERED]:
            del self._texts[prompt]
        return texts

    def _encode_prompt(self, model: nn.Module, prompt: str) -> Tensor:
        text = encode_text(model, self.parts["tokenizer"], [prompt], self.text_length, self.device)[0]
        return text[: int(text.any(dim=1).nonzero().max()) + 1]

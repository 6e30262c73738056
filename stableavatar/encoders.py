"""Text, image and audio encoders: three functions around the libraries' models, each run once per generation or window.

They run without gradients and return the model's dtype. `device` is where to run: a model that is offloaded is not there yet
(default: where its weights are).
"""

import html
import re

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin, UMT5EncoderModel, Wav2Vec2Model

from stableavatar.geometry import SAMPLE_RATE, TEXT_LENGTH

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
"""Of the pixels in [0, 1] that CLIP was trained on (OpenAI's published values)."""


def clean_prompt(prompt: str) -> str:
    """Wan's whitespace cleaning: HTML entities resolved (twice, for doubly escaped ones), runs of whitespace to one space."""
    return re.sub(r"\s+", " ", html.unescape(html.unescape(prompt))).strip()


@torch.no_grad()
def encode_text(
    model: UMT5EncoderModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    length: int = TEXT_LENGTH,
    device: torch.device | None = None,
) -> Tensor:
    """Text features, zeros after each prompt's own tokens.

    Args:
        prompts: n of them, each cut to `length` tokens.

    Returns:
        [n, length, dim]
    """
    cleaned = [clean_prompt(prompt) for prompt in prompts]
    tokens = tokenizer(cleaned, padding=True, truncation=True, max_length=length, return_tensors="pt").to(device or model.device)
    mask = tokens.attention_mask
    hidden = model(input_ids=tokens.input_ids, attention_mask=mask).last_hidden_state
    return functional.pad(hidden * mask.unsqueeze(2).to(hidden), (0, 0, 0, length - hidden.shape[1]))


@torch.no_grad()
def encode_image(model: PreTrainedModel, images: Tensor, device: torch.device | None = None) -> Tensor:
    """CLIP's hidden states before the last block.

    Args:
        model: CLIPVisionModel, with or without projection.
        images: [B, 3, H, W] in [-1, 1], any size.

    Returns:
        [B, 257, dim]
    """
    size = (model.config.image_size,) * 2
    images = images.to(device or model.device, torch.float32)
    pixels = functional.interpolate(images, size, mode="bicubic", align_corners=False) / 2 + 0.5
    return encode_pixels(model, (pixels - pixels.new_tensor(CLIP_MEAN).view(3, 1, 1)) / pixels.new_tensor(CLIP_STD).view(3, 1, 1))


@torch.no_grad()
def encode_pixels(model: PreTrainedModel, pixels: Tensor) -> Tensor:
    """As `encode_image`, for pixels that have CLIP's size [B, 3, 224, 224] and are normalised by its mean and std."""
    return model(pixel_values=pixels, output_hidden_states=True).hidden_states[-2]


@torch.no_grad()
def encode_audio(
    model: Wav2Vec2Model, processor: ProcessorMixin, waveform: np.ndarray, device: torch.device | None = None
) -> Tensor:
    """wav2vec2's last hidden state of one segment, scaled to zero mean and unit variance by the processor.

    Args:
        waveform: 16 kHz mono float32 [samples].

    Returns:
        [1, Ta, dim], about 50 tokens a second
    """
    inputs = processor(waveform, sampling_rate=SAMPLE_RATE, return_tensors="pt").input_values
    return model(inputs.to(device or model.device, model.dtype)).last_hidden_state

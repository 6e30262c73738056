"""The puppet pipeline's frozen encoders of text and images: small, random from a seed, spread so that features tell things apart.

A random network passes on what it is given, but with the libraries' initial values its tokens do not say where they are: an average
of tokens, which is what cross-attention reads, then mixes up whose colour is whose. Two scales are therefore larger. Text: biases of
the relative positions, so that each head looks at a few fixed neighbours and a token stands for its word. Images: position embeddings.
"""

from typing import Any

import torch
from torch import nn
from transformers import ByT5Tokenizer, CLIPVisionConfig, CLIPVisionModelWithProjection, UMT5Config, UMT5EncoderModel

from stableavatar.geometry import IMAGE_SIZE

__all__ = ["IMAGE_DIM", "TEXT_DIM", "frozen_parts"]

TEXT_DIM, IMAGE_DIM = 64, 64
TEXT_POSITION_STD = 4.0
"""Of the relative positions' biases, logits of the attention."""
IMAGE_POSITION_STD = 0.5
"""Of the position embeddings; the patch embeddings' is 0.5."""


def frozen_parts(seed: int = 0) -> dict[str, Any]:
    """`text_encoder`, `tokenizer` and `image_encoder` of `StableAvatarPipeline`, in float32; the same weights for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text, image = _text_encoder(), _image_encoder()
    return {
        "text_encoder": text.eval().requires_grad_(False),
        "tokenizer": ByT5Tokenizer(),
        "image_encoder": image.eval().requires_grad_(False),
    }


def _text_encoder() -> UMT5EncoderModel:
    config = UMT5Config(vocab_size=384, d_model=TEXT_DIM, d_kv=16, d_ff=2 * TEXT_DIM, num_layers=1, num_heads=4)
    model = UMT5EncoderModel(config)
    for block in model.encoder.block:
        nn.init.normal_(block.layer[0].SelfAttention.relative_attention_bias.weight, std=TEXT_POSITION_STD)
    return model


def _image_encoder() -> CLIPVisionModelWithProjection:
    config = CLIPVisionConfig(
        hidden_size=IMAGE_DIM, intermediate_size=2 * IMAGE_DIM, projection_dim=16, num_hidden_layers=2, num_attention_heads=4,
        image_size=IMAGE_SIZE, patch_size=14,
    )  # fmt: skip
    model = CLIPVisionModelWithProjection(config)
    nn.init.normal_(model.vision_model.embeddings.position_embedding.weight, std=IMAGE_POSITION_STD)
    return model

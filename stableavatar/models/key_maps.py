"""Names of the released checkpoints: where each of our tensors lives in the released file, and what its shapes tell.

Ours are the module names of AvatarTransformer, of diffusers' AutoencoderKLWan, and of transformers' UMT5EncoderModel and
CLIPVisionModelWithProjection (whose projection keeps the released `head`, which conditioning itself does not use).
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import singledispatch
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor, nn
from transformers import CLIPVisionModelWithProjection, UMT5EncoderModel

from stableavatar.geometry import PATCH
from stableavatar.models.checkpoint_files import Checkpoint
from stableavatar.models.dit import AvatarTransformer

Config = dict[str, Any]
Rules = tuple[tuple[str, str], ...]

HEAD_DIM = 128
"""Width of an attention head in every published Wan transformer; shapes cannot tell it."""

CLIP_HEAD_DIM = 80
"""Width of an attention head in ViT-H/14."""

CLIP_PREFIX = "visual."
"""The released file also holds the text tower, which is no part of this project."""

AUDIO_HIDDEN_DIMS = {5120: (2048,)}
"""Inner width of the audio projection by transformer width, for a base file that has none; () for other widths."""

AUDIO_TENSOR = re.compile(r"vocal_projector\.|.*\.[kv]_vocal\.")
"""Released names that a StableAvatar file has and a plain Wan transformer has not."""

TRANSFORMER_RULES: Rules = (
    (r"^audio_adapter\.head\.head\.", "vocal_projector.final_head.final_proj."),
    (r"^audio_adapter\.head\.", "vocal_projector.final_head."),
    (r"^audio_adapter\.", "vocal_projector."),
    (r"\.([kv])_audio\.", r".\1_vocal."),
)
ONE_STAGE = ("proj", "norm")
TWO_STAGES = ("proj_1", "norm_1", "proj_2", "norm_2")

TEXT_RULES: Rules = (
    (r"^shared\.", "token_embedding."),
    (r"^encoder\.final_layer_norm\.", "norm."),
    (r"^encoder\.block\.", "blocks."),
    (r"\.layer\.0\.SelfAttention\.relative_attention_bias\.", ".pos_embedding.embedding."),
    (r"\.layer\.0\.SelfAttention\.", ".attn."),
    (r"\.layer\.0\.layer_norm\.", ".norm1."),
    (r"\.layer\.1\.layer_norm\.", ".norm2."),
    (r"\.layer\.1\.DenseReluDense\.wi_0\.", ".ffn.gate.0."),
    (r"\.layer\.1\.DenseReluDense\.wi_1\.", ".ffn.fc1."),
    (r"\.layer\.1\.DenseReluDense\.wo\.", ".ffn.fc2."),
)

IMAGE_RULES: Rules = (
    (r"^vision_model\.", ""),
    (r"^embeddings\.", ""),
    (r"^class_embedding$", "cls_embedding"),
    (r"^position_embedding\.weight$", "pos_embedding"),
    (r"^pre_layrnorm\.", "pre_norm."),
    (r"^post_layernorm\.", "post_norm."),
    (r"^visual_projection\.weight$", "head"),
    (r"^encoder\.layers\.", "transformer."),
    (r"\.self_attn\.out_proj\.", ".attn.proj."),
    (r"\.self_attn\.[qkv]_proj\.", ".attn.to_qkv."),
    (r"\.layer_norm([12])\.", r".norm\1."),
    (r"\.mlp\.fc1\.", ".mlp.0."),
    (r"\.mlp\.fc2\.", ".mlp.2."),
)

VAE_RULES: Rules = (
    (r"^quant_conv\.", "conv1."),
    (r"^post_quant_conv\.", "conv2."),
    (r"\.conv_in\.", ".conv1."),
    (r"\.norm_out\.", ".head.0."),
    (r"\.conv_out\.", ".head.2."),
    (r"\.mid_block\.attentions\.0\.", ".middle.1."),
    (r"\.mid_block\.resnets\.0\.", ".middle.0."),
    (r"\.mid_block\.resnets\.1\.", ".middle.2."),
    (r"^encoder\.down_blocks\.", "encoder.downsamples."),
    (r"(middle\.[02]|samples\.\d+)\.norm1\.", r"\1.residual.0."),
    (r"(middle\.[02]|samples\.\d+)\.conv1\.", r"\1.residual.2."),
    (r"(middle\.[02]|samples\.\d+)\.norm2\.", r"\1.residual.3."),
    (r"(middle\.[02]|samples\.\d+)\.conv2\.", r"\1.residual.6."),
    (r"\.conv_shortcut\.", ".shortcut."),
)


@dataclass(frozen=True)
class Source:
    """Where one of our tensors lives in the released file.

    Attributes:
        name: the released name.
        part, parts: ours is this one of `parts` equal pieces along the first axis.
        squeeze: leading axes of size one that only the released tensor has.
        transpose: released as the transpose.
    """

    name: str
    part: int = 0
    parts: int = 1
    squeeze: int = 0
    transpose: bool = False

    def ours(self, released: Tensor) -> Tensor:
        """Our tensor, a view of the released one."""
        tensor = released.flatten(0, self.squeeze).chunk(self.parts)[self.part]
        return tensor.T if self.transpose else tensor

    def released(self, pieces: list[Tensor]) -> Tensor:
        """The released tensor from ours (all parts of it, in order)."""
        tensor = torch.cat(pieces) if len(pieces) > 1 else pieces[0]
        return (tensor.T if self.transpose else tensor)[(None,) * self.squeeze]


def rename(name: str, rules: Rules) -> str:
    """Applies regular expression replacements one after another."""
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


@singledispatch
def released_sources(model: nn.Module) -> dict[str, Source]:
    """Our parameter name -> its place in the released file, for every parameter of a model of one of the four kinds."""
    raise TypeError(f"{type(model).__name__} has no released form")


def _sources(model: nn.Module, source: Callable[[str], Source]) -> dict[str, Source]:
    return {name: source(name) for name, _ in model.named_parameters()}


@released_sources.register
def _(model: AvatarTransformer) -> dict[str, Source]:
    stages = TWO_STAGES if model.config.audio_hidden_dims else ONE_STAGE
    projection = tuple(
        (rf"^audio_adapter\.projection\.{index}\.", f"vocal_projector.proj_model.{stage}.") for index, stage in enumerate(stages)
    )
    return _sources(model, lambda name: Source(rename(name, projection + TRANSFORMER_RULES)))


@released_sources.register
def _(model: UMT5EncoderModel) -> dict[str, Source]:
    return _sources(model, lambda name: Source(rename(name, TEXT_RULES)))


@released_sources.register
def _(model: CLIPVisionModelWithProjection) -> dict[str, Source]:
    def source(name: str) -> Source:
        fused = re.search(r"\.([qkv])_proj\.", name)
        part, parts = ("qkv".index(fused[1]), 3) if fused else (0, 1)
        squeeze = 2 if name.endswith("class_embedding") else int("position_embedding" in name)
        return Source(rename(name, IMAGE_RULES), part, parts, squeeze, transpose=name == "visual_projection.weight")

    return _sources(model, source)


@released_sources.register
def _(model: AutoencoderKLWan) -> dict[str, Source]:
    residuals = model.config.num_res_blocks + 1  # the decoder has one more per level than the encoder

    def flat(match: re.Match) -> str:
        """Levels of residual blocks and one upsampler each, numbered through as the released decoder does."""
        level, kind, index = int(match[1]), match[2], int(match[3])
        return f"decoder.upsamples.{level * (residuals + 1) + (index if kind == 'resnets' else residuals)}."

    def source(name: str) -> Source:
        return Source(rename(re.sub(r"^decoder\.up_blocks\.(\d+)\.(resnets|upsamplers)\.(\d+)\.", flat, name), VAE_RULES))

    return _sources(model, source)


def transformer_config(file: Checkpoint) -> Config:
    """AvatarTransformer's settings as far as shapes tell; heads by the published head width."""
    dim, in_channels = file.shape("patch_embedding.weight", 5)[:2]
    return {
        "dim": dim,
        "in_channels": in_channels,
        "num_heads": max(1, dim // HEAD_DIM),
        "num_layers": file.count("blocks.{}.modulation"),
        "ffn_dim": file.shape("blocks.0.ffn.0.weight", 2)[0],
        "freq_dim": file.shape("time_embedding.0.weight", 2)[1],
        "out_channels": file.shape("head.head.weight", 2)[0] // PATCH**2,
        "text_dim": file.shape("text_embedding.0.weight", 2)[1],
        "image_dim": file.shape("img_emb.proj.1.weight", 2)[1],
        **_audio_config(file, dim),
    }


def _audio_config(file: Checkpoint, dim: int) -> Config:
    if not any(AUDIO_TENSOR.match(name) for name in file.shapes):
        return {"audio_hidden_dims": AUDIO_HIDDEN_DIMS.get(dim, ())}
    layers = {"adapter_layers": file.count("vocal_projector.blocks.{}.modulation")}
    if "vocal_projector.proj_model.proj_1.weight" in file.shapes:
        hidden, audio_dim = file.shape("vocal_projector.proj_model.proj_1.weight", 2)
        return {"audio_dim": audio_dim, "audio_hidden_dims": (hidden,), **layers}
    return {"audio_dim": file.shape("vocal_projector.proj_model.proj.weight", 2)[1], "audio_hidden_dims": (), **layers}


def text_config(file: Checkpoint) -> Config:
    """UMT5Config's settings from shapes."""
    vocabulary, dim = file.shape("token_embedding.weight", 2)
    buckets, heads = file.shape("blocks.0.pos_embedding.embedding.weight", 2)
    return {
        "vocab_size": vocabulary,
        "d_model": dim,
        "d_kv": file.shape("blocks.0.attn.q.weight", 2)[0] // heads,
        "d_ff": file.shape("blocks.0.ffn.fc1.weight", 2)[0],
        "num_heads": heads,
        "num_layers": file.count("blocks.{}.norm1.weight"),
        "relative_attention_num_buckets": buckets,
    }


def image_config(file: Checkpoint) -> Config:
    """CLIPVisionConfig's settings from shapes; heads by ViT-H/14's head width."""
    dim, channels, patch = file.shape("patch_embedding.weight", 4)[:3]
    return {
        "hidden_size": dim,
        "num_channels": channels,
        "patch_size": patch,
        "image_size": patch * round((file.shape("pos_embedding", 3)[1] - 1) ** 0.5),
        "intermediate_size": file.shape("transformer.0.mlp.0.weight", 2)[0],
        "projection_dim": file.shape("head", 2)[1],
        "num_hidden_layers": file.count("transformer.{}.norm1.weight"),
        "num_attention_heads": max(1, dim // CLIP_HEAD_DIM),
        "hidden_act": "gelu",
    }


def vae_config(file: Checkpoint) -> Config:
    """AutoencoderKLWan's settings from shapes: the encoder's residual blocks, level by level up to a resampling."""
    base, channels = file.shape("encoder.conv1.weight", 5)[:2]
    file.shape("encoder.downsamples.0.residual.6.weight", 5)
    widths, temporal, blocks, index = [], [], 0, 0
    while residual := file.shapes.get(f"encoder.downsamples.{index}.residual.6.weight"):
        resampling = f"encoder.downsamples.{index + 1}"
        blocks, index = blocks + 1, index + 1
        if f"{resampling}.residual.6.weight" not in file.shapes:
            widths.append(residual[0] // base)
            temporal.append(f"{resampling}.time_conv.weight" in file.shapes)
            index += 1
    return {
        "base_dim": base,
        "in_channels": channels,
        "out_channels": file.shape("decoder.head.2.weight", 5)[0],
        "z_dim": file.shape("conv2.weight", 5)[0],
        "dim_mult": widths,
        "num_res_blocks": blocks // max(1, len(widths)),
        "temperal_downsample": temporal[:-1],
    }

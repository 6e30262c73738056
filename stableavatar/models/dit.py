"""The diffusion transformer: Wan2.1 image-to-video blocks with an audio branch and the timestep-aware audio adapter.

Shapes: B batch, F latent frames, h x w latent height and width, S = h/2 * w/2 tokens per frame, D width,
Ta audio feature tokens, N audio tokens per latent frame.
"""

import math
from dataclasses import dataclass
from functools import partial

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.loaders import PeftAdapterMixin
from torch import Tensor, nn

from stableavatar.geometry import IMAGE_TOKENS, LATENT_CHANNELS, MASK_CHANNELS, PATCH, TEXT_LENGTH
from stableavatar.models import kernels
from stableavatar.models.attention import Attention, ConditionAttention, Context, SelfAttention
from stableavatar.models.audio_adapter import AudioAdapter
from stableavatar.models.cache import NO_CACHE, NoCache
from stableavatar.models.layout import TokenLayout
from stableavatar.models.modulation import Head, feed_forward, modulate
from stableavatar.models.rope import Rotary
from stableavatar.models.sequence import WHOLE_SEQUENCE, WholeSequence


@dataclass(frozen=True)
class AudioFeatures:
    """Audio as wav2vec features, to be refined by the adapter.

    Attributes:
        features: [B, Ta, A], covering exactly the window's pixel frames. Zeros are null audio; silence is encoded silence.
        keep: [B], 1 to use a sample's refined tokens and 0 to replace them by zeros ("dropped"); None keeps all.
    """

    features: Tensor
    keep: Tensor | None = None


@dataclass(frozen=True)
class AudioTokens:
    """Audio as already refined tokens [B, F, N, D] with the number of unpadded ones per frame [F]."""

    tokens: Tensor
    lengths: Tensor


@dataclass(frozen=True)
class Conditions:
    """All that the network is told beside the noisy latents.

    Attributes:
        text: [B, text_length, text_dim], zeros after each prompt's own tokens.
        image: [B, 257, image_dim].
        reference: [B, 4 + 16, F, h, w], mask channels then reference latents.
        audio: features or refined tokens.
    """

    text: Tensor
    image: Tensor
    reference: Tensor
    audio: AudioFeatures | AudioTokens


class TimeEmbedding(nn.Module):
    """Sinusoid (cosines first) of a timestep, in float32."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, timesteps: Tensor) -> Tensor:
        """[...] -> [..., dim]"""
        half = torch.arange(self.dim // 2, dtype=torch.float64, device=timesteps.device)
        angles = timesteps.double().unsqueeze(-1) * torch.exp(-math.log(10_000) * half / (self.dim // 2))
        return torch.cat([angles.cos(), angles.sin()], dim=-1).float()


class ImageEmbedding(nn.Module):
    """CLIP tokens to the model's width."""

    def __init__(self, image_dim: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            nn.LayerNorm(image_dim), nn.Linear(image_dim, image_dim), nn.GELU(), nn.Linear(image_dim, dim), nn.LayerNorm(dim)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, 257, image_dim] -> [B, 257, D]"""
        return self.proj(tokens)


class Block(nn.Module):
    """Self-attention and feed-forward under the timestep's modulation, with unmodulated cross-attention between."""

    def __init__(self, dim: int, heads: int, ffn_dim: int, eps: float, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.norm1, self.norm2 = (nn.LayerNorm(dim, eps, elementwise_affine=False) for _ in range(2))
        self.norm3 = nn.LayerNorm(dim, eps)
        self.self_attn = SelfAttention(dim, heads, eps)
        self.cross_attn = ConditionAttention(dim, heads, eps)
        self.ffn = feed_forward(dim, ffn_dim)
        self.modulation = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)

    def forward(
        self, x: Tensor, time_modulation: Tensor, context: Context, layout: TokenLayout, rotary: Rotary, cache: NoCache
    ) -> Tensor:
        """x [B, F, S, D], time_modulation [B, F or 1, 6, D] -> [B, F, S, D]"""
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = (
            (self.modulation + time_modulation).to(x.dtype).unsqueeze(3).unbind(2)
        )
        x = torch.addcmul(x, gate, self.self_attn(modulate(self.norm1(x), shift, scale), layout, rotary, cache, self.layer))
        x = x + self.cross_attn(self.norm3(x), context, layout)
        return torch.addcmul(x, ffn_gate, self.ffn(modulate(self.norm2(x), ffn_shift, ffn_scale)))


class AvatarTransformer(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """Predicts the velocity of noisy video latents from text, a reference image and audio.

    One class for every size; 1.3B and 14B differ in numbers and in the widths of the audio projection.

    Args:
        dim, num_heads, num_layers, ffn_dim: the transformer's width, heads, blocks and feed-forward width.
        freq_dim: size of the timestep's sinusoid.
        in_channels, out_channels: noisy latent + mask + reference latent; velocity.
        text_dim, text_length, image_dim, audio_dim: widths of the encoders' outputs, text tokens per prompt.
        audio_hidden_dims: widths between the audio features and `dim` ((2048,) for 14B).
        adapter: the adapter of the paper ("full") or an ablation of tables 2 and 3 (`audio_adapter.VARIANTS`).
        adapter_heads, adapter_layers: size of the adapter.
        audio_positions: tell audio tokens their place in the slice of their frame (`audio_adapter.slot_embedding`); neither the paper nor
            the released model does. A model that trains for hours, not weeks, hears the order of sounds only so.
        mask_audio_padding: hide the zero tokens that pad audio slices at the ends (the released model shows them).
        eps: of layer and RMS norms.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["Block", "AdapterBlock"]
    _repeated_blocks = ["Block"]
    _keep_in_fp32_modules = ["time_embedding", "time_projection", "modulation"]
    _skip_layerwise_casting_patterns = ["patch_embedding", "time_embedding", "time_projection", "modulation", "norm", "head"]

    @register_to_config
    def __init__(
        self,
        dim: int = 1536,
        num_heads: int = 12,
        num_layers: int = 30,
        ffn_dim: int = 8960,
        freq_dim: int = 256,
        in_channels: int = 2 * LATENT_CHANNELS + MASK_CHANNELS,
        out_channels: int = LATENT_CHANNELS,
        text_dim: int = 4096,
        text_length: int = TEXT_LENGTH,
        image_dim: int = 1280,
        audio_dim: int = 768,
        audio_hidden_dims: tuple[int, ...] = (),
        adapter: str = "full",
        adapter_heads: int = 8,
        adapter_layers: int = 2,
        audio_positions: bool = False,
        mask_audio_padding: bool = False,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        if dim % num_heads or (dim // num_heads) % 2 or dim % adapter_heads:
            raise ValueError(f"width {dim} must split into {num_heads} heads of even size and {adapter_heads} adapter heads")
        self.patch_embedding = nn.Conv3d(in_channels, dim, kernel_size=(1, PATCH, PATCH), stride=(1, PATCH, PATCH))
        self.text_embedding = nn.Sequential(nn.Linear(text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim))
        self.time_sinusoid = TimeEmbedding(freq_dim)
        self.time_embedding = nn.Sequential(nn.Linear(freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.img_emb = ImageEmbedding(image_dim, dim)
        self.audio_adapter = AudioAdapter(
            audio_dim, tuple(audio_hidden_dims), dim, adapter_heads, adapter_layers, eps, adapter
        )
        self.audio_adapter.ordered = audio_positions
        self.blocks = nn.ModuleList(Block(dim, num_heads, ffn_dim, eps, layer) for layer in range(num_layers))
        self.head = Head(dim, PATCH * PATCH * out_channels, eps)
        self.sequence: WholeSequence = WHOLE_SEQUENCE
        self.gradient_checkpointing = False
        self.init_audio_branches()

    def init_audio_branches(self) -> None:
        """Zeros the blocks' audio keys and values, so that a fresh model equals plain Wan image-to-video."""
        for block in self.blocks:
            for linear in (block.cross_attn.k_audio, block.cross_attn.v_audio):
                nn.init.zeros_(linear.weight)
                nn.init.zeros_(linear.bias)

    def set_attention_backend(self, backend: str) -> None:
        """Runs attention on one of the library's backends by name; heads over 256 wide stay on the native one.

        Raises:
            ValueError: unknown (`kernels.check_backend` tells whether one runs on a device).
        """
        attend = partial(kernels.attend, backend=kernels.prepared_backend(backend))
        for module in self.modules():
            if isinstance(module, Attention) and module.head_dim <= kernels.MAX_FLASH_HEAD_DIM:
                module.attend = attend

    def forward(
        self,
        latents: Tensor,
        timesteps: Tensor,
        conditions: Conditions,
        layout: TokenLayout,
        cache: NoCache = NO_CACHE,
    ) -> Tensor:
        """The velocity of noisy latents.

        Args:
            latents: [B, 16, F, h, w], h and w even.
            timesteps: [B], or [B, F] with one per latent frame, in 0..1000 (a clean frame is 0).
            conditions: see `Conditions`.
            layout: positions and attention plan of the F latent frames.
            cache: keys and values of earlier frames.

        Returns:
            [B, 16, F, h, w]
        """
        grid = (latents.shape[3] // PATCH, latents.shape[4] // PATCH)
        x = self.embed_patches(latents, conditions.reference)
        embedding, time_modulation = self.embed_time(timesteps)
        context = self.embed_conditions(conditions, x, embedding, time_modulation)
        rotary = Rotary.at(layout.positions, grid, self.config.dim // self.config.num_heads, x.device)
        x, layout, rotary = self.sequence.shard(x, layout, rotary)
        for block in self.blocks:
            run = partial(self._gradient_checkpointing_func, block) if self._checkpoints() else block
            x = run(x, time_modulation, context, layout, rotary, cache)
        return self.unpatchify(self.sequence.gather(self.head(x, embedding), layout), grid)

    def _checkpoints(self) -> bool:
        return self.gradient_checkpointing and torch.is_grad_enabled()

    def embed_patches(self, latents: Tensor, reference: Tensor) -> Tensor:
        """Noisy latents and reference channels to tokens [B, F, S, D]."""
        pixels = torch.cat([latents, reference], dim=1).to(self.patch_embedding.weight.dtype)
        return self.patch_embedding(pixels).flatten(3).permute(0, 2, 3, 1).contiguous()

    def embed_time(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Timesteps [B] or [B, F] to e [B, 1 or F, D] and e0 [B, 1 or F, 6, D], in float32."""
        per_frame = timesteps if timesteps.ndim == 2 else timesteps.unsqueeze(1)
        with torch.autocast(timesteps.device.type, enabled=False):
            sinusoid = self.time_sinusoid(per_frame).to(self.time_embedding[0].weight.dtype)
            embedding = self.time_embedding(sinusoid)
            return embedding.float(), self.time_projection(embedding).unflatten(-1, (6, -1)).float()

    def embed_conditions(self, conditions: Conditions, patches: Tensor, embedding: Tensor, time_modulation: Tensor) -> Context:
        """Conditions to the model's width; audio features are refined on the way."""
        dtype = patches.dtype
        text, image = self.text_embedding(conditions.text.to(dtype)), self.img_emb(conditions.image.to(dtype))
        assert image.shape[1] == IMAGE_TOKENS, f"expected {IMAGE_TOKENS} image tokens, got {image.shape[1]}"
        audio = conditions.audio
        if isinstance(audio, AudioFeatures):
            audio = self.refine_audio(audio, patches, embedding, time_modulation)
        mask = None
        if self.config.mask_audio_padding:
            mask = torch.arange(audio.tokens.shape[2], device=patches.device) < audio.lengths.to(patches.device).unsqueeze(1)
        return Context(text, image, audio.tokens.to(dtype), mask)

    def refine_audio(self, audio: AudioFeatures, patches: Tensor, embedding: Tensor, time_modulation: Tensor) -> AudioTokens:
        """The adapter's tokens for wav2vec features; dropped samples become zeros."""
        tokens, lengths = self.audio_adapter(audio.features.to(patches.dtype), patches, embedding, time_modulation)
        if audio.keep is not None:
            tokens = tokens * audio.keep.to(tokens.dtype).view(-1, 1, 1, 1)
        return AudioTokens(tokens, lengths)

    def unpatchify(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """[B, F, S, 2 * 2 * C] -> [B, C, F, h, w]"""
        height, width = grid
        x = x.unflatten(2, (height, width)).unflatten(-1, (PATCH, PATCH, -1))
        return x.permute(0, 6, 1, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4)

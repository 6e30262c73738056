"""The timestep-aware audio adapter (paper section 3.1, equations 1-4): audio tokens attend to the noisy latents.

Shapes: B batch, F latent frames, S latent tokens per frame, N audio tokens per frame, D width, A audio features.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from stableavatar.geometry import AUDIO_WIDENING, audio_slices, latents_to_frames
from stableavatar.models.attention import CrossAttention
from stableavatar.models.modulation import Head, feed_forward, modulate

VARIANTS = ("full", "none", "no_modulation", "random_modulation", "no_cross_attention")
"""The paper's adapter and the ablations of tables 2 and 3; `none` is the projection alone."""


def slice_frames(audio: Tensor, frames: int) -> tuple[Tensor, Tensor]:
    """One slice of feature tokens around each latent frame (eq. 1).

    Parts of a slice that lie outside the audio are zeros, all of them at the right end of the slice.

    Args:
        audio: [B, Ta, D], covering exactly the pixel frames of `frames` latent frames.

    Returns:
        tokens [B, F, N, D] and, on the host, the number of tokens that are audio in each slice [F].
    """
    total = audio.shape[1]
    spans = [
        (max(0, start - AUDIO_WIDENING), min(total, end + AUDIO_WIDENING + 1), end - start + 1 + 2 * AUDIO_WIDENING)
        for start, end in audio_slices(total, latents_to_frames(frames))
    ]
    slices = [functional.pad(audio[:, start:stop], (0, 0, 0, width - max(0, stop - start))) for start, stop, width in spans]
    return torch.stack(slices, dim=1), torch.tensor([max(0, stop - start) for start, stop, _ in spans])


def slot_embedding(total: int, frames: int, slots: int, dim: int) -> Tensor:
    """Where the tokens of each slice stand in it: sines and cosines [frames, slots, dim] of their numbers, with periods from 2 to 64.

    A slice that lacks its first tokens, being at the start of the audio, begins with the number of the first one that it has.

    Args:
        total: tokens of the audio; slots: of a slice.
    """
    missing = [max(0, AUDIO_WIDENING - start) for start, _ in audio_slices(total, latents_to_frames(frames))]
    numbers = torch.tensor(missing).unsqueeze(1) + torch.arange(slots)
    angles = 2 * torch.pi * numbers.unsqueeze(2) / torch.logspace(1, 6, dim // 2, base=2)
    return torch.cat([angles.sin(), angles.cos()], dim=2)


def _fix_modulation(module: nn.Module, values: tuple[int, ...]) -> None:
    """Replaces a learned modulation by constants, one per (shift, scale, gate) vector."""
    dim = module.modulation.shape[-1]
    del module.modulation
    module.register_buffer("modulation", torch.tensor(values).float().view(1, -1, 1).repeat(1, 1, dim), persistent=False)


class AdapterBlock(nn.Module):
    """Affine modulation, cross-attention to the frame's latent tokens, modulated feed-forward (eqs. 2 and 3)."""

    def __init__(self, dim: int, heads: int, eps: float, variant: str) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(dim, eps, elementwise_affine=False) for _ in range(2))
        if variant != "no_cross_attention":
            self.norm3 = nn.LayerNorm(dim, eps)
            self.cross_attn = CrossAttention(dim, heads, eps)
        self.ffn = feed_forward(dim, 2 * dim)
        self.modulation = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)
        if variant == "no_modulation":  # a plain transformer block: no first affine step, an open gate at the second
            _fix_modulation(self, (0, 0, 0, 0, 0, 1))

    def forward(self, tokens: Tensor, patches: Tensor, time_modulation: Tensor) -> Tensor:
        """tokens [B, F, N, D], patches [B, F, S, D], time_modulation [B, F or 1, 6, D] -> [B, F, N, D]"""
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = (
            (self.modulation + time_modulation).to(tokens.dtype).unsqueeze(3).unbind(2)
        )
        tokens = torch.addcmul(tokens, gate, modulate(self.norm1(tokens), shift, scale))
        if hasattr(self, "cross_attn"):
            attended = self.cross_attn(self.norm3(tokens).flatten(0, 1), patches.flatten(0, 1))
            tokens = tokens + attended.view_as(tokens)
        return torch.addcmul(tokens, ffn_gate, self.ffn(modulate(self.norm2(tokens), ffn_shift, ffn_scale)))


class AudioAdapter(nn.Module):
    """Projection to the DiT's width, slices per latent frame, adapter blocks, modulated output head (eq. 4).

    Attributes:
        ordered: tokens are told their place in the slice; attention alone, as in the paper, does not see in which order they come.
    """

    def __init__(self, audio_dim: int, hidden_dims: tuple[int, ...], dim: int, heads: int, layers: int, eps: float, variant: str):
        super().__init__()
        self.ordered = False
        if variant not in VARIANTS:
            raise ValueError(f"adapter '{variant}' is unknown; expected one of {', '.join(VARIANTS)}")
        widths = (audio_dim, *hidden_dims, dim)
        pairs = zip(widths[:-1], widths[1:], strict=True)
        self.projection = nn.Sequential(*(m for i, o in pairs for m in (nn.Linear(i, o, bias=False), nn.LayerNorm(o))))
        self.time_aware = variant in ("full", "no_cross_attention")
        layers = 0 if variant == "none" else layers
        self.blocks = nn.ModuleList(AdapterBlock(dim, heads, eps, variant) for _ in range(layers))
        self.head = Head(dim, dim, eps) if layers else None
        if variant == "no_modulation":
            _fix_modulation(self.head, (0, 0))

    def forward(self, features: Tensor, patches: Tensor, embedding: Tensor, time_modulation: Tensor) -> tuple[Tensor, Tensor]:
        """Refines the audio of a window in the light of its noisy latents and timesteps.

        Args:
            features: wav2vec features [B, Ta, A] of exactly the window's pixel frames.
            patches: embedded noisy latents [B, F, S, D].
            embedding, time_modulation: the DiT's own e [B, F or 1, D] and e0 [B, F or 1, 6, D].

        Returns:
            refined tokens [B, F, N, D] and the number of unpadded ones per frame [F].
        """
        tokens, lengths = slice_frames(self.projection(features), patches.shape[1])
        if self.ordered:
            tokens = tokens + slot_embedding(features.shape[1], *tokens.shape[1:]).to(tokens)
        if not self.time_aware:
            embedding, time_modulation = torch.zeros_like(embedding), torch.zeros_like(time_modulation)
        for block in self.blocks:
            tokens = block(tokens, patches, time_modulation)
        return (self.head(tokens, embedding) if self.head else tokens), lengths

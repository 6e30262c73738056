"""Pieces that the network's blocks and the audio adapter share: affine modulation, feed-forward, output head."""

import torch
from torch import Tensor, nn


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x * (1 + scale) + shift, for x [B, F, L, D] and shift, scale [B, F or 1, 1, D]."""
    return torch.addcmul(shift, x, 1 + scale)


def feed_forward(dim: int, hidden: int) -> nn.Sequential:
    """Linear, GELU (tanh), Linear."""
    return nn.Sequential(nn.Linear(dim, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, dim))


class Head(nn.Module):
    """Linear(LN(x) * (1 + scale) + shift), shift and scale from a learned modulation plus the time embedding."""

    def __init__(self, dim: int, out_dim: int, eps: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps, elementwise_affine=False)
        self.head = nn.Linear(dim, out_dim)
        self.modulation = nn.Parameter(torch.randn(1, 2, dim) / dim**0.5)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """x [B, F, L, D], embedding [B, F or 1, D] -> [B, F, L, out]"""
        shift, scale = (self.modulation + embedding.unsqueeze(2)).to(x.dtype).unsqueeze(3).unbind(2)
        return self.head(modulate(self.norm(x), shift, scale))

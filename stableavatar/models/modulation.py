"""Pieces that the network's blocks and the audio adapter share: norm, affine modulation, feed-forward, output head."""

import torch
from torch import Tensor, nn


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x * (1 + scale) + shift, for x [B, F, L, D] and shift, scale [B, F or 1, 1, D]."""
    return torch.addcmul(shift, x, 1 + scale)


class RMSNorm(nn.RMSNorm):
    """The library's RMS norm; on the CPU, where that one copies its input to float32, only the reduction is in float32."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]"""
        if x.device.type != "cpu":
            return super().forward(x)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        return x * (norm.square() / x.shape[-1] + self.eps).rsqrt().to(x.dtype) * self.weight


class GELU(nn.GELU):
    """GELU (tanh) that overwrites its input where no gradient needs it: the hidden activation is the largest tensor there is."""

    def __init__(self) -> None:
        super().__init__(approximate="tanh")

    def forward(self, x: Tensor) -> Tensor:
        """Any shape, kept."""
        return super().forward(x) if x.requires_grad else torch.ops.aten.gelu_(x, approximate=self.approximate)


def feed_forward(dim: int, hidden: int) -> nn.Sequential:
    """Linear, GELU (tanh), Linear."""
    return nn.Sequential(nn.Linear(dim, hidden), GELU(), nn.Linear(hidden, dim))


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

"""Three-dimensional rotary position embedding of Wan: interleaved pairs, theta 10000, from explicit positions."""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

THETA = 10_000.0
Positions = tuple[float, ...]


def _angles(positions: Tensor, dim: int) -> Tensor:
    """Angles [n, dim / 2] of one axis, in float64."""
    frequencies = THETA ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    return torch.outer(positions.double(), frequencies)


@lru_cache(maxsize=16)
def rotary_table(positions: Positions, grid: tuple[int, int], head_dim: int, device: torch.device) -> Tensor:
    """Unit complex numbers [F * H * W, 1, head_dim / 2] that rotate a head's pairs.

    Of a head's d dims, height and width take 2 * (d // 6) each and time the rest.

    Args:
        positions: temporal position of each latent frame.
        grid: tokens per frame, (height, width).
    """
    height, width = grid
    side = 2 * (head_dim // 6)
    time = _angles(torch.tensor(positions), head_dim - 2 * side)
    rows, columns = _angles(torch.arange(height), side), _angles(torch.arange(width), side)
    shape = (len(positions), height, width, -1)
    angles = torch.cat(
        [time[:, None, None].expand(shape), rows[None, :, None].expand(shape), columns[None, None].expand(shape)], dim=-1
    )
    table = torch.polar(torch.ones_like(angles), angles).flatten(0, 2).unsqueeze(1)
    return table.to(device=device, dtype=torch.complex64)


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Rotates the interleaved pairs of x [B, L, heads, d] by a table [L, 1, d / 2], in float32."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * table).flatten(-2).to(x.dtype)


@dataclass(frozen=True)
class Rotary:
    """The rotation of one forward: the table of its own frames, and those of other frames on the same grid."""

    positions: Positions
    grid: tuple[int, int]
    head_dim: int
    table: Tensor

    @classmethod
    def at(cls, positions: Positions, grid: tuple[int, int], head_dim: int, device: torch.device) -> "Rotary":
        """For frames at `positions`; the arguments are those of `rotary_table`."""
        return cls(positions, grid, head_dim, rotary_table(positions, grid, head_dim, device))

    def table_at(self, positions: Positions) -> Tensor:
        """The table of frames at other positions on the same grid, such as those whose keys a cache holds."""
        return rotary_table(positions, self.grid, self.head_dim, self.table.device)

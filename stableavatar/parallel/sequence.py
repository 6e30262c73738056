"""Sequence parallelism: the tokens of one forward are shared out over processes, and the result is that of one process.

The split is inside every latent frame: process r of P computes S // P of a frame's S tokens, and one more if r < S % P, of every
frame. So all of them have all frames: what belongs to a frame (its timestep, its audio, the rectangles of the attention plan)
meets the same tokens as in one process, whatever S and P are, and every process has the same work under any plan. The patch and
time embedding, the conditions and the audio adapter run whole on every process; self-attention alone needs the others.

Gradients: each process computes the whole loss, and the boundary's backward sends nothing: `gather` takes the gradient of the
process's own tokens. So a process's gradients are its tokens' share, and their sum over the group is the whole gradient, for every weight.

Shapes: B batch, F latent frames, S tokens per frame, S_r those of process r, H heads, d width of a head, D = H * d.
"""

from dataclasses import dataclass
from functools import lru_cache, partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from stableavatar.models.dit import AvatarTransformer
from stableavatar.models.kernels import Attend
from stableavatar.models.layout import Plan, TokenLayout, in_tokens
from stableavatar.models.rope import Positions, Rotary, rotary_table
from stableavatar.models.sequence import WholeSequence
from stableavatar.parallel.mesh import SEQUENCE, Mesh
from stableavatar.parallel.ring import attend_around
from stableavatar.parallel.traffic import count
from stableavatar.parallel.ulysses import attend_by_heads, split_sizes


class SharedPlan(NamedTuple):
    """The attention plan of a sequence that is shared out.

    Attributes:
        frames: the rectangles, in latent frames.
        tokens: S, of a whole frame.
    """

    frames: Plan
    tokens: int


@dataclass(frozen=True)
class SharedLayout(TokenLayout):
    """A layout whose forward computes some of each frame's tokens; tells `attend` how many there are in all."""

    tokens: int = 0

    def token_plan(self, tokens_per_frame: int) -> SharedPlan:
        """The plan in frames, because how many tokens a frame has depends on whose they are."""
        return SharedPlan(self.plan, self.tokens)


@lru_cache(maxsize=16)
def _part_of_table(positions: Positions, grid: tuple[int, int], head_dim: int, device: torch.device, start: int, stop: int) -> Tensor:
    table = rotary_table(positions, grid, head_dim, device)
    return table.unflatten(0, (len(positions), -1))[:, start:stop].flatten(0, 1)


@dataclass(frozen=True)
class SharedRotary(Rotary):
    """The rotation of tokens start..stop of every frame."""

    start: int = 0
    stop: int = 0

    def table_at(self, positions: Positions) -> Tensor:
        """As `Rotary.table_at`, for these tokens."""
        return _part_of_table(positions, self.grid, self.head_dim, self.table.device, self.start, self.stop)

    @classmethod
    def of(cls, rotary: Rotary, start: int, stop: int) -> "SharedRotary":
        """Of the rotation of all tokens, that of some."""
        place = rotary.positions, rotary.grid, rotary.head_dim
        return cls(*place, _part_of_table(*place, rotary.table.device, start, stop), start, stop)


def check_sequence(heads: int, tokens_per_frame: int, ulysses: int, ring: int) -> None:
    """Raises ValueError where there are fewer heads or tokens than processes that want some."""
    if ulysses > heads:
        raise ValueError(f"parallel.ulysses={ulysses} shares out {heads} attention heads, which cannot be fewer; use parallel.ring")
    if ulysses * ring > tokens_per_frame:
        shared = f"parallel.ulysses={ulysses} x parallel.ring={ring} processes share the {tokens_per_frame} tokens of a frame"
        raise ValueError(f"{shared}; use fewer, or a larger picture")


class SplitSequence(WholeSequence):
    """The part of every frame's tokens that this process computes."""

    def __init__(self, mesh: Mesh, heads: int) -> None:
        self._heads = heads
        self.ulysses, self.ring = mesh.size("ulysses"), mesh.size("ring")
        self._rank, self._ring_rank = mesh.rank(SEQUENCE), mesh.rank("ring")
        self._group, self._ulysses_group, self._ring_group = mesh.group(SEQUENCE), mesh.group("ulysses"), mesh.group("ring")

    def shard(self, x: Tensor, layout: TokenLayout, rotary: Rotary) -> tuple[Tensor, TokenLayout, Rotary]:
        """As `WholeSequence.shard`. Raises ValueError for too few heads or tokens."""
        check_sequence(self._heads, x.shape[2], self.ulysses, self.ring)
        sizes = self._sizes(x.shape[2])
        start = sum(sizes[: self._rank])
        stop = start + sizes[self._rank]
        shared = SharedLayout(**vars(layout), tokens=x.shape[2])
        return x[:, :, start:stop].contiguous(), shared, SharedRotary.of(rotary, start, stop)

    def gather(self, x: Tensor, layout: SharedLayout) -> Tensor:
        """As `WholeSequence.gather`: (P - 1) * B * F * max(S_r) * C numbers are sent, for parts travel at the size of the largest."""
        sizes = self._sizes(layout.tokens)
        padded = torch.nn.functional.pad(x.detach(), (0, 0, 0, max(sizes) - x.shape[2])).contiguous()
        received = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(received, padded, group=self._group)
        count("gather", (len(sizes) - 1) * padded.nbytes)
        parts = [part[:, :, :size] for part, size in zip(received, sizes, strict=True)]
        parts[self._rank] = x  # the one through which gradients flow
        return torch.cat(parts, dim=2)

    @torch.compiler.disable
    def attend(self, q: Tensor, k: Tensor, v: Tensor, plan: SharedPlan, key_mask: None = None, *, inner: Attend) -> Tensor:
        """Self-attention of this process's tokens [B, F * S_r, H, d] among all tokens; keys may be of more frames than queries.

        Args:
            inner: attention in one process.
        """
        assert key_mask is None, "self-attention has no masked keys"
        q, k, v = (as_computed(x) for x in (q, k, v))
        sizes = self._sizes(plan.tokens)
        by_ring = [sizes[i : i + self.ulysses] for i in range(0, len(sizes), self.ulysses)]
        if self.ring == 1:
            attend = partial(inner, plan=in_tokens(plan.frames, plan.tokens, plan.tokens))
        else:
            attend = partial(attend_around, plan=plan.frames, tokens=[sum(part) for part in by_ring], group=self._ring_group)
        if self.ulysses == 1:
            return attend(q, k, v)
        return attend_by_heads(q, k, v, by_ring[self._ring_rank], self._ulysses_group, attend)

    def _sizes(self, tokens: int) -> list[int]:
        """S_r of every process of the group, its ring neighbours' Ulysses groups one after another."""
        return split_sizes(tokens, self.ulysses * self.ring)


def as_computed(x: Tensor) -> Tensor:
    """In the dtype that attention would compute in, which under autocast is not that of normalised queries and keys."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


def apply_sequence_parallel(transformer: AvatarTransformer, mesh: Mesh) -> None:
    """Shares the tokens of a transformer's forwards out over the mesh's ring and ulysses dimensions; every process calls it.

    The attention backend must have been set before; under a ring the kernels are those of `parallel.kernels`, whatever the backend.
    """
    if mesh.size(SEQUENCE) == 1:
        return
    transformer.sequence = split = SplitSequence(mesh, transformer.config.num_heads)
    for block in transformer.blocks:
        block.self_attn.attend = partial(split.attend, inner=block.self_attn.attend)

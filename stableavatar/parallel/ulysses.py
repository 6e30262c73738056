"""Ulysses (arXiv 2309.14509): processes that hold some tokens of all heads come to hold all tokens of some heads, and back.

Shapes: B batch, F latent frames, S_r tokens of every frame that process r holds, S their sum over the group, H heads, H_r those of
process r, d width of a head.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from stableavatar.parallel.traffic import count

TOKENS, HEADS = 2, 3


def split_sizes(total: int, parts: int) -> list[int]:
    """`total` in whole parts as equal as can be, the larger ones first."""
    return [total // parts + (part < total % parts) for part in range(parts)]


def _swap(x: Tensor, group: ProcessGroup, sizes: dict[int, list[int]], split: int, join: int) -> Tensor:
    """Sends process i its part of x along dimension `split` and puts the parts that arrive together along `join`.

    Args:
        x: [B, F, S_r, H, d] or [B, F, S, H_r, d].
        sizes: by dimension, what every process holds of it.
    """
    mine = dist.get_rank(group)
    pieces = x.split(sizes[split], dim=split)
    shapes = [[*x.shape] for _ in pieces]
    for shape, size in zip(shapes, sizes[join], strict=True):
        shape[split], shape[join] = sizes[split][mine], size
    counts = [piece.numel() for piece in pieces], [torch.Size(shape).numel() for shape in shapes]
    outgoing, incoming = (x.new_empty(sum(numbers)) for numbers in counts)
    for buffer, piece in zip(outgoing.split(counts[0]), pieces, strict=True):
        buffer.view(piece.shape).copy_(piece)
    dist.all_to_all_single(incoming, outgoing, counts[1], counts[0], group=group)
    count("ulysses", (outgoing.numel() - counts[0][mine]) * x.element_size())
    return torch.cat([part.view(shape) for part, shape in zip(incoming.split(counts[1]), shapes, strict=True)], dim=join)


class _Swap(torch.autograd.Function):
    """`_swap`; gradients take the same way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup, sizes: dict[int, list[int]], split: int, join: int) -> Tensor:
        ctx.way_back = group, sizes, join, split
        return _swap(x, group, sizes, split, join)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return _swap(gradient, *ctx.way_back), None, None, None, None


def attend_by_heads(
    q: Tensor, k: Tensor, v: Tensor, tokens: Sequence[int], group: ProcessGroup, attend: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> Tensor:
    """Attention among tokens that are spread over a group, each process computing some heads for all of them.

    A process sends its queries, keys and values in one message and its results in another:
    B * d * ((F + 2 G) * S_r * (H - H_r) + F * (S - S_r) * H_r) numbers; 4 * B * N / P * D * (P - 1) / P of them where P processes divide
    N tokens of width D evenly and G = F. Gradients go the other way: what was received is sent.

    Args:
        q: [B, F * S_r, H, d]; k, v: [B, G * S_r, H, d], of G frames.
        tokens: S_r of every process.
        attend: q, k, v [B, F * S, H_r, d] and so on -> [B, F * S, H_r, d].

    Returns:
        [B, F * S_r, H, d]
    """
    held = tokens[dist.get_rank(group)]
    sizes = {TOKENS: list(tokens), HEADS: split_sizes(q.shape[2], len(tokens))}
    frames = [x.shape[1] // held for x in (q, k, v)]
    together = torch.cat([q, k, v], dim=1).unflatten(1, (-1, held))
    swapped = _Swap.apply(together, group, sizes, HEADS, TOKENS)
    attended = attend(*(x.flatten(1, 2) for x in swapped.split(frames, dim=1)))
    by_frame = attended.unflatten(1, (frames[0], -1))
    return _Swap.apply(by_frame, group, sizes, TOKENS, HEADS).flatten(1, 2)

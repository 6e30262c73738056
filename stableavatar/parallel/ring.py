"""Ring attention (arXiv 2310.01889): keys and values travel around a ring of processes, and the results over parts of the keys are
merged by their log-sum-exp. The next part is on its way while one computes with the present one.

Shapes: B batch, H heads, d width of a head, L tokens of this process; process r holds S_r tokens of every latent frame. Inside, heads come
before tokens, and keys and values are one tensor [2, B, H, L, d].
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup, Work

from stableavatar.models.layout import Plan, in_tokens
from stableavatar.parallel.kernels import choose
from stableavatar.parallel.traffic import count

TOKENS = 3  # dimension of keys and values as they travel


@dataclass
class Message:
    """Something that comes from the previous process while this process's own goes to the next.

    Attributes:
        sent: kept until it is away.
        received: filled when `wait` returns.
    """

    sent: Tensor
    received: Tensor
    works: list[Work]

    def wait(self) -> Tensor:
        """What has arrived."""
        for work in self.works:
            work.wait()
        return self.received


@dataclass(frozen=True)
class Ring:
    """A process's place in a ring whose members hold parts of a sequence.

    Attributes:
        plan: rectangles of latent frames, as in `TokenLayout`; empty: everything sees everything.
        tokens: per frame, of every member.
    """

    plan: Plan
    tokens: tuple[int, ...]
    group: ProcessGroup

    @cached_property
    def rank(self) -> int:
        """This process among the members."""
        return dist.get_rank(self.group)

    def pass_on(self, x: Tensor, owner: int, tag: int) -> Message:
        """Starts to send x [2, B, H, L, d], which belongs to the keys of member `owner`, and to receive the previous process's."""
        size = len(self.tokens)
        shape = list(x.shape)
        shape[TOKENS] = x.shape[TOKENS] // self.tokens[owner] * self.tokens[owner - 1]
        x, received = x.contiguous(), x.new_empty(shape)
        ahead, behind = (dist.get_global_rank(self.group, (self.rank + step) % size) for step in (1, -1))
        works = dist.batch_isend_irecv([
            dist.P2POp(dist.isend, x, ahead, self.group, tag), dist.P2POp(dist.irecv, received, behind, self.group, tag)
        ])  # fmt: skip
        count("ring", x.nbytes)
        return Message(x, received, works)

    def parts(self, own: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Every member's keys and values with its rank, this process's own first, each time the previous member's next."""
        present = own
        for step in range(len(self.tokens)):
            owner = (self.rank - step) % len(self.tokens)
            coming = self.pass_on(present, owner, tag=0) if step + 1 < len(self.tokens) else None
            yield owner, present
            if coming:
                present = coming.wait()

    def rectangles(self, owner: int) -> list[tuple[slice, slice]]:
        """Which of this process's queries see which of member `owner`'s keys, in tokens.

        Several key slices of one rule are rectangles of their own: merging puts them together.
        """
        if not self.plan:
            return [(slice(None), slice(None))]
        scaled = in_tokens(self.plan, self.tokens[self.rank], self.tokens[owner])
        return [(rows, span) for rows, columns in scaled for span in columns]


def merge(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Adds attention over further keys to what was found over others, in place.

    Args:
        out, lse: [B, H, L, d] and [B, H, L], float32; -inf where no key was seen yet.
        part, part_lse: of the further keys.
    """
    out.lerp_(part.float(), torch.sigmoid(part_lse - lse).unsqueeze(-1))
    torch.logaddexp(lse, part_lse, out=lse)


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, ring: Ring) -> Tensor:
        kernel = choose(q.device, q.dtype, q.shape[-1])
        own = torch.stack([k, v])
        out, lse = q.new_zeros(q.shape, dtype=torch.float32), q.new_full(q.shape[:-1], -torch.inf, dtype=torch.float32)
        for owner, (keys, values) in ring.parts(own):
            for rows, columns in ring.rectangles(owner):
                found = kernel.forward(q[:, :, rows], keys[:, :, columns], values[:, :, columns])
                merge(out[:, :, rows], lse[:, :, rows], *found)
        out = out.to(q.dtype)
        ctx.ring = ring
        ctx.save_for_backward(q, own, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Keys and values go round once more; their gradients, in float32, travel with them and arrive at home last."""
        q, own, out, lse = ctx.saved_tensors
        ring, kernel = ctx.ring, choose(q.device, q.dtype, q.shape[-1])
        by_query, coming = torch.zeros_like(q, dtype=torch.float32), None
        for owner, keys_values in ring.parts(own):
            by_pair = torch.zeros_like(keys_values, dtype=torch.float32)
            for rows, columns in ring.rectangles(owner):
                keys, values = keys_values[:, :, :, columns]
                outcome = out[:, :, rows], lse[:, :, rows]
                found = kernel.backward(gradient[:, :, rows], q[:, :, rows], keys, values, *outcome)
                by_query[:, :, rows] += found[0]
                by_pair[0, :, :, columns] += found[1]
                by_pair[1, :, :, columns] += found[2]
            if coming:
                by_pair += coming.wait()
            coming = ring.pass_on(by_pair, owner, tag=1)
        by_key, by_value = coming.wait().to(q.dtype)
        return by_query.to(q.dtype), by_key, by_value, None


def attend_around(q: Tensor, k: Tensor, v: Tensor, plan: Plan, tokens: Sequence[int], group: ProcessGroup) -> Tensor:
    """Attention of this process's queries over the keys and values of all processes of a ring.

    With G frames of keys and element size e, a process sends every part but the next process's: 2 * B * H * G * d * e times the sum
    of their tokens per frame. The backward sends as much again, and 2 * B * H * G * d * 4 times the sum of all tokens per frame.

    Args:
        q: [B, F * S_r, H, d]; k, v: [B, G * S_r, H, d], of G frames.
        plan: rectangles of latent frames, as in `TokenLayout`; empty: everything sees everything.
        tokens: S_r of every process.

    Returns:
        [B, F * S_r, H, d]
    """
    with torch.autocast(q.device.type, enabled=False):
        return _RingAttention.apply(*(x.transpose(1, 2) for x in (q, k, v)), Ring(plan, tuple(tokens), group)).transpose(1, 2)

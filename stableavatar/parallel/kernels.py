"""Attention that also returns the log-sum-exp of its scores, so that results over parts of the keys can be merged, and its backward.

Shapes: q [B, H, Lq, d]; k, v [B, H, Lk, d]; the log-sum-exp [B, H, Lq] float32, natural, of q k^T / sqrt(d).
The backward of one part takes the output and log-sum-exp over all keys: softmax weights are exp(scores - lse), so a part's gradients
need nothing else of the others (FlashAttention, arXiv 2205.14135, algorithm 4).
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from stableavatar.models.kernels import MAX_FLASH_HEAD_DIM

aten = torch.ops.aten


class Kernel(NamedTuple):
    """(q, k, v) -> (out, lse), and (gradient of out, q, k, v, out, lse) -> gradients of q, k, v."""

    forward: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    backward: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


def choose(device: torch.device, dtype: torch.dtype, head_dim: int) -> Kernel:
    """The fastest kernel that runs: flash attention on CUDA in half precision and on the CPU, else matrix products in float32."""
    if device.type == "cpu":
        return CPU_FLASH
    half = dtype in (torch.float16, torch.bfloat16)
    if device.type == "cuda" and half and head_dim % 8 == 0 and head_dim <= MAX_FLASH_HEAD_DIM:
        return CUDA_FLASH
    return PLAIN


def _cuda_flash(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return aten._scaled_dot_product_flash_attention(q, k, v)[:2]


def _cuda_flash_backward(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    unused = torch.empty((), dtype=torch.int64, device=q.device)  # the state of dropout's generator, of which there is none
    return aten._scaled_dot_product_flash_attention_backward(
        gradient, q, k, v, out, lse, None, None, q.shape[2], k.shape[2], 0.0, False, unused, unused
    )


def _cpu_flash_backward(gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return aten._scaled_dot_product_flash_attention_for_cpu_backward(gradient, q, k, v, out, lse, 0.0, False)


def _scores(q: Tensor, k: Tensor) -> Tensor:
    return q.float() @ k.float().mT * q.shape[-1] ** -0.5


def _plain(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    scores = _scores(q, k)
    lse = scores.logsumexp(-1)
    return ((scores - lse.unsqueeze(-1)).exp() @ v.float()).to(q.dtype), lse


def _plain_backward(gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    weights = (_scores(q, k) - lse.unsqueeze(-1)).exp()
    gradient = gradient.float()
    by_weight = gradient @ v.float().mT - (gradient * out.float()).sum(-1, keepdim=True)
    by_score = weights * by_weight * q.shape[-1] ** -0.5
    gradients = by_score @ k.float(), by_score.mT @ q.float(), weights.mT @ gradient
    return tuple(g.to(q.dtype) for g in gradients)


CUDA_FLASH = Kernel(_cuda_flash, _cuda_flash_backward)
CPU_FLASH = Kernel(aten._scaled_dot_product_flash_attention_for_cpu, _cpu_flash_backward)
PLAIN = Kernel(_plain, _plain_backward)

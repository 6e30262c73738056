"""Attention over the library's backends (diffusers' `dispatch_attention_fn`), rectangle by rectangle."""

from typing import Protocol

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from torch import Tensor

from stableavatar.models.layout import Plan

MAX_FLASH_HEAD_DIM = 256
"""Width of a head above which flash kernels give up."""


class Attend(Protocol):
    """Signature of `attend`; wrappers (another backend, sequence parallelism) keep it."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, plan: Plan = (), key_mask: Tensor | None = None) -> Tensor: ...


def attend(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan = (), key_mask: Tensor | None = None, backend: str = "native"
) -> Tensor:
    """Softmax attention with scale 1 / sqrt(d).

    Args:
        q: [B, Lq, heads, d]; k, v: [B, Lk, heads, d].
        plan: token rectangles (query slice, key slices), queries in order; empty: everything sees everything.
        key_mask: [B, Lk] bool, False for keys that nobody may see; backends without masks refuse it.
        backend: a name of diffusers' attention backends.

    Returns:
        [B, Lq, heads, d]
    """
    if not plan:
        mask = None if key_mask is None else key_mask[:, None, None, :]
        return dispatch_attention_fn(q, k, v, attn_mask=mask, backend=AttentionBackendName(backend))
    return torch.cat([_rectangle(q[:, rows], k, v, columns, key_mask, backend) for rows, columns in plan], dim=1)


def _rectangle(q: Tensor, k: Tensor, v: Tensor, columns: tuple[slice, ...], key_mask: Tensor | None, backend: str) -> Tensor:
    def gather(x: Tensor) -> Tensor:
        return x[:, columns[0]] if len(columns) == 1 else torch.cat([x[:, c] for c in columns], dim=1)

    return attend(q, gather(k), gather(v), key_mask=None if key_mask is None else gather(key_mask), backend=backend)


def backend_names() -> list[str]:
    """Names that `attend` takes as `backend`: diffusers', less those that download their kernel."""
    return [name.value for name in AttentionBackendName if not name.value.endswith("_hub")]


def known_backend(name: str) -> str:
    """The name itself. Raises ValueError for one that `attend` does not take."""
    if name not in backend_names():
        raise ValueError(f"attention backend '{name}' is unknown; expected one of {', '.join(backend_names())}")
    return name


def prepared_backend(name: str) -> str:
    """The name itself, its backend set up for the process. Raises ValueError for one that `attend` does not take.

    Plain matrix products and softmax (`_native_math`) train in bfloat16 on a CPU at twice the speed of the fused kernel there, but only
    if they do not go to float32 and back.
    """
    if known_backend(name) == AttentionBackendName._NATIVE_MATH.value:
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)  # in spite of its name it holds for every device
    return name


def check_backend(name: str, device: torch.device, dtype: torch.dtype) -> None:
    """Raises ValueError unless a backend exists and runs here, by trying it on a few tokens of 128-wide heads."""
    tokens = torch.zeros(1, 16, 1, 128, device=device, dtype=dtype)
    try:
        attend(tokens, tokens, tokens, backend=known_backend(name))
    except (RuntimeError, TypeError, ImportError, AttributeError, AssertionError) as error:
        reason = f"does not run on {device.type} in {dtype} here ({' '.join(str(error).split())[:160]})"
        raise ValueError(f"attention backend '{name}' {reason}; install what it needs (requirements-gpu.txt) or use native") from error

"""Kernels that return the log-sum-exp, merging by it, and attention around a ring."""

from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import scaled_dot_product_attention

from stableavatar.models import kernels as one_process
from stableavatar.models.layout import Plan, in_tokens
from stableavatar.parallel.kernels import CPU_FLASH, CUDA_FLASH, PLAIN, Kernel, choose
from stableavatar.parallel.mesh import Mesh
from stableavatar.parallel.ring import attend_around, merge

PLANS: dict[str, Plan] = {
    "full": (),
    "causal": ((slice(0, 1), (slice(0, 1),)), (slice(1, 3), (slice(0, 3),))),
    "skipping": ((slice(0, 2), (slice(0, 1), slice(2, 3))), (slice(2, 3), (slice(1, 3),))),
}


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def inputs(dtype: torch.dtype, head_dim: int, device: str = "cpu") -> tuple[Tensor, ...]:
    """q, k, v, in the order that a transposition of heads and tokens leaves, and a gradient."""
    shapes = (2, 33, 3, head_dim), (2, 50, 3, head_dim), (2, 50, 3, head_dim), (2, 33, 3, head_dim)
    return tuple(random(*shape, seed=i, dtype=dtype).transpose(1, 2).to(device) for i, shape in enumerate(shapes))


def exactly(q: Tensor, k: Tensor, v: Tensor, gradient: Tensor) -> list[Tensor]:
    """Output, log-sum-exp and gradients of q, k, v, by the library in float64."""
    q, k, v = (x.double().requires_grad_() for x in (q, k, v))
    out = scaled_dot_product_attention(q, k, v)
    out.backward(gradient.double())
    return [out, (q @ k.mT * q.shape[-1] ** -0.5).logsumexp(-1), q.grad, k.grad, v.grad]


def error(found: Tensor, exact: Tensor) -> float:
    return ((found.double() - exact).norm() / exact.norm()).item()


def check(kernel: Kernel, dtype: torch.dtype, head_dim: int, device: str = "cpu") -> None:
    """All keys at once; and the keys in two parts, merged, with gradients from the merged output and log-sum-exp."""
    q, k, v, gradient = inputs(dtype, head_dim, device)
    exact, bound = exactly(q, k, v, gradient), 1e-6 if dtype == torch.float32 else 0.01
    out, lse = kernel.forward(q, k, v)
    for found, expected in zip([out, lse, *kernel.backward(gradient, q, k, v, out, lse)], exact, strict=True):
        assert error(found, expected) < bound and found.dtype in (dtype, torch.float32)
    out, lse = torch.zeros_like(q, dtype=torch.float32), q.new_full(q.shape[:-1], -torch.inf, dtype=torch.float32)
    parts = slice(0, 31), slice(31, 50)
    for part in parts:
        merge(out, lse, *kernel.forward(q, k[:, :, part], v[:, :, part]))
    found = [kernel.backward(gradient, q, k[:, :, part], v[:, :, part], out.to(dtype), lse) for part in parts]
    by_query = sum(part[0].float() for part in found)
    by_key, by_value = (torch.cat([part[i] for part in found], dim=2) for i in (1, 2))
    for found, expected in zip([out, lse, by_query, by_key, by_value], exact, strict=True):
        assert error(found, expected) < bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kernel", [PLAIN, CPU_FLASH], ids=["plain", "flash"])
@pytest.mark.parametrize("head_dim", [16, 21])
def test_a_kernel_agrees_with_the_library_whole_and_in_parts(kernel, dtype, head_dim):
    check(kernel, dtype, head_dim)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_kernels_of_a_gpu_agree_with_the_library():
    check(CUDA_FLASH, torch.bfloat16, 64, "cuda")
    check(PLAIN, torch.float32, 64, "cuda")


def test_the_flash_kernel_of_a_gpu_takes_these_arguments():
    """Shapes alone, on a machine without one."""
    with FakeTensorMode():
        q, k = (torch.empty(2, 3, length, 64, device="cuda", dtype=torch.bfloat16) for length in (33, 50))
        out, lse = CUDA_FLASH.forward(q, k, k)
        assert (out.shape, lse.shape, lse.dtype) == (q.shape, q.shape[:-1], torch.float32)
        assert [g.shape for g in CUDA_FLASH.backward(out, q, k, k, out, lse)] == [q.shape, k.shape, k.shape]


def test_the_kernel_follows_device_dtype_and_head():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert choose(cpu, torch.float32, 128) is CPU_FLASH and choose(cuda, torch.bfloat16, 128) is CUDA_FLASH
    others = [(cuda, torch.float32, 128), (cuda, torch.float16, 260), (cuda, torch.float16, 20), (torch.device("mps"), torch.float16, 64)]
    assert all(choose(*case) is PLAIN for case in others)


def ring_errors(tokens: list[int], dtype: torch.dtype) -> dict[str, list[float]]:
    """By plan, of the output and the gradients of this process's part of three frames."""
    ring, found = Mesh.over("cpu", ring=len(tokens)), {}
    own = slice(sum(tokens[: (rank := dist.get_rank())]), sum(tokens[: rank + 1]))
    wide = [random(2, 3, sum(tokens), 2, 16, seed=seed, dtype=dtype) for seed in range(4)]

    def attend(attention: object, *shared: Tensor) -> list[Tensor]:
        q, k, v = (x.flatten(1, 2).detach().requires_grad_() for x in shared[:3])
        out = attention(q, k, v)
        out.backward(shared[3].flatten(1, 2))
        return [x.unflatten(1, (3, -1)) for x in (out.detach(), q.grad, k.grad, v.grad)]

    for name, plan in PLANS.items():
        ours = attend(partial(attend_around, plan=plan, tokens=tokens, group=ring.group("ring")), *(x[:, :, own] for x in wide))
        exact = attend(partial(one_process.attend, plan=in_tokens(plan, sum(tokens), sum(tokens))), *(x.double() for x in wide))
        found[name] = [error(x, y[:, :, own]) for x, y in zip(ours, exact, strict=True)]
    return found


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-6), (torch.bfloat16, 0.01)], ids=str)
def test_a_ring_of_uneven_parts_honours_every_plan(dtype, bound, crew):
    for found in crew.run(3, ring_errors, [5, 4, 1], dtype):
        assert max(max(errors) for errors in found.values()) < bound, found

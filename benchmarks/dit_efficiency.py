"""How close a forward of the transformer comes to its bare matrix products and attention calls, in one run.

    python benchmarks/dit_efficiency.py [--device cuda] [--dtypes float32 bfloat16] [--repeats 3]

Prints, for each dtype, the time of a forward (width 1536, 4 blocks, 3 passes, 5376 tokens), the time of its linears and
attention calls alone at the same shapes, their ratio, and both rates. Calls are interleaved and the fastest of each counts.
"""

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from stableavatar.models import kernels
from stableavatar.models.dit import AudioFeatures, AvatarTransformer, Conditions
from stableavatar.models.layout import TokenLayout

PASSES, FRAMES, HEIGHT, WIDTH, BLOCKS = 3, 21, 32, 32, 4


def build(dtype: torch.dtype, device: str) -> tuple[AvatarTransformer, tuple]:
    """The model with four blocks, and the arguments of a forward."""
    torch.manual_seed(0)
    model = AvatarTransformer(num_layers=BLOCKS).eval()
    keep = [model.get_submodule(name) for name in ("time_embedding", "time_projection")]
    model.to(device, dtype)
    for module in keep:
        module.float()
    latents = torch.randn(PASSES, 16, FRAMES, HEIGHT, WIDTH, device=device)

    def random(*shape: int) -> Tensor:
        return torch.randn(PASSES, *shape, device=device, dtype=dtype)

    conditions = Conditions(random(512, 4096), random(257, 1280), random(20, FRAMES, HEIGHT, WIDTH), AudioFeatures(random(161, 768)))
    return model, (latents, torch.full((PASSES,), 500.0, device=device), conditions, TokenLayout.full(FRAMES))


def record(model: AvatarTransformer, arguments: tuple) -> tuple[list[Callable[[], object]], float]:
    """The bare calls of a forward, ready to be repeated on random data, and their floating point operations."""
    calls, flops, handles = [], 0.0, []

    def linear(module: nn.Linear, inputs: tuple[Tensor], _: Tensor) -> None:
        nonlocal flops
        x = torch.randn_like(inputs[0])
        calls.append(lambda: functional.linear(x, module.weight, module.bias))
        flops += 2 * x.numel() * module.out_features

    def convolution(module: nn.Conv3d, inputs: tuple[Tensor], output: Tensor) -> None:
        nonlocal flops
        x = torch.randn_like(inputs[0])
        calls.append(lambda: functional.conv3d(x, module.weight, module.bias, module.stride))
        flops += 2 * output.numel() * module.weight[0].numel()

    def attend(q: Tensor, k: Tensor, v: Tensor, plan: tuple = (), key_mask: Tensor | None = None) -> Tensor:
        nonlocal flops
        q_, k_, v_ = (torch.randn_like(x.contiguous()).transpose(1, 2) for x in (q, k, v))
        calls.append(lambda: functional.scaled_dot_product_attention(q_, k_, v_))
        flops += 4 * q.numel() * k.shape[1]
        return kernels.attend(q, k, v, plan, key_mask)

    for module in model.modules():
        if isinstance(module, nn.Linear):
            handles.append(module.register_forward_hook(linear))
        elif isinstance(module, nn.Conv3d):
            handles.append(module.register_forward_hook(convolution))
        elif hasattr(module, "attend"):
            module.attend = attend
    model(*arguments)
    for handle in handles:
        handle.remove()
    for module in model.modules():
        if hasattr(module, "attend"):
            module.attend = kernels.attend
    return calls, flops


def timed(work: Callable[[], object], device: str) -> float:
    """Seconds that one call takes."""
    if device != "cpu":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    print(f"{'dtype':10} {'forward s':>10} {'bare s':>10} {'ratio':>7} {'forward GFLOP/s':>16} {'bare GFLOP/s':>13}")
    for name in options.dtypes:
        model, arguments = build(getattr(torch, name), options.device)
        calls, flops = record(model, arguments)
        forward, bare = [], []
        for _ in range(options.repeats):
            forward.append(timed(lambda: model(*arguments), options.device))
            bare.append(timed(lambda: [call() for call in calls], options.device))
        f, b = min(forward), min(bare)
        print(f"{name:10} {f:10.2f} {b:10.2f} {f / b:7.3f} {flops / f / 1e9:16.0f} {flops / b / 1e9:13.0f}")


if __name__ == "__main__":
    main()

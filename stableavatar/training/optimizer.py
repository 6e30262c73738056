"""Optimisers, schedules of the learning rate, clipping of gradients."""

import importlib
import math
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import Parameter
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from stableavatar.machine import fast_precision
from stableavatar.training.config import OptimizerConfig

Groups = list[dict[str, Any]]
"""Of `trainable.parameter_groups`: name, params, lr, weight_decay."""
MUON_REGIONS = ("blocks", "audio")
MUON_POLYNOMIAL = 3.4445, -4.7750, 2.0315
"""Coefficients of x, x^3 and x^5, chosen by Jordan et al. to raise small singular values quickly."""
OUTLIER, TIGHTEST = 5, 10
"""Adaptive clipping: a gradient is an outlier from so many times the limit on; its limit is divided by at most so much."""


def make_optimizer(groups: Groups, config: OptimizerConfig) -> Optimizer:
    """The configured optimiser over groups of weights.

    Raises:
        ValueError: the optimiser's package is not installed.
    """
    return {"adamw": adamw, "adamw8bit": adamw8bit, "muon": MuonAdamW, "came": came}[config.name](groups, config)


def adamw(groups: Groups, config: OptimizerConfig) -> Optimizer:
    """The library's, in one kernel: no temporary copies of the gradients."""
    return AdamW(groups, config.lr, (config.beta1, config.beta2), config.eps, fused=True)


def adamw8bit(groups: Groups, config: OptimizerConfig) -> Optimizer:
    """bitsandbytes' AdamW, whose two moments take a byte each."""
    library = imported("bitsandbytes", "bitsandbytes", config)
    return library.optim.AdamW8bit(groups, config.lr, (config.beta1, config.beta2), config.eps)


def came(groups: Groups, config: OptimizerConfig) -> Optimizer:
    """CAME (Luo et al. 2023), whose second moments are factored; its constants eps and its third beta are the library's own."""
    library = imported("came_pytorch", "came-pytorch", config)
    return library.CAME(groups, config.lr, betas=(config.beta1, config.beta2, 0.9999))


def imported(module: str, package: str, config: OptimizerConfig) -> ModuleType:
    """A module of a package that not everyone has. Raises ValueError that says how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise ValueError(f"optimizer.name={config.name} needs {package}, which is not installed: pip install {package}") from None


class MuonAdamW(Optimizer):
    """Muon (Jordan et al. 2024) for the matrices of the transformer's blocks and AdamW for all else, as one optimiser.

    Muon's updates are scaled to the size of AdamW's (Liu et al. 2025), so that both share the learning rates; its momentum is beta1.
    The library's AdamW works on this one's groups and state, wherever loading or sharding has put them. The library's Muon computes in
    bfloat16 on every processor, which on CPUs without instructions for it takes twenty times as long as float32; this one does not.
    """

    def __init__(self, groups: Groups, config: OptimizerConfig) -> None:
        self._momentum = config.beta1
        self._adamw = adamw(by_kind(groups)[1] or [{"params": []}], config)
        super().__init__(groups, {})  # which AdamW has completed by its defaults

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step of each; a closure is evaluated once, before them."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        matrices, self._adamw.param_groups = by_kind(self.param_groups)
        for group in matrices:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._turn(weight, group["lr"], group["weight_decay"])
        self._adamw.state = self.state
        self._adamw.step()
        return loss

    def _turn(self, weight: Parameter, lr: float, weight_decay: float) -> None:
        state = self.state[weight]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(weight)
        mean = state["momentum_buffer"].lerp_(weight.grad, 1 - self._momentum)
        update = orthogonal(weight.grad.lerp(mean, self._momentum))
        weight.mul_(1 - lr * weight_decay).add_(update, alpha=-lr * 0.2 * math.sqrt(max(weight.shape)))


def orthogonal(matrix: Tensor) -> Tensor:
    """A matrix with singular values near 1 in place of its own: Muon's polynomial, five times, in the device's fast precision."""
    a, b, c = MUON_POLYNOMIAL
    wide = matrix.to(fast_precision(matrix.device))
    wide = wide if matrix.shape[0] <= matrix.shape[1] else wide.T
    wide = wide / wide.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = wide @ wide.T
        wide = a * wide + (b * gram + c * gram @ gram) @ wide
    return wide if matrix.shape[0] <= matrix.shape[1] else wide.T


def by_kind(groups: Groups) -> tuple[Groups, Groups]:
    """The groups of the blocks' matrices, and the others."""
    matrices = [group for group in groups if group["name"] in MUON_REGIONS]
    return matrices, [group for group in groups if group["name"] not in MUON_REGIONS]


def make_schedule(optimizer: Optimizer, config: OptimizerConfig, total_steps: int) -> LambdaLR:
    """Factors of the learning rates: linear warm-up from 0, then constant, or down to 0 at `total_steps` as a cosine or a line.

    To be stepped once per optimiser step.
    """
    name = "constant_with_warmup" if config.schedule == "constant" else config.schedule
    return get_scheduler(name, optimizer, num_warmup_steps=config.warmup, num_training_steps=total_steps)


def clip_limit(config: OptimizerConfig, step: int, norm: float) -> float:
    """The largest norm that the gradient of optimiser step `step` (from 0) may keep; infinite without clipping.

    Adaptive, as in the released scripts: the limit falls in a line from clip * clip_ratio to clip at step clip_start; from there on
    an outlier is clipped the harder the larger it is.
    """
    if not config.clip:
        return math.inf
    if config.clip_mode == "constant":
        return config.clip
    if step < config.clip_start:
        return config.clip * (config.clip_ratio + (1 - config.clip_ratio) * step / config.clip_start)
    return config.clip / min(norm / config.clip, TIGHTEST) if norm > OUTLIER * config.clip else config.clip


def clip_gradients(parameters: Iterable[Parameter], config: OptimizerConfig, step: int) -> float:
    """Scales the gradients in place so that their norm keeps to `clip_limit`; the norm that they had, over all shards."""
    parameters = [parameter for parameter in parameters if parameter.grad is not None]
    norm = get_total_norm([parameter.grad for parameter in parameters])
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    if (limit := clip_limit(config, step, norm.item())) < norm:
        clip_grads_with_norm_(parameters, limit, norm)
    return norm.item()

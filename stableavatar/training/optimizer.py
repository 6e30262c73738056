"""Optimisers, schedules of the learning rate, clipping of gradients."""

import importlib
import math
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from torch.distributed.tensor import DTensor
from torch.nn import Parameter
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from stableavatar.training.config import OptimizerConfig

Groups = list[dict[str, Any]]
"""Of `trainable.parameter_groups`: name, params, lr, weight_decay."""
MUON_REGIONS = ("blocks", "audio")
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
    """Muon for the matrices of the transformer's blocks and AdamW for all else, as one optimiser.

    Muon's updates are scaled to the size of AdamW's (Liu et al. 2025), so that both share the learning rates; its momentum is beta1.
    Both of the library's optimisers work on this one's groups and state, wherever loading or sharding has put them.
    """

    def __init__(self, groups: Groups, config: OptimizerConfig) -> None:
        if not hasattr(torch.optim, "Muon"):
            raise ValueError(f"optimizer.name=muon needs torch of at least 2.9, got {torch.__version__}: pip install 'torch>=2.9'")
        matrices, others = by_kind(groups)
        none = [{"params": []}]
        self._muon = torch.optim.Muon(matrices or none, config.lr, momentum=config.beta1, adjust_lr_fn="match_rms_adamw")
        self._adamw = adamw(others or none, config)
        super().__init__(groups, {})  # which the two above have completed by their defaults

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step of each; a closure is evaluated once, before them."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for optimizer, groups in zip((self._muon, self._adamw), by_kind(self.param_groups)):
            optimizer.param_groups, optimizer.state = groups, self.state
            optimizer.step()
        return loss


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

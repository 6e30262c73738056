"""Which weights train, in which precision, and in which groups of learning rate and weight decay."""

from typing import Any

import torch
from torch.nn import Parameter

from stableavatar.models.dit import AvatarTransformer
from stableavatar.models.strict_loading import kept_in_float32
from stableavatar.training.config import OptimizerConfig

ATTENTION = ("self_attn", "cross_attn")
AUDIO_KEYS_VALUES = {"k_audio", "v_audio"}


def select(model: AvatarTransformer, what: str) -> None:
    """Lets train, of all weights, only the audio adapter and the blocks' `attention`, the adapter and whole `blocks`, or `all`.

    Raises:
        ValueError: `what` is none of these.
    """
    if what not in ("attention", "blocks", "all"):
        raise ValueError(f"what must be attention, blocks or all, got {what!r}")
    model.requires_grad_(what == "all")
    model.audio_adapter.requires_grad_(True)
    for block in model.blocks:
        for part in [block] if what == "blocks" else [getattr(block, name) for name in ATTENTION]:
            part.requires_grad_(True)


def trained(model: torch.nn.Module) -> dict[str, Parameter]:
    """The weights that train, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def to_training_dtype(model: AvatarTransformer, frozen_dtype: torch.dtype) -> None:
    """Weights that train become float32, so that small updates are not rounded away; frozen ones and buffers `frozen_dtype`, but
    for those that the class keeps in float32."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point():
            exact = tensor.requires_grad or kept_in_float32(model, name, frozen_dtype)
            tensor.data = tensor.data.to(torch.float32 if exact else frozen_dtype)


def region(name: str) -> str:
    """The part of the network that a weight belongs to: `adapter`, `audio` (the blocks' audio keys and values), `blocks`, `other`."""
    parts = set(name.split("."))
    if "audio_adapter" in parts:
        return "adapter"
    if parts & AUDIO_KEYS_VALUES:
        return "audio"
    return "blocks" if "blocks" in parts else "other"


def is_matrix(name: str, parameter: Parameter) -> bool:
    """Whether a weight multiplies activations, unlike a norm, a bias or a modulation (whose vectors are stacked)."""
    return parameter.ndim >= 2 and "modulation" not in name.split(".")


def parameter_groups(model: torch.nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """The weights that train, for an optimiser: groups by region, named after it, with the region's learning rate. Matrices decay; the
    rest of a region, `{region}_vectors`, does not. Low-rank updates belong to the region of what they update."""
    rates = {"adapter": config.adapter_lr or config.lr, "audio": config.audio_lr or config.lr}
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in trained(model).items():
        matrix, part = is_matrix(name, parameter), region(name)
        empty = {
            "name": part if matrix else f"{part}_vectors",
            "params": [],
            "lr": rates.get(part, config.lr),
            "weight_decay": config.weight_decay if matrix else 0.0,
        }
        groups.setdefault(empty["name"], empty)["params"].append(parameter)
    return list(groups.values())

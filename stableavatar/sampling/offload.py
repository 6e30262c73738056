"""Memory modes: where weights live while a generation runs. All of it is the library's own machinery."""

import logging
from collections.abc import Collection
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from stableavatar.config import MemoryConfig

if TYPE_CHECKING:
    from stableavatar.pipeline import StableAvatarPipeline

logger = logging.getLogger(__name__)


def place(pipe: "StableAvatarPipeline", memory: MemoryConfig, device: torch.device, placed: Collection[str] = ()) -> None:
    """Puts a pipeline's models where a memory mode wants them.

    Args:
        memory: `full` keeps all on the device; `model_offload` moves a model there while it is used; `group_offload` a block at
            a time with the next one prefetched; `sequential_offload` a layer at a time. `fp8` stores the transformer's
            matrices as 8-bit floats and computes in its dtype; `vae_tiling` encodes and decodes in tiles.
        placed: components that `full` leaves where they are.
    """
    if memory.fp8:
        pipe.transformer.enable_layerwise_casting(torch.float8_e4m3fn, compute_dtype=pipe.transformer.dtype)
    if memory.vae_tiling:
        pipe.vae.enable_tiling()
    if memory.mode == "full":
        for name, model in pipe.components.items():
            if isinstance(model, nn.Module) and name not in placed:
                model.to(device)
    elif memory.mode == "model_offload":
        pipe.enable_model_cpu_offload(device=device)
    elif memory.mode == "sequential_offload":
        pipe.enable_sequential_cpu_offload(device=device)
    else:
        stream = device.type == "cuda"
        pipe.enable_group_offload(device, offload_type="block_level", num_blocks_per_group=1, use_stream=stream)


def mode_for(memory: MemoryConfig, device: torch.device) -> MemoryConfig:
    """The memory settings that make sense on a device: on the CPU nothing can be moved out of the way."""
    if device.type != "cpu" or memory.mode == "full":
        return memory
    logger.warning("memory.mode=%s moves models between host and accelerator; on the CPU they simply stay where they are", memory.mode)
    return replace(memory, mode="full")


def resolve_device(name: str) -> torch.device:
    """A usable device; `auto` is the GPU where there is one. Raises ValueError for one that this machine lacks."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    here = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if name not in here and name not in {usable.partition(":")[0] for usable in here}:
        raise ValueError(f"device must be auto or one of {', '.join(here)} on this machine, got '{name}'")
    return torch.device(name)


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of the transformer; `auto` is bfloat16 on an accelerator and float32 on the CPU."""
    if name == "auto":
        name = "float32" if device.type == "cpu" else "bfloat16"
    return getattr(torch, name)

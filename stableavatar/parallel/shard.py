"""Weights dealt out over processes (the library's FSDP2): each keeps a part, and a layer is whole only while it computes."""

import logging
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

from stableavatar.parallel.mesh import Mesh

if TYPE_CHECKING:
    from stableavatar.pipeline import StableAvatarPipeline

logger = logging.getLogger(__name__)


def shard_weights(pipe: "StableAvatarPipeline", mesh: Mesh, device: torch.device, offload: bool) -> tuple[str, ...]:
    """Deals transformer and text encoder out, block by block, to the processes that share a sequence.

    Those alone compute every forward at the same time; other processes are at other windows or passes.

    Args:
        device: this process's own; one block after the other visits it whole to be cut up, so it never holds a whole model.
        offload: keep this process's part on the host.

    Returns:
        the names of the components that are dealt out; they are where they belong.
    """
    pin = device.type == "cuda"
    policy = CPUOffloadPolicy(pin_memory=pin) if offload else OffloadPolicy()
    transformer, text = pipe.transformer, pipe.text_encoder
    for model, parts in ((transformer, [*transformer.blocks, transformer.audio_adapter]), (text, list(text.encoder.block))):
        model.requires_grad_(False)  # FSDP2 wants one dtype of what trains; the transformer's modulation is float32 among bfloat16
        for part in [*parts, model]:
            fully_shard(part, mesh=mesh.sequence, reshard_after_forward=True, offload_policy=policy)
        whole = sum(weight.nbytes for weight in model.parameters())
        logger.info("%s: this process keeps %.2f of %.2f GB of weights", type(model).__name__, held_bytes(model) / 1e9, whole / 1e9)
    pipe.runs_on = device
    return "transformer", "text_encoder"


def held_bytes(module: nn.Module) -> int:
    """Bytes of a module's weights that this process keeps."""
    return sum(getattr(weight, "to_local", lambda weight=weight: weight)().nbytes for weight in module.parameters())

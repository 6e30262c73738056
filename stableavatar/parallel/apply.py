"""A loaded pipeline becomes one of several processes, and its models go where they are to run: all of it, in the one order that works."""

from typing import TYPE_CHECKING

import torch

from stableavatar.config import InferenceConfig
from stableavatar.parallel.launch import leads
from stableavatar.parallel.mesh import Mesh
from stableavatar.parallel.sequence import apply_sequence_parallel
from stableavatar.parallel.shard import shard_weights
from stableavatar.sampling.offload import mode_for, place

if TYPE_CHECKING:
    from stableavatar.pipeline import StableAvatarPipeline


def apply_parallel(pipe: "StableAvatarPipeline", config: InferenceConfig, device: torch.device, mesh: Mesh | None) -> None:
    """Tunes and places a pipeline whose LoRAs are merged.

    The attention backend comes first, because sequence parallelism wraps it; blocks are compiled with what they then attend with; weights
    are dealt out or placed last, because that hooks into the modules as they are by then.

    Args:
        device: this process's own.
        mesh: None for a single process.
    """
    pipe.transformer.set_attention_backend(config.attention)
    if mesh is not None:
        pipe.parallel = mesh
        apply_sequence_parallel(pipe.transformer, mesh)
        if not leads(mesh):
            pipe.set_progress_bar_config(disable=True)
    if config.compile:
        pipe.transformer.compile_repeated_blocks()
    placed = ()
    if config.parallel.shard:
        assert mesh is not None, "config.check lets weights be dealt out to several processes only"
        placed = shard_weights(pipe, mesh, device, config.parallel.offload)
    place(pipe, mode_for(config.memory, device), device, placed)

"""What learns: the transformer with its trainable weights, their optimiser, schedule and moving average, on every process."""

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from stableavatar.data.samples import Bucket
from stableavatar.geometry import frame_tokens
from stableavatar.models.dit import AvatarTransformer
from stableavatar.models.lora import TrainedLora, add_lora, target_pattern
from stableavatar.parallel.mesh import Mesh
from stableavatar.parallel.sequence import apply_sequence_parallel, check_sequence
from stableavatar.training.config import TrainConfig
from stableavatar.training.ema import Ema
from stableavatar.training.estimate import estimate
from stableavatar.training.optimizer import clip_gradients, make_optimizer, make_schedule
from stableavatar.training.parts import load_training_transformer, transformer_settings
from stableavatar.training.processes import data_parallel, on_main, strategy, training_dtype
from stableavatar.training.state import ExactState, write_transformer
from stableavatar.training.trainable import parameter_groups, select, to_training_dtype, trained

LORA = "lora.safetensors"
"""Inside a checkpoint of a LoRA run."""


def check_trainable(config: TrainConfig) -> None:
    """Raise ValueError for a LoRA or an optimiser that cannot be made, before anything is loaded."""
    if config.what == "lora":
        target_pattern(config.lora.targets, adapter=False)
    make_optimizer(parameter_groups(nn.Linear(1, 1), config.optimizer), config.optimizer)


def check_sharing(config: TrainConfig, accelerator: Accelerator, sizes: Sequence[tuple[int, int]]) -> None:
    """Raise ValueError if processes cannot share sequences as the settings say, before anything is loaded.

    Args:
        sizes: width and height of all samples and videos.
    """
    data_parallel(accelerator, config)
    if config.parallel.size == 1:
        return
    heads = transformer_settings(config)["num_heads"]
    for width, height in sizes:
        check_sequence(heads, frame_tokens(width, height), config.parallel.ulysses, config.parallel.ring)


def share_sequences(transformer: AvatarTransformer, config: TrainConfig, accelerator: Accelerator) -> None:
    """Lets processes share each sample's tokens, where the settings want it.

    Every process then has its tokens' part of the gradients of a loss that is the whole sample's. Their sum is wanted, and strategies
    average over all processes: the same, for `Trainer._share` multiplies by the number of all processes.
    """
    if config.parallel.size > 1:
        groups = data_parallel(accelerator, config).size  # as independent of each other as windows are
        sizes = {"windows": groups, "ring": config.parallel.ring, "ulysses": config.parallel.ulysses}
        apply_sequence_parallel(transformer, Mesh.over(accelerator.device.type, **sizes))


def make_trainable(transformer: AvatarTransformer, config: TrainConfig) -> TrainedLora | None:
    """Chooses what trains and in which precision; gives what saving a LoRA needs, None if there is none."""
    lora = None
    if config.what == "lora":
        lora = add_lora(transformer, config.lora.rank, config.lora.alpha, config.lora.targets, config.lora.adapter, config.seed)
    else:
        select(transformer, config.what)
    to_training_dtype(transformer, training_dtype(config))
    transformer.set_attention_backend(config.attention)
    if config.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    return lora


class Learner:
    """The network and its optimiser, prepared by accelerate.

    Attributes:
        transformer: as the pipeline takes it; model: as the launcher's strategy wrapped it.
        plans: memory and operations, bucket by bucket.

    Args:
        total_steps: optimiser steps of the whole run, for the schedule.
        buckets: of the samples to come, for the estimate of what they cost.
    """

    def __init__(self, config: TrainConfig, accelerator: Accelerator, total_steps: int, buckets: Sequence[Bucket]) -> None:
        self.config, self.accelerator = config, accelerator
        # A base that stays frozen is read in what it computes in; what trains becomes float32 below.
        transformer = load_training_transformer(config, training_dtype(config) if config.what == "lora" else None)
        self.lora = make_trainable(transformer, config)
        self.text_length = transformer.config.text_length
        self.plans = on_main(accelerator, lambda: estimate(transformer, config, accelerator.num_processes, strategy(accelerator), buckets))
        share_sequences(transformer, config, accelerator)
        if config.compile:
            transformer.compile_repeated_blocks()
        optimizer = make_optimizer(parameter_groups(transformer, config.optimizer), config.optimizer)
        self.schedule = make_schedule(optimizer, config.optimizer, total_steps)
        self.model, self.optimizer = accelerator.prepare(transformer.train(), optimizer)
        self.transformer: AvatarTransformer = accelerator.unwrap_model(self.model)
        self.ema = Ema(self.transformer, config.optimizer.ema) if config.optimizer.ema else None
        self._state = ExactState(accelerator, self.schedule, self.ema)

    def backward(self, loss: Tensor, step: int) -> float | None:
        """Gradients of a forward's loss; after the last forward of an optimiser step they are clipped (DeepSpeed then has updated too).

        Args:
            step: optimiser steps before this one.

        Returns:
            the norm that the gradient had before clipping; None for a forward that is not the last.
        """
        self.accelerator.backward(loss)
        if not self.accelerator.sync_gradients:
            return None
        if strategy(self.accelerator).startswith("zero"):
            return float(self.model.get_global_grad_norm())
        return clip_gradients(trained(self.transformer).values(), self.config.optimizer, step)

    def update(self) -> None:
        """The optimiser's step, if this was the last forward of one."""
        if self.accelerator.sync_gradients:
            self.optimizer.step()
            self.schedule.step()
            self.optimizer.zero_grad()
            if self.ema:
                self.ema.step()

    @property
    def learning_rate(self) -> float:
        """Of the main group."""
        return self.schedule.get_last_lr()[0]

    def save(self, folder: Path) -> None:
        """Writes a checkpoint: the exact state, and the weights for use; called by all processes."""
        self._state.save(folder / "state")
        weights, dtype = self._weights_for_use(), getattr(torch, self.config.checkpoint.dtype)
        if not self.accelerator.is_main_process:
            return
        if self.lora:
            self.lora.save(folder / LORA, weights.items(), self.schedule.last_epoch, dtype)
        else:
            write_transformer(self.transformer, weights, folder, dtype, self.config.checkpoint.released)

    def load(self, folder: Path) -> None:
        """Goes on from a checkpoint. Raises ValueError if it is of a run of another kind."""
        self._state.load(folder / "state")

    def _weights_for_use(self) -> dict[str, Tensor]:
        """Weights by name on the main process's host, the averaged ones if there is an average; of a LoRA run those that train."""
        wanted = trained(self.transformer) if self.lora else None
        with self.ema.swapped() if self.ema else nullcontext():
            state = self.accelerator.get_state_dict(self.model)
            if not self.accelerator.is_main_process:
                return {}
            return {name: tensor.to("cpu", copy=True) for name, tensor in state.items() if wanted is None or name in wanted}

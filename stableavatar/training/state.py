"""What a checkpoint holds: the exact state to resume from, and the weights for use."""

from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from stableavatar.models.checkpoint_writing import write_state_dict
from stableavatar.models.dit import AvatarTransformer
from stableavatar.models.strict_loading import export_tensors, kept_in_float32
from stableavatar.training.ema import Ema
from stableavatar.training.processes import has_parts_only
from stableavatar.training.trainable import trained

TRAINED = "trained.safetensors"
TRANSFORMER = "transformer"
RELEASED = "transformer3d.safetensors"
CONFIGURED = {"weight_decay", "betas", "eps", "momentum"}
"""What a group of weights takes from the settings, also after a resume; its learning rate is the schedule's."""


@dataclass
class Position:
    """Where a run is: optimiser steps in all, the epoch, and steps within it; `seen` counts samples."""

    step: int = 0
    epoch: int = 0
    epoch_step: int = 0
    seen: int = 0

    def advance(self, samples: int, steps_per_epoch: int) -> bool:
        """One optimiser step further; True at the end of an epoch."""
        self.step, self.epoch_step, self.seen = self.step + 1, self.epoch_step + 1, self.seen + samples
        ended = self.epoch_step == steps_per_epoch
        if ended:
            self.epoch, self.epoch_step = self.epoch + 1, 0
        return ended


class ExactState:
    """Saves and loads what the next step depends on, through accelerate: weights that train, optimiser, schedule, average, generators.

    Without sharding only the weights that train are written; frozen ones come from their own files. Sharded strategies write theirs.
    """

    def __init__(self, accelerator: Accelerator, schedule: LambdaLR, ema: Ema | None) -> None:
        self.accelerator, self.schedule, self.ema = accelerator, schedule, ema
        accelerator.register_save_state_pre_hook(self._save_weights)
        accelerator.register_load_state_pre_hook(self._load_weights)

    def save(self, folder: Path) -> None:
        """Writes the state of every process into a folder; called by all of them. Raises ValueError if it cannot be written."""
        try:
            self.accelerator.save_state(str(folder))
            if self.accelerator.is_main_process:
                torch.save(self.schedule.state_dict(), folder / "schedule.pt")
            if self.ema and (self.accelerator.is_main_process or has_parts_only(self.accelerator)):
                torch.save(self.ema.state_dict(), self._ema_file(folder))
        except (OSError, RuntimeError, SafetensorError) as error:  # torch says RuntimeError where the disk is full
            raise ValueError(f"cannot write the checkpoint {folder} ({str(error).splitlines()[0]}); is there room on the disk?") from error

    def load(self, folder: Path) -> None:
        """Takes over what `save` wrote, but for rates and the like, which are those of the settings.

        Raises:
            ValueError: it was saved by a run of another kind.
        """
        schedule, optimizer = self.schedule, self.schedule.optimizer
        configured = [{key: group[key] for key in CONFIGURED & group.keys()} for group in optimizer.param_groups]
        try:
            self.accelerator.load_state(str(folder))
            self.accelerator.step = 0  # forwards since an update; the saved count may be of another accumulation, out of phase with ours
            schedule.load_state_dict(torch.load(folder / "schedule.pt", weights_only=True) | {"base_lrs": schedule.base_lrs})
            if self.ema:
                self.ema.load_state_dict(torch.load(self._ema_file(folder), weights_only=True, map_location="cpu"))
        except FileNotFoundError as error:
            raise ValueError(f"{folder} lacks {error.filename}: it is of a run with another strategy, ema or number of processes") from None
        for group, settings, rate, factor in zip(optimizer.param_groups, configured, schedule.base_lrs, schedule.lr_lambdas, strict=True):
            group.update(settings, lr=rate * factor(schedule.last_epoch))

    def _ema_file(self, folder: Path) -> Path:
        part = self.accelerator.process_index if has_parts_only(self.accelerator) else 0
        return folder / f"ema_{part}.pt"

    def _save_weights(self, models: list[nn.Module], weights: list[dict[str, Tensor]], folder: str) -> None:
        if weights:  # neither FSDP nor DeepSpeed, which have written theirs
            weights.pop()
            if self.accelerator.is_main_process:
                tensors = {name: parameter.detach().contiguous() for name, parameter in self._trained(models[0]).items()}
                save_file(tensors, Path(folder) / TRAINED)

    def _load_weights(self, models: list[nn.Module], folder: str) -> None:
        file = Path(folder) / TRAINED
        if not file.is_file():
            return
        parameters, saved = self._trained(models.pop()), load_file(file)
        if {name: x.shape for name, x in saved.items()} != {name: x.shape for name, x in parameters.items()}:
            raise ValueError(f"{file} holds {len(saved)} weights, other ones than the {len(parameters)} that train; resume with the same "
                             "model, what and lora")
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(saved[name])

    def _trained(self, model: nn.Module) -> dict[str, nn.Parameter]:
        return trained(self.accelerator.unwrap_model(model))


def write_transformer(model: AvatarTransformer, state: dict[str, Tensor], folder: Path, dtype: torch.dtype, released: bool) -> None:
    """Writes the weights in our layout (config.json beside them) and, if wanted, in one file under their released names.

    Args:
        state: weights by the model's own names.
        dtype: to round to; what the class keeps in float32 stays so.
    """
    state = {name: tensor.to(torch.float32 if kept_in_float32(model, name, dtype) else dtype) for name, tensor in state.items()}
    model.save_config(folder / TRANSFORMER)
    write_state_dict(folder / TRANSFORMER / "diffusion_pytorch_model.safetensors", state)
    if released:
        write_state_dict(folder / RELEASED, dict(export_tensors(model, state.__getitem__)))

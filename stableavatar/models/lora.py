"""LoRA on the transformer through peft: added for training, or loaded from files and merged into the weights."""

import hashlib
import logging
import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, set_peft_model_state_dict
from peft.functional import cast_adapter_dtype
from torch import Tensor
from torch.nn import functional

from stableavatar.models.dit import AvatarTransformer
from stableavatar.models.lora_files import ALPHA, DIFFERENCE, DOWN, Lora, read_lora, tensor_name, write_lora

logger = logging.getLogger(__name__)

TARGETS = {
    "q": r"(self|cross)_attn\.q",
    "k": r"(self|cross)_attn\.k(_img|_audio)?",
    "v": r"(self|cross)_attn\.v(_img|_audio)?",
    "o": r"(self|cross)_attn\.o",
    "ffn": r"ffn\.[02]",
}
"""Word of the settings -> linears of a block."""
ADAPTER_PREFIX = "audio_adapter."
TRAINED = "trained"
"""peft's name for the LoRA that trains."""
SAMPLED = 16
"""Values of each tensor that a fingerprint looks at."""


@dataclass(frozen=True)
class TrainedLora:
    """What it takes to save a LoRA while it trains.

    Attributes:
        base: host copies, from before training, of the tensors that are trained whole.
        about: rank, alpha, targets, adapter, the transformer's configuration and the fingerprint of the base.
    """

    base: dict[str, Tensor]
    about: dict[str, Any]

    def tensors(self, parameters: Iterable[tuple[str, Tensor]], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """The tensors of the file (see `lora_files`), on the host.

        Args:
            parameters: the model's `named_parameters()`, or other values (a moving average) under these names; frozen ones are skipped.
            dtype: of matrices and differences.
        """
        parameters, found = dict(parameters), {}
        assert self.base.keys() <= parameters.keys(), "values of all tensors that train are needed"
        for name, value in parameters.items():
            value = value.detach().cpu()
            if ".lora_" in name:
                found[name.replace(f".{TRAINED}.", ".")] = value.to(dtype, copy=True)
            elif name in self.base:
                found[tensor_name(name, DIFFERENCE)] = (value.float() - self.base[name].float()).to(dtype)
        alpha = torch.tensor(float(self.about["alpha"]))
        return found | {name.replace(DOWN, ALPHA): alpha for name in found if name.endswith(DOWN)}

    def save(
        self, path: str | Path, parameters: Iterable[tuple[str, Tensor]], step: int, dtype: torch.dtype = torch.float32
    ) -> None:
        """Writes the LoRA as it is after `step` optimiser steps; arguments as of `tensors`. Raises ValueError if it cannot be written."""
        write_lora(path, self.tensors(parameters, dtype), self.about | {"step": step})


def add_lora(model: AvatarTransformer, rank: int, alpha: float, targets: str, adapter: str, seed: int) -> TrainedLora:
    """Adds a LoRA that trains to a transformer, whose own weights freeze. Its output does not change: B starts at zero.

    Args:
        rank, alpha: the update of a linear is alpha / rank * B A; A and B are in float32 whatever the model is in.
        targets: any of q, k, v, o, ffn, separated by commas: linears of the blocks.
        adapter: the audio adapter's blocks get a LoRA too (`lora`), the adapter is trained `whole`, or not at all (`frozen`).
        seed: of A.

    Raises:
        ValueError: unknown or no targets, or an unknown word for the adapter.
    """
    config = {key: value for key, value in model.config.items() if not key.startswith("_")}
    about = {"rank": rank, "alpha": alpha, "targets": targets, "adapter": adapter, "base": fingerprint(model), "transformer": config}
    whole = {name: p for name, p in model.named_parameters() if adapter == "whole" and name.startswith(ADAPTER_PREFIX)}
    base = {name: parameter.detach().to("cpu", copy=True) for name, parameter in whole.items()}
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        inject_lora(model, rank, alpha, targets, adapter)
    return TrainedLora(base, about)


def inject_lora(model: AvatarTransformer, rank: int, alpha: float, targets: str, adapter: str) -> None:
    """What `add_lora` does to the model, which may be without memory for its weights. Raises ValueError as add_lora."""
    if adapter not in ("whole", "lora", "frozen"):
        raise ValueError(f"the audio adapter must be trained whole, lora or frozen, got {adapter!r}")
    _inject(model, LoraConfig(r=rank, lora_alpha=alpha, target_modules=target_pattern(targets, adapter == "lora")), TRAINED)
    if adapter == "whole":
        model.audio_adapter.requires_grad_(True)


def target_pattern(targets: str, adapter: bool) -> str:
    """Regular expression of the linears that are targets, with or without those of the audio adapter. Raises ValueError as add_lora."""
    words = [word.strip() for word in targets.split(",") if word.strip()]
    unknown = [word for word in words if word not in TARGETS]
    if unknown or not words:
        raise ValueError(f"LoRA targets must be some of {', '.join(TARGETS)}, got {(unknown or [targets])[0]!r}")
    prefix = f"({re.escape(ADAPTER_PREFIX)})?" if adapter else ""
    return rf"{prefix}blocks\.\d+\.({'|'.join(TARGETS[word] for word in words)})"


def fingerprint(model: AvatarTransformer) -> str:
    """Short name of a model's weights, the same in float32 and bfloat16 if the weights were published in either."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        sample = parameter.detach().flatten()[:SAMPLED].to("cpu", torch.bfloat16)
        digest.update(name.encode() + sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


@torch.no_grad()
def apply_loras(model: AvatarTransformer, files: Sequence[tuple[str | Path, float]]) -> None:
    """Puts LoRA files on a transformer, each with its weight: output = base + sum of weight * LoRA.

    Low-rank updates become branches beside the linears, which cost time at every forward until `merge` folds them in; differences
    are added to the weights at once. All files are checked before anything changes.

    Args:
        model: without adapters.

    Raises:
        ValueError: as read_lora.
    """
    loras = [(read_lora(path, model), weight) for path, weight in files]
    _warn_of_other_bases(model, files, [lora for lora, _ in loras])
    for lora, weight in loras:
        for name, difference in lora.differences.items():
            model.get_parameter(name).add_(difference.to(model.device).float() * weight)
    names = {f"lora_{number}": weight for number, (lora, weight) in enumerate(loras) if lora.matrices}
    for number, (lora, _) in enumerate(loras):
        if lora.matrices:
            _attach(model, lora, f"lora_{number}")
    if names:
        model.set_adapters(list(names), list(names.values()))


def merge(model: AvatarTransformer) -> None:
    """Folds low-rank updates into the weights: a plain transformer again, of the same output and speed as its base."""
    model.fuse_lora()
    model.unload_lora()


def merge_files(model: AvatarTransformer, files: Sequence[tuple[str | Path, float]]) -> None:
    """Adds LoRA files to the weights of a plain transformer. Raises ValueError as apply_loras."""
    apply_loras(model, files)
    merge(model)


def unmerge_files(model: AvatarTransformer, files: Sequence[tuple[str | Path, float]]) -> None:
    """Takes merged files out of the weights again, up to the rounding of the model's dtype; no copy of the base is kept.

    Raises:
        ValueError: as apply_loras.
    """
    merge_files(model, [(path, -weight) for path, weight in files])


def _inject(model: AvatarTransformer, config: LoraConfig, name: str) -> None:
    """Branches in float32 beside the linears that a configuration names; the model's own weights freeze."""
    with warnings.catch_warnings():  # peft wonders about a second adapter, which is meant
        warnings.filterwarnings("ignore", "Already found a `peft_config`")
        model.add_adapter(config, name)
    cast_adapter_dtype(model, name)


def _attach(model: AvatarTransformer, lora: Lora, name: str) -> None:
    """The low-rank updates of a file as peft's adapter `name`; those of smaller rank than others are padded with zeros."""
    rank = max(len(down) for down, _ in lora.matrices.values())
    pattern = "|".join(map(re.escape, lora.matrices))
    with torch.random.fork_rng(devices=[]):
        _inject(model, LoraConfig(r=rank, lora_alpha=rank, target_modules=pattern), name)
    tensors = {}
    for module, (down, up) in lora.matrices.items():
        missing = rank - len(down)
        tensors[f"{module}.lora_A.weight"] = functional.pad(down.float(), (0, 0, 0, missing))
        tensors[f"{module}.lora_B.weight"] = functional.pad(up, (0, missing))
    result = set_peft_model_state_dict(model, tensors, name)
    assert not result.unexpected_keys, result.unexpected_keys


def _warn_of_other_bases(model: AvatarTransformer, files: Sequence[tuple[str | Path, float]], loras: list[Lora]) -> None:
    """Says which files were trained on other weights than the model's (float16 cannot tell: it rounds otherwise)."""
    if model.dtype == torch.float16 or not any("base" in lora.about for lora in loras):
        return
    found = fingerprint(model)
    for (path, weight), lora in zip(files, loras, strict=True):
        if weight > 0 and lora.about.get("base", found) != found:
            logger.warning("%s was trained on another transformer than this one; its effect may differ", path)

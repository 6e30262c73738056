"""Models without memory, filled tensor by tensor from a released file once every name and shape has been compared.

And back: a model's tensors under their released names.
"""

from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import TypeVar

import torch
from accelerate import init_empty_weights
from diffusers import ModelMixin
from torch import Tensor, nn
from transformers import PreTrainedModel

from stableavatar.models.checkpoint_files import Checkpoint, Shapes
from stableavatar.models.key_maps import Source, released_sources

Model = TypeVar("Model", bound=nn.Module)

LISTED = 10
"""Names of wrong tensors that an error spells out; more are counted."""


def empty_model(build: Callable[[], Model]) -> Model:
    """A model whose parameters have shapes but no memory yet; its buffers are real."""
    with init_empty_weights(include_buffers=False):
        model = build()
    if isinstance(model, PreTrainedModel):
        model.tie_weights()
    return model


def export_tensors(model: nn.Module, tensors: Callable[[str], Tensor] | None = None) -> Iterator[tuple[str, Tensor]]:
    """Yields (released name, tensor) of a model of one of the four kinds; names have no prefix.

    Args:
        tensors: gives the tensor for one of our names, for a model without memory; None: the model's own.
    """
    tensors = tensors or model.get_parameter
    for name, targets in by_released(released_sources(model)).items():
        ordered = sorted(targets, key=lambda target: target[1].part)
        yield name, ordered[0][1].released([tensors(ours) for ours, _ in ordered])


def export_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Everything of `export_tensors` at once."""
    return dict(export_tensors(model))


def released_shapes(model: nn.Module) -> Shapes:
    """Released name -> shape; the model may be on the meta device."""
    return {name: tensor.shape for name, tensor in export_tensors(model)}


def check_shapes(path: Path, found: Shapes, expected: Shapes) -> None:
    """ValueError that lists the tensors of `path` that are missing, left over, or of another shape."""
    wrong = [name for name in expected if name in found and found[name] != expected[name]]
    problems = {
        "missing": [name for name in expected if name not in found],
        "left over": [name for name in found if name not in expected],
        "of another shape": [f"{name} {list(found[name])} instead of {list(expected[name])}" for name in wrong],
    }
    listed = [f"{len(names)} {kind}: {_shorten(names)}" for kind, names in problems.items() if names]
    if listed:
        raise ValueError(f"{path} does not fit the model; tensors {'; '.join(listed)}")


def _shorten(names: list[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more


def by_released(sources: dict[str, Source]) -> dict[str, list[tuple[str, Source]]]:
    """Released name -> all of our tensors that it holds."""
    groups: dict[str, list[tuple[str, Source]]] = {}
    for ours, source in sources.items():
        groups.setdefault(source.name, []).append((ours, source))
    return groups


def fill(model: Model, file: Checkpoint, dtype: torch.dtype | None, device: str | torch.device, absent: Collection[str] = ()) -> Model:
    """Checks names and shapes, then copies each tensor from the file to its place.

    Args:
        dtype: None keeps the file's.
        absent: released names that the file need not have; theirs stay without memory.
    """
    expected = {name: shape for name, shape in released_shapes(model).items() if name not in absent}
    check_shapes(file.path, file.shapes, expected)
    targets = by_released(released_sources(model))
    for name, tensor in file.read():
        for ours, source in targets[name]:
            place(model, ours, source.ours(tensor), dtype, device)
    if isinstance(model, PreTrainedModel):
        model.tie_weights()
    return model


def place(model: nn.Module, name: str, tensor: Tensor, dtype: torch.dtype | None, device: str | torch.device) -> None:
    """Copies a tensor into the model; parameters that the model's class keeps in float32 are not rounded."""
    if dtype and kept_in_float32(model, name, dtype):
        dtype = torch.float32
    place = torch.empty(tensor.shape, dtype=dtype or tensor.dtype, device=device)
    module, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(module), leaf, nn.Parameter(place.copy_(tensor)))


def kept_in_float32(model: nn.Module, name: str, dtype: torch.dtype) -> bool:
    """The libraries' own rule: diffusers keeps the marked modules for every dtype, transformers for float16 only."""
    marked = set(model._keep_in_fp32_modules or ()) & set(name.split("."))
    return bool(marked) and (isinstance(model, ModelMixin) or dtype == torch.float16)

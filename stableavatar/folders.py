"""Pipeline folders on disk (save_pretrained), loaded strictly: every tensor of every model comes from its file."""

import json
from pathlib import Path
from typing import TypeVar

import torch
from diffusers import DiffusionPipeline
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import nn

from stableavatar.models.checkpoint_files import TORCH_ERRORS

INDEX_FILE = "model_index.json"
NAMED = 3
"""Tensors that an error names; a checkpoint of another model differs in hundreds."""
REASON_LENGTH = 300
"""Characters of a library's complaint that are passed on."""
P = TypeVar("P", bound=DiffusionPipeline)


def load_folder(cls: type[P], folder: Path, dtypes: dict[str, torch.dtype]) -> P:
    """The pipeline saved in `folder`, without touching the network.

    Args:
        dtypes: of the components by name; "default" for the others.

    Raises:
        ValueError: not a folder of this pipeline, a component missing, damaged, with weights of another model or with settings
            that its class does not take.
    """
    check_index(cls, folder)
    try:
        pipe = cls.from_pretrained(folder, dtype=dtypes, local_files_only=True, use_safetensors=True)
    except (OSError, SafetensorError, StrictDataclassError, *TORCH_ERRORS) as error:
        reason = " ".join(str(error).split())[:REASON_LENGTH] or type(error).__name__
        raise ValueError(f"cannot load the pipeline in {folder}; a config.json in it may be wrong, or a file damaged: {reason}") from error
    for name, module in pipe.components.items():
        if isinstance(module, nn.Module):
            check_names(module, folder / name)
    return pipe


def check_index(cls: type[DiffusionPipeline], folder: Path) -> None:
    """Raise ValueError unless `folder` says that it holds a `cls` and has a folder for each component."""
    if not (folder / INDEX_FILE).is_file():
        raise ValueError(f"{folder} is no pipeline folder: it has no {INDEX_FILE}; scripts/make_tiny_model.py makes a tiny one")
    try:
        index = json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{folder / INDEX_FILE} is not JSON: {error}") from None
    kind = index.get("_class_name") if isinstance(index, dict) else None
    if kind != cls.__name__:
        raise ValueError(f"{folder} holds a {kind}, expected a {cls.__name__}")
    if missing := [name for name, value in index.items() if isinstance(value, list) and not (folder / name).is_dir()]:
        raise ValueError(f"the pipeline folder {folder} lacks {', '.join(missing)}")


def check_names(module: nn.Module, folder: Path) -> None:
    """Raise ValueError if the files in `folder` lack tensors of `module`, or hold others; a shared tensor needs to be there once."""
    saved: set[str] = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            saved.update(tensors.keys())
    expected = module.state_dict(keep_vars=True)
    loaded = {id(tensor) for name, tensor in expected.items() if name in saved}
    missing = sorted(name for name, tensor in expected.items() if id(tensor) not in loaded)
    for what, names in (("lacks", missing), ("holds unknown", sorted(saved - expected.keys()))):
        if names:
            more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
            raise ValueError(f"{folder} is of another model than its config.json: it {what} {', '.join(names[:NAMED])}{more}")

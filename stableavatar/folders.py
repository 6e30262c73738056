"""Pipeline folders on disk (save_pretrained), loaded strictly: every tensor of every model comes from its file."""

import json
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch
from diffusers import ConfigMixin, DiffusionPipeline, ModelMixin
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
M = TypeVar("M", bound=ModelMixin)


def load_folder(cls: type[P], folder: Path, dtypes: dict[str, torch.dtype], without: Collection[str] = ()) -> P:
    """The pipeline saved in `folder`, without touching the network.

    Args:
        dtypes: of the components by name; "default" for the others.
        without: components that are not needed: they are None, and the folder may lack them.

    Raises:
        ValueError: not a folder of this pipeline, a component missing, damaged, with weights of another model or with settings
            that its class does not take.
    """
    check_index(cls, folder, without)
    with library_errors(f"the pipeline in {folder}"):
        pipe = cls.from_pretrained(folder, dtype=dtypes, local_files_only=True, use_safetensors=True, **dict.fromkeys(without))
    for name, module in pipe.components.items():
        if isinstance(module, nn.Module):
            check_names(module, folder / name)
        _forget_folder(module)
    _forget_folder(pipe)
    return pipe


def load_model(cls: type[M], folder: Path, dtype: torch.dtype) -> M:
    """One model saved in `folder` by save_pretrained. Raises ValueError as load_folder does."""
    with library_errors(f"the model in {folder}"):
        model = cls.from_pretrained(folder, torch_dtype=dtype, local_files_only=True, use_safetensors=True)
    check_names(model, folder)
    _forget_folder(model)
    return model


def _forget_folder(loaded: object) -> None:
    """What the library notes in the config of all that it loads: a path of this machine, which would be saved with it."""
    if isinstance(loaded, ConfigMixin):
        loaded.register_to_config(_name_or_path="")


@contextmanager
def library_errors(what: str) -> Iterator[None]:
    """A library's complaint while it loads `what`, as one line."""
    try:
        yield
    except (OSError, SafetensorError, StrictDataclassError, *TORCH_ERRORS) as error:
        reason = " ".join(str(error).split())[:REASON_LENGTH] or type(error).__name__
        raise ValueError(f"cannot load {what}; a config.json in it may be wrong, or a file damaged: {reason}") from error


def check_named(cls: type[DiffusionPipeline], model: str, checkpoints: str, without: Collection[str] = ()) -> None:
    """Raise ValueError if no model is named, or `model` is not the folder of a `cls`; other files are checked as they load."""
    if not (model or checkpoints):
        raise ValueError("no model is named; give model=FOLDER (a complete pipeline) or checkpoints=FOLDER (the released files)")
    if model:
        check_index(cls, Path(model), without)


def check_index(cls: type[DiffusionPipeline], folder: Path, without: Collection[str] = ()) -> None:
    """Raise ValueError unless `folder` says that it holds a `cls` and has a folder for each component but those of `without`."""
    if not (folder / INDEX_FILE).is_file():
        raise ValueError(f"{folder} is no pipeline folder: it has no {INDEX_FILE}; scripts/make_tiny_model.py makes a tiny one")
    try:
        index = json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{folder / INDEX_FILE} is not JSON: {error}") from None
    kind = index.get("_class_name") if isinstance(index, dict) else None
    if kind != cls.__name__:
        raise ValueError(f"{folder} holds a {kind}, expected a {cls.__name__}")
    parts = {name for name, value in index.items() if isinstance(value, list)}
    if missing := sorted(name for name in parts - {*without} if not (folder / name).is_dir()):
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

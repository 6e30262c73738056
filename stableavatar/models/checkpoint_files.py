"""Files of named tensors: names and shapes read without the tensors, then tensors one after another.

Understood: a `.pt` or `.pth` state dict (directly or under "state_dict"), a `.safetensors` file, and sharded safetensors
through their index. Files are memory-mapped and opened anew every gigabyte, so no file is ever held as a whole.
"""

import json
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

Shapes = dict[str, torch.Size]
Opened = tuple[Shapes, Callable[[str], Tensor]]

BYTES_PER_OPENING = 2**30
TORCH_ERRORS = (RuntimeError, pickle.UnpicklingError, struct.error, EOFError, ValueError, LookupError, AttributeError, TypeError)
"""What torch.load may raise for a file that is damaged or holds something else than tensors."""

FOLDER_NAMES = tuple(f"{stem}.safetensors{end}" for stem in ("diffusion_pytorch_model", "model") for end in (".index.json", ""))


class Checkpoint:
    """A file, the shards of an index, or the folder that holds either; nothing but names and shapes is read at first.

    Args:
        path: `.pt`, `.pth`, `.safetensors`, `.safetensors.index.json`, or a folder with one of the usual safetensors names.
        prefix: only tensors whose names start so belong to the model; the rest is passed over and the prefix taken off.

    Attributes:
        shapes: name -> shape of every tensor, in the file's order.

    Raises:
        ValueError: missing, truncated or damaged file, or one without tensors under `prefix`.
    """

    def __init__(self, path: str | Path, prefix: str = "") -> None:
        self.path, self.prefix = Path(path), prefix
        self.shapes: Shapes = {}
        self._homes: dict[str, Path] = {}
        for file in _files(self.path):
            found = {name: shape for name, shape in _open(file)[0].items() if name.startswith(prefix)}
            self.shapes |= {name.removeprefix(prefix): shape for name, shape in found.items()}
            self._homes |= dict.fromkeys(found, file)
        if not self.shapes:
            raise ValueError(f"{self.path} holds no tensors named '{prefix}...': it is a checkpoint of another model")

    def shape(self, name: str, axes: int) -> torch.Size:
        """Shape of a tensor; ValueError if the file has none of that name or with another number of axes."""
        if len(self.shapes.get(name, ())) != axes:
            got = f"'{name}' of shape {list(self.shapes[name])}" if name in self.shapes else f"no '{name}'"
            raise ValueError(f"{self.path} is a checkpoint of another model: it has {got}, expected one with {axes} axes")
        return self.shapes[name]

    def count(self, pattern: str) -> int:
        """How many layers the file has: names like `pattern`, with 0, 1, 2, ... for {}, without a gap."""
        number = 0
        while pattern.format(number) in self.shapes:
            number += 1
        return number

    def read(self) -> Iterator[tuple[str, Tensor]]:
        """Yields every (name, tensor); the tensor is a view of the mapped file, so use or copy it before the next one."""
        opened, budget, get = None, 0, None
        for name in self.shapes:
            home = self._homes[self.prefix + name]
            if home != opened or budget <= 0:
                opened, budget, tensor, get = home, BYTES_PER_OPENING, None, None  # unmaps before it maps again
                get = _open(home)[1]
            tensor = get(self.prefix + name)
            budget -= tensor.nbytes
            yield name, tensor


def _files(path: Path) -> list[Path]:
    """The tensor files behind a path: itself, the shards of an index, or what a folder holds."""
    if path.is_dir():
        inside = next((path / name for name in FOLDER_NAMES if (path / name).is_file()), None)
        if inside is None:
            raise ValueError(f"{path} holds no checkpoint: expected one of {', '.join(FOLDER_NAMES)} in it")
        return _files(inside)
    if not path.is_file():
        raise ValueError(f"checkpoint {path} does not exist")
    if path.suffix != ".json":
        return [path]
    try:
        shards = sorted(set(json.loads(path.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged or no index of safetensors shards ({type(error).__name__})") from error
    return [file for shard in shards for file in _files(path.parent / shard)]


def _open(file: Path) -> Opened:
    """Shapes of a file's tensors, and a function that gives a tensor (a view of the mapped file) for its name."""
    return _open_safetensors(file) if file.suffix == ".safetensors" else _open_torch(file)


def _open_safetensors(file: Path) -> Opened:
    try:
        handle = safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is truncated, damaged or no safetensors file ({_first_line(error)})") from error
    return {name: torch.Size(handle.get_slice(name).get_shape()) for name in handle.keys()}, handle.get_tensor  # noqa: SIM118


def _open_torch(file: Path) -> Opened:
    if not zipfile.is_zipfile(file):
        raise ValueError(f"{file} is truncated, damaged or no checkpoint that torch.save (1.6 or later) wrote")
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except TORCH_ERRORS as error:
        raise ValueError(f"{file} is damaged or holds something else than tensors ({_first_line(error)})") from error
    tensors = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise ValueError(f"{file} holds no state dict: expected tensors by name, directly or under 'state_dict'")
    return {name: tensor.shape for name, tensor in tensors.items()}, tensors.__getitem__


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:120]

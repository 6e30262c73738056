"""Writes files of named tensors one tensor after another, so that a checkpoint larger than memory can be made."""

import json
import mmap
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from stableavatar.files import replacing
from stableavatar.models.checkpoint_files import BYTES_PER_OPENING

Specs = dict[str, tuple[torch.dtype, torch.Size]]
"""Name -> dtype and shape of every tensor of a file."""

SAFETENSORS_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_state_dict(path: str | Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """`write_tensors` for tensors that are all at hand."""
    write_tensors(path, {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}, tensors.items(), metadata)


def write_tensors(
    path: str | Path, specs: Specs, tensors: Iterable[tuple[str, Tensor]], metadata: dict[str, str] | None = None
) -> None:
    """Writes a `.safetensors` file, or a torch state dict for any other ending; only one tensor at a time is in memory.

    The file appears under its name when it is complete, and not at all after an error. The torch file's zip checksums are left
    empty, which torch.load does not mind and `unzip -t` does.

    Args:
        specs: of all tensors to come, since they stand in front of the data.
        tensors: (name, tensor) in any order, each name of `specs` once.
        metadata: for the header of a `.safetensors` file; others have no place for it.

    Raises:
        ValueError: the file cannot be written.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial:
            if path.suffix == ".safetensors":
                _write_safetensors(partial, specs, tensors, metadata or {})
            else:
                _write_torch(partial, specs, tensors)
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror or error}") from error


def _expect(specs: Specs, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The tensors, each once and as announced."""
    left = dict(specs)
    for name, tensor in tensors:
        assert (tensor.dtype, tensor.shape) == left.pop(name), name
        yield name, tensor
    assert not left, f"never given: {list(left)}"


def _write_safetensors(path: Path, specs: Specs, tensors: Iterable[tuple[str, Tensor]], metadata: dict[str, str]) -> None:
    offsets, header, end = {}, {"__metadata__": {"format": "pt"} | metadata}, 0
    for name, (dtype, shape) in sorted(specs.items(), key=lambda item: -item[1][0].itemsize):  # wide ones first: all are aligned
        offsets[name], end = end, end + shape.numel() * dtype.itemsize
        header[name] = {"dtype": SAFETENSORS_DTYPES[dtype], "shape": list(shape), "data_offsets": [offsets[name], end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in _expect(specs, tensors):
            file.seek(8 + len(text) + offsets[name])
            file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def _write_torch(path: Path, specs: Specs, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Saves the file without its data, maps it, and copies the data into the map."""
    try:
        with torch.serialization.skip_data():
            torch.save({name: torch.empty(shape, dtype=dtype) for name, (dtype, shape) in specs.items()}, path)
    except RuntimeError as error:
        raise OSError(str(error).splitlines()[0]) from error
    if hasattr(os, "posix_fallocate"):  # or a full disk would kill the process in the middle of the map
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    places, budget = {}, 0
    for name, tensor in _expect(specs, tensors):
        if budget <= 0:
            places, budget = {}, BYTES_PER_OPENING  # unmaps what was written before it maps again
            with torch.serialization.set_default_mmap_options(mmap.MAP_SHARED):
                places = torch.load(path, weights_only=True, mmap=True)
        places[name].copy_(tensor.detach())
        budget -= tensor.nbytes

"""LoRA files: low-rank updates of linears, and differences of tensors that were trained whole, in one file.

A tensor's name is a place and what it does there; `W` is the base's tensor and every part may be absent:

    PLACE.lora_A.weight [rank, in], PLACE.lora_B.weight [out, rank], PLACE.alpha []      W + alpha / rank * B A, alpha = rank if absent
    PLACE.diff, PLACE.diff_b                                                             weight (or the tensor PLACE itself), bias + diff

PLACE is one of our module names, or `diffusion_model.` before a released one, the layout in which most tools exchange LoRA files.
There A and B may also be called lora_down and lora_up. Differences, unlike values, can be weighted, added up and taken out again.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from stableavatar.models.checkpoint_files import Checkpoint
from stableavatar.models.checkpoint_writing import write_state_dict
from stableavatar.models.dit import AvatarTransformer
from stableavatar.models.key_maps import released_sources
from stableavatar.models.strict_loading import empty_model

RELEASED_PREFIX = "diffusion_model."
ABOUT = "stableavatar_lora"
"""Key of the file's metadata that holds, as JSON, how the LoRA was trained and what its base was."""

DOWN, UP, ALPHA, DIFFERENCE = "lora_A.weight", "lora_B.weight", "alpha", "diff"
KINDS = {kind: kind for kind in (DOWN, UP, ALPHA, DIFFERENCE)}
KINDS |= {"lora_down.weight": DOWN, "lora_up.weight": UP, "diff_b": DIFFERENCE}
"""End of a tensor's name -> what it is."""
TENSOR = re.compile(rf"(.+)\.({'|'.join(map(re.escape, KINDS))})")

Kinds = dict[str, str]
"""What there is for one parameter: kind -> name in the file."""


@dataclass(frozen=True)
class Lora:
    """A LoRA file that fits a model.

    Attributes:
        matrices: our name of a linear -> down [rank, in] and up [out, rank], which includes alpha / rank.
        differences: our name of a parameter -> what is added to it.
        about: the file's own description; empty for files of other tools.
    """

    matrices: dict[str, tuple[Tensor, Tensor]]
    differences: dict[str, Tensor]
    about: dict[str, Any]


def tensor_name(parameter: str, kind: str) -> str:
    """Name in a file of what is there for a parameter, ours or a released one."""
    place, _, leaf = parameter.rpartition(".")
    if leaf == "bias":
        return f"{place}.diff_b"
    return f"{place if leaf == 'weight' else parameter}.{kind}"


def parse_loras(text: str) -> list[tuple[Path, float]]:
    """`a.safetensors,b.safetensors:0.5` -> [(a.safetensors, 1.0), (b.safetensors, 0.5)]. Raises ValueError for a weight that is none."""
    files = []
    for word in filter(None, map(str.strip, text.split(","))):
        match = re.fullmatch(r"(.+\.\w+):([^:/]*)", word)
        try:
            weight = float(match[2]) if match else 1.0
        except ValueError:
            weight = math.nan
        if not math.isfinite(weight):
            raise ValueError(f"the weight of a LoRA must be a number, as in FILE:0.8; got {word!r}")
        files.append((Path(match[1] if match else word), weight))
    return files


def check_loras(text: str) -> None:
    """Raise ValueError unless all files of a list can be read and are LoRA files, as far as their names tell."""
    for path, _ in parse_loras(text):
        _split_names(Checkpoint(path))


def read_lora(path: str | Path, model: AvatarTransformer) -> Lora:
    """What a file adds to a model.

    Args:
        model: without adapters; may be without memory.

    Raises:
        ValueError: unreadable, no LoRA file, or with a tensor that the model has no place of that shape for.
    """
    file = Checkpoint(path)
    grouped = _group(file, model)
    for parameter, kinds in grouped.items():
        _check(file, model, parameter, kinds)
    tensors = {name: tensor.clone() for name, tensor in file.read()}
    matrices, differences = {}, {}
    for parameter, kinds in grouped.items():
        found = {kind: tensors[name] for kind, name in kinds.items()}
        if DIFFERENCE in found:
            differences[parameter] = found[DIFFERENCE]
        if DOWN in found:
            scale = found[ALPHA].item() / len(found[DOWN]) if ALPHA in found else 1.0
            matrices[parameter.removesuffix(".weight")] = found[DOWN], found[UP].float() * scale
    return Lora(matrices, differences, read_about(path))


def read_about(path: str | Path) -> dict[str, Any]:
    """How the LoRA of a file was trained; empty if the file does not say. Raises ValueError if it says so in a broken way."""
    if Path(path).suffix != ".safetensors":
        return {}
    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {}).get(ABOUT, "{}"))
    except (OSError, SafetensorError, ValueError) as error:
        raise ValueError(f"the description in {path} cannot be read: {error}") from None
    if not isinstance(about, dict):
        raise ValueError(f"the description in {path} must be a mapping, got a {type(about).__name__}")
    return about


def describe(path: str | Path) -> dict[str, Any]:
    """What a file holds, fact by fact: what it says of itself, and what its tensors tell. Raises ValueError as check_loras."""
    file, about = Checkpoint(path), read_about(path)
    kinds = {name: KINDS[end] for name, (_, end) in _split_names(file).items()}
    ranks = {file.shapes[name][0] for name, kind in kinds.items() if kind == DOWN}
    said = {key: about[key] for key in ("alpha", "targets", "adapter", "step", "base") if key in about}
    return {
        "rank": ", ".join(map(str, sorted(ranks))) or "no low-rank updates",
        **said,
        "low-rank updates": sum(kind == DOWN for kind in kinds.values()),
        "tensors trained whole": sum(kind == DIFFERENCE for kind in kinds.values()),
        "parameters": sum(file.shapes[name].numel() for name, kind in kinds.items() if kind != ALPHA),
        "names": "released" if next(iter(kinds)).startswith(RELEASED_PREFIX) else "ours",
    }


def write_lora(path: str | Path, tensors: Mapping[str, Tensor], about: dict[str, Any]) -> None:
    """Writes a LoRA file, which appears under its name when it is complete. Raises ValueError if it cannot be written."""
    if Path(path).suffix != ".safetensors":
        raise ValueError(f"a LoRA file must be named .safetensors, got {path}")
    write_state_dict(path, tensors, {ABOUT: json.dumps(about)})


def export_lora(path: str | Path, target: str | Path) -> None:
    """Rewrites a file under the released names, as other tools expect it; no value changes.

    Raises:
        ValueError: the file cannot be read, does not say what its transformer was, or `target` cannot be written.
    """
    about = read_about(path)
    if "transformer" not in about:
        raise ValueError(f"{path} does not say which transformer it is for; only files that train.py wrote can be exported")
    model = empty_model(lambda: AvatarTransformer(**about["transformer"]))
    file, sources = Checkpoint(path), released_sources(model)
    names = {
        name: RELEASED_PREFIX + tensor_name(sources[parameter].name, kind)
        for parameter, kinds in _group(file, model).items()
        for kind, name in kinds.items()
    }
    write_lora(target, {names[name]: tensor.clone() for name, tensor in file.read()}, about)


def _split_names(file: Checkpoint) -> dict[str, tuple[str, str]]:
    """Name in the file -> place and end of the name. Raises ValueError if there is anything else in the file."""
    found = {name: TENSOR.fullmatch(name) for name in file.shapes}
    if strange := [name for name, match in found.items() if match is None]:
        raise ValueError(f"{file.path} holds {strange[0]!r}, expected names that end in .lora_A.weight or .diff: it is no LoRA file")
    return {name: (match[1], match[2]) for name, match in found.items()}


def _group(file: Checkpoint, model: AvatarTransformer) -> dict[str, Kinds]:
    """Our parameter name -> what the file has for it. Raises ValueError for a tensor without a place in the model."""
    sources = released_sources(model)
    ours = {name: name for name in sources} | {RELEASED_PREFIX + source.name: name for name, source in sources.items()}
    grouped: dict[str, Kinds] = {}
    for name, (place, end) in _split_names(file).items():
        leaf = "bias" if end == "diff_b" else "weight"
        parameter = ours.get(f"{place}.{leaf}") or (ours.get(place) if end == DIFFERENCE else None)
        if parameter is None:
            raise ValueError(f"{file.path}: {name} has no place in this transformer; the file is of another model")
        kinds = grouped.setdefault(parameter, {})
        if KINDS[end] in kinds:
            raise ValueError(f"{file.path}: {name} and {kinds[KINDS[end]]} are for the same place; the file is damaged")
        kinds[KINDS[end]] = name
    return grouped


def _check(file: Checkpoint, model: AvatarTransformer, parameter: str, kinds: Kinds) -> None:
    """Raise ValueError if what the file has for a parameter is incomplete or of another shape."""
    shape = model.get_parameter(parameter).shape
    expected: dict[str, Iterable[int]] = {DIFFERENCE: shape, ALPHA: ()}
    if kinds.keys() - {DIFFERENCE}:
        some = next(iter(kinds.values()))
        if not isinstance(model.get_submodule(parameter.rpartition(".")[0]), nn.Linear):
            raise ValueError(f"{file.path}: {some} is a low-rank update of something else than a linear, which is not supported")
        if not {DOWN, UP} <= kinds.keys():
            raise ValueError(f"{file.path}: {some} lacks its counterpart; a low-rank update has both lora_A and lora_B")
        rank = file.shapes[kinds[DOWN]][:1]
        expected |= {DOWN: (*rank, shape[1]), UP: (shape[0], *rank)}
    for kind, name in kinds.items():
        if file.shapes[name] != torch.Size(expected[kind]) and not (kind == ALPHA and file.shapes[name].numel() == 1):
            found, wanted = list(file.shapes[name]), list(expected[kind])
            raise ValueError(f"{file.path}: {name} has shape {found}, expected {wanted}; the file is for a transformer of another width")

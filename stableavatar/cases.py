"""From settings to finished videos: one case, or a list of cases with the models loaded once."""

import csv
import logging
import platform
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from stableavatar import __version__
from stableavatar.config import InferenceConfig, flatten, override, read_yaml, settings
from stableavatar.data.vocals import check_separator, separate_vocals
from stableavatar.folders import check_named
from stableavatar.geometry import frame_tokens, round_size
from stableavatar.machine import peak_host_bytes
from stableavatar.media import AudioTrack, VideoWriter, read_image, write_sidecar
from stableavatar.models.lora_files import check_loras
from stableavatar.parallel.launch import MISTAKES, in_step, launched, leads, own_device, together
from stableavatar.parallel.mesh import Mesh
from stableavatar.parallel.sequence import check_sequence
from stableavatar.pipeline import StableAvatarPipeline, transformer_config, transformer_path
from stableavatar.sampling.guidance import Guidance
from stableavatar.sampling.offload import resolve_device
from stableavatar.video_writer import check_frames_dir, sidecar_path

log = logging.getLogger(__name__)
LIBRARIES = ("torch", "diffusers", "transformers")
FULL_HOST = ("not enough memory", "can't allocate memory", "DefaultCPUAllocator")
"""torch's words for a host that is full; it has no type of its own for that."""


def run(config: InferenceConfig) -> int:
    """Make the video of `config`, or those of its list of cases; the exit code: 1 if a case of the list failed.

    Raises:
        ValueError, OSError: the list itself, the models or the single case cannot be used.
    """
    # The empty frames after the reference fade to denormals inside the VAE, which a CPU computes ten times slower than zeros.
    torch.set_flush_denormal(True)
    with launched(config.parallel, config.device) as mesh:
        config = replace(config, device=own_device(config.device))
        together(mesh, partial(check_model, config))
        if config.cases:
            return run_list(config, mesh)
        together(mesh, partial(check_case, config, mesh))
        make_video(load(config, mesh), config)
    return 0


def run_list(config: InferenceConfig, mesh: Mesh | None) -> int:
    """Make the videos of all cases that can be made and report the others; the exit code. Raises ValueError as `run` does."""
    failures: list[str] = []
    ready: list[tuple[str, InferenceConfig]] = []
    for number, row in enumerate(together(mesh, partial(read_cases, config.cases)), 1):
        with reported(f"case {number}", failures):
            ready.append((f"case {number}", together(mesh, partial(ready_case, config, row, number, [case for _, case in ready], mesh))))
    pipeline = load(config, mesh) if ready else None
    for name, case in ready:
        with reported(name, failures):
            make_video(pipeline, case)
    return 1 if failures else 0


def ready_case(
    config: InferenceConfig, row: dict[str, Any], number: int, others: list[InferenceConfig], mesh: Mesh | None
) -> InferenceConfig:
    """Case `number` of a list, checked. Raises ValueError or OSError."""
    case = plan_case(config, row, number)
    check_apart(case, others)
    check_case(case, mesh)
    return case


def check_case(case: InferenceConfig, mesh: Mesh | None) -> None:
    """Find what can be found of a case's mistakes before the models load. Raises ValueError or OSError."""
    check_inputs(case, writes=leads(mesh))
    if mesh is not None:
        check_shares(case)


def check_shares(case: InferenceConfig) -> None:
    """Raise ValueError if there is not enough to share out: attention heads, tokens of a frame, guidance passes of a step."""
    parallel, heads = case.parallel, transformer_config(case)["num_heads"]
    check_sequence(heads, frame_tokens(case.width, case.height), parallel.ulysses, parallel.ring)
    scales = asdict(case.guidance)
    scales.pop("batched")  # how passes run, not which
    passes = max(len(Guidance(**scales).passes(step, case.steps)) for step in range(case.steps))
    if parallel.guidance > passes:
        raise ValueError(f"parallel.guidance={parallel.guidance} processes share the guidance passes of a step, of which "
                         f"guidance.name={case.guidance.name} makes {passes}; use at most as many")


@contextmanager
def memory_advice() -> Iterator[None]:
    """Turn a device or a host that is full into a ValueError that says what to try."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        log.debug("torch said: %s", error)
        raise ValueError("out of device memory; try memory.mode=sequential_offload, memory.vae_tiling=true or a smaller size") from None
    except (RuntimeError, ValueError, MemoryError) as error:
        if not (isinstance(error, MemoryError) or any(words in str(error) for words in FULL_HOST)):
            raise
        log.debug("what was said: %s", error)
        raise ValueError("out of host memory; try memory.vae_tiling=true, dtype=bfloat16, a smaller size or shorter windows") from None


def load(config: InferenceConfig, mesh: Mesh | None = None) -> StableAvatarPipeline:
    """The pipeline of `config`, on its device. Raises ValueError if its files are missing or do not fit."""
    with in_step(mesh), memory_advice():  # processes that share weights out meet as they load
        return StableAvatarPipeline.from_config(config, mesh)


@contextmanager
def reported(name: str, failures: list[str]) -> Iterator[None]:
    """Turn a case's mistake into one logged line and an entry in `failures`."""
    try:
        yield
    except MISTAKES as error:
        failures.append(name)
        log.error("%s: %s", name, one_line(error))
        log.debug("where it happened", exc_info=True)


def one_line(error: BaseException) -> str:
    """An error's message without line breaks; the system's own errors with the file's name."""
    text = f"{error.strerror}: {error.filename}" if isinstance(error, OSError) and error.filename else str(error)
    return " ".join(text.split())


def read_cases(path: str) -> list[dict[str, Any]]:
    """Rows of a list of cases, each a mapping of dotted keys: a CSV table with a header, or a YAML list of mappings.

    Raises:
        ValueError: no such file, or it holds something else.
    """
    rows = read_table(path) if path.lower().endswith(".csv") else read_yaml(path, list)
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path} must list cases, each with keys such as reference, audio, prompt and output")
    return [dict(flatten(row)) for row in rows]


def read_table(path: str) -> list[dict[str, str]]:
    """Rows of a CSV file with a header; an empty cell leaves its setting as it is. Raises ValueError if it cannot be read or is ragged."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file, strict=True))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"cannot read {path}: {one_line(error)}") from None
    for number, row in enumerate(rows, 1):
        if None in row:
            raise ValueError(f"{path}: case {number} has more cells than the header has columns; put quotes around text with commas")
    return [{key: value for key, value in row.items() if value} for row in rows]


def plan_case(config: InferenceConfig, row: dict[str, Any], number: int) -> InferenceConfig:
    """The settings of case `number`: those shared by all, with the row's own; each case gets folders of its own."""
    folders = {key: f"{getattr(config, key)}/case_{number:03d}" for key in ("frames_dir", "work_dir") if getattr(config, key)}
    case = override(config, folders | row)
    shared = settings(config)
    for key, (_, value, limits) in settings(case).items():
        if limits.fixed and value != shared[key][1]:
            raise ValueError(f"{key} must be the same for all cases, because the models are loaded once; set it for the whole list")
    return case


def check_model(config: InferenceConfig) -> None:
    """Raise ValueError if the device or a LoRA file is not there or no model is named; its files are checked as they load."""
    resolve_device(config.device)
    check_named(StableAvatarPipeline, config.model, config.checkpoints)
    check_loras(config.lora)
    if config.model and config.transformer and not transformer_path(config).exists():
        raise ValueError(f"transformer {config.transformer} does not exist; with model=, name a file or a saved folder (relative to here), "
                         "or give transformer= for the pipeline's own")


def check_apart(case: InferenceConfig, others: list[InferenceConfig]) -> None:
    """Raise ValueError if a place that `case` writes to is another case's."""
    for key in ("output", "frames_dir", "work_dir"):
        place = getattr(case, key)
        if place and Path(place).resolve() in {Path(getattr(other, key)).resolve() for other in others if getattr(other, key)}:
            raise ValueError(f"{key} {place} is already taken by another case; give each its own")


def check_inputs(case: InferenceConfig, writes: bool = True) -> None:
    """Read both inputs and, of the process that writes, try the output's folder. Raises ValueError or OSError."""
    for key in ("reference", "audio", "output"):
        if not getattr(case, key):
            raise ValueError(f"{key} is missing; give {key}=FILE")
    if writes:
        check_places(case)
    read_image(case.reference)
    with AudioTrack(case.audio):
        pass
    if case.vocal_separator:
        check_separator(case.vocal_separator)


def check_places(case: InferenceConfig) -> None:
    """Raise ValueError unless the video, its record, the frames and the state can be written, none of them over an input."""
    output = Path(case.output)
    if output.is_dir() or output.suffix.lower() != ".mp4":
        raise ValueError(f"output must be the name of an .mp4 file, got {case.output!r}")
    sidecar = sidecar_path(output)
    if sidecar.is_dir():
        raise ValueError(f"the settings of {output} go into {sidecar}, which is a folder; give another output")
    for key in filter(lambda key: getattr(case, key), ("reference", "audio", "cases")):
        if Path(getattr(case, key)).resolve() in (output.resolve(), sidecar.resolve()):
            raise ValueError(f"output {output} would overwrite the {key} {getattr(case, key)}; give another output")
    if case.frames_dir:
        check_frames_dir(Path(case.frames_dir))
    for folder in filter(None, (str(output.parent), case.frames_dir, case.work_dir)):
        check_writable(Path(folder))


def check_writable(folder: Path) -> None:
    """Raise ValueError unless files can be made in `folder`, or in the nearest folder above it that exists."""
    existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise ValueError(f"cannot write to {folder}: {error.strerror or error}") from None


def make_video(pipeline: StableAvatarPipeline, case: InferenceConfig) -> None:
    """Stream one case from the pipeline into its mp4, then write its sidecar JSON.

    Of several processes the first one decodes and writes. A mistake before the denoising is all processes' alike.

    Raises:
        ValueError, OSError: what the pipeline and the writer raise.
        Broken: that, in one of several processes that were denoising.
    """
    started, mesh = time.perf_counter(), pipeline.parallel
    device = resolve_device(case.device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    first, count = None, 0
    with ExitStack() as stack:
        reference, voice, writer = together(mesh, partial(open_case, case, mesh, stack))
        with in_step(mesh), memory_advice():
            for frames in pipeline.stream(reference=reference, audio=voice, prompt=case.prompt, config=case):
                first = first or time.perf_counter() - started
                writer.write(frames)
                count += len(frames)
    if not leads(mesh):
        return
    timings = {"first_frames_seconds": first, "total_seconds": time.perf_counter() - started}
    write_sidecar(case.output, record(case, device, count, timings))
    log.info("%s: %d frames, %.2f s of video in %.1f s", case.output, count, count / case.fps, timings["total_seconds"])


def open_case(case: InferenceConfig, mesh: Mesh | None, stack: ExitStack) -> tuple[Image.Image, AudioTrack, VideoWriter | None]:
    """The portrait, the voice and, for the process that writes, the video; what has to be closed goes onto `stack`."""
    # check_inputs has told what there is to say about these files; a voice taken out of one is new.
    scratch = stack.enter_context(tempfile.TemporaryDirectory())
    voice = stack.enter_context(AudioTrack(heard(case, scratch), quiet=not case.vocal_separator))
    reference, writer = read_image(case.reference, quiet=True), None
    if leads(mesh):
        size = {"width": round_size(case.width), "height": round_size(case.height)}
        marks = {"seed": str(case.seed), "stableavatar": __version__}
        frames_dir = case.frames_dir or None
        writer = VideoWriter(case.output, **size, fps=case.fps, sound=case.audio, metadata=marks, frames_dir=frames_dir)
        stack.enter_context(writer)
    return reference, voice, writer


def heard(case: InferenceConfig, scratch: str) -> str | Path:
    """The file that drives the lips: the audio itself, or its vocals alone, written to the folder `scratch`."""
    return separate_vocals(case.audio, case.vocal_separator, scratch) if case.vocal_separator else case.audio


def record(case: InferenceConfig, device: torch.device, frames: int, timings: dict[str, float | None]) -> dict[str, Any]:
    """The sidecar: everything needed to make the same video again on `device`, and what it cost."""
    peak, machine = {"host_bytes": peak_host_bytes()}, platform.processor() or platform.machine()
    if device.type == "cuda":
        peak["device_bytes"], machine = torch.cuda.max_memory_allocated(device), torch.cuda.get_device_name(device)
    return {
        "generated_by": "StableAvatar",
        "settings": asdict(case),
        "frames": frames,
        "seconds": frames / case.fps,
        "versions": {"stableavatar": __version__, "python": platform.python_version(), **{name: version(name) for name in LIBRARIES}},
        "device": str(device),
        "machine": machine,
        "timings": timings,
        "peak_memory": peak,
    }

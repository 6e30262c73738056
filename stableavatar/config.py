"""Every setting of the program: its type, meaning, default and limits, read from YAML and from `key=value` words.

A mistake is a ValueError of one line that says which key, what was got and what was expected.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar, get_args

from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from yaml import YAMLError

from stableavatar.geometry import FPS, TEMPORAL_STRIDE, WINDOW_FRAMES, frames_to_latents

# Wan2.1's own default; text guidance was tuned with it.
WAN_NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，"
    "画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)
RELEASED_TRANSFORMER = "StableAvatar-1.3B/transformer3d-square.pt"
"""The published weights that are meant where none are named."""
EXPECTED = {int: "a whole number", float: "a number", bool: "true or false", str: "text",
            int | None: "a whole number or none", float | None: "a number or none"}
RING_BACKENDS = ("native", "_native_flash")
"""Attention backends that a ring stands for: its own kernels are torch's flash attention where that runs."""
NONE = ("none", "null")
"""What stands for no value in a setting that may have none."""
UNRESOLVED = re.compile(r"(\\*)\$\{")
"""Start of what omegaconf takes for an interpolation; it takes a pair of backslashes before it for one."""
C = TypeVar("C", bound="Config")


@dataclass(frozen=True)
class Limits:
    """What a setting means and which values it takes."""

    help: str
    choices: tuple[str, ...] = ()
    low: float = -math.inf
    high: float = math.inf
    fixed: bool = False
    """Decides how the models are loaded, so it cannot differ between the cases of a list."""


def setting(default: Any, help: str, **limits: Any) -> Any:
    """A dataclass field that carries its meaning and limits (the keywords are those of Limits)."""
    return field(default=default, metadata={"limits": Limits(help, **limits)})


class Config:
    """Base of the settings of one program."""

    def check(self) -> None:
        """Raise ValueError if settings contradict each other; each one alone has been checked."""


@dataclass
class GuidanceConfig:
    name: str = setting("cfg", "how the passes of a step are combined: cfg is the released one, audio_native the paper's equation 10",
                        choices=("none", "cfg", "audio_native"))
    text_scale: float = setting(3.0, "cfg: strength of the prompt, 3 to 6 recommended", low=0)
    audio_scale: float = setting(5.0, "cfg: strength of the voice, 3 to 6 recommended; more binds the lips closer", low=0)
    alpha: float = setting(4.5, "audio_native: weight against the prediction without a voice", low=0)
    beta: float = setting(3.0, "audio_native: weight against the prediction without the joint audio tokens", low=0)
    start: float = setting(0.0, "fraction of the steps at which guidance begins", low=0, high=1)
    end: float = setting(1.0, "fraction of the steps at which guidance ends", low=0, high=1)
    batched: bool = setting(False, "run the passes of a step as one batch: faster on a large GPU, more memory")


@dataclass
class WindowConfig:
    strategy: str = setting("sliding", "long video: sliding fuses overlapping windows at every step, motion_frame makes clip after clip",
                            choices=("sliding", "motion_frame"))
    frames: int = setting(WINDOW_FRAMES, "video frames of a window, 4n + 1; the model was trained on 81", low=TEMPORAL_STRIDE + 1)
    overlap: int = setting(5, "latent frames (4 video frames each) that neighbouring windows share, 5 to 15 recommended", low=0)
    weights: str = setting("log", "fusion of the overlap: log as in the paper, uniform, fixed (one half), none (plain window)",
                           choices=("log", "uniform", "fixed", "none"))
    order: str = setting("wavefront", "step_major runs every window at each step; wavefront gives the same video and streams it out",
                         choices=("step_major", "wavefront"))
    tail: str = setting("cut", "the last window: cut it short as in the paper, or shift it back to full length", choices=("cut", "shift"))


@dataclass
class MemoryConfig:
    mode: str = setting("full", "full keeps all on the device; the others visit it by model, by group of layers or by layer", fixed=True,
                        choices=("full", "model_offload", "group_offload", "sequential_offload"))
    fp8: bool = setting(False, "store the transformer's weights in 8 bits; computation stays in dtype", fixed=True)
    vae_tiling: bool = setting(False, "encode and decode in tiles: less memory at large sizes, slower", fixed=True)


@dataclass
class ParallelConfig:
    windows: int = setting(1, "processes that share a long video's windows: next to no traffic", low=1, fixed=True)
    guidance: int = setting(1, "processes that share the guidance passes of a step", low=1, fixed=True)
    ring: int = setting(1, "processes that share a window's tokens, passing keys and values around", low=1, fixed=True)
    ulysses: int = setting(1, "processes that share a window's tokens, exchanging heads; neighbours inside a machine", low=1, fixed=True)
    shard: bool = setting(False, "a process keeps 1 / (ring x ulysses) of the weights of transformer and text encoder", fixed=True)
    offload: bool = setting(False, "with shard: keep that part on the host", fixed=True)

    @property
    def processes(self) -> int:
        """Processes that all of it needs."""
        return math.prod((self.windows, self.guidance, self.ring, self.ulysses))

    def __str__(self) -> str:
        """The sizes as a user writes them, those of 1 left out."""
        sizes = {name: getattr(self, name) for name in ("windows", "guidance", "ring", "ulysses")}
        return " ".join(f"parallel.{name}={size}" for name, size in sizes.items() if size > 1) or "parallel.ulysses=1"


@dataclass
class InferenceConfig(Config):
    """The settings of inference.py."""

    model: str = setting("", "folder of a complete pipeline (save_pretrained); used instead of checkpoints if given", fixed=True)
    checkpoints: str = setting("", "folder of the released files, laid out as published", fixed=True)
    transformer: str = setting("", f"weights: file in checkpoints, or absolute path (empty: {RELEASED_TRANSFORMER}); with model, a file or "
                               "a saved folder that replaces the pipeline's own", fixed=True)
    base: str = setting("Wan2.1-Fun-V1.1-1.3B-InP", "Wan base model: folder in checkpoints, or absolute path", fixed=True)
    wav2vec: str = setting("wav2vec2-base-960h", "speech encoder: folder in checkpoints, or absolute path", fixed=True)
    lora: str = setting("", "LoRA files, separated by commas, each FILE or FILE:WEIGHT; merged into the weights as they load", fixed=True)

    reference: str = setting("", "the portrait: an image file")
    audio: str = setting("", "the voice: an audio or video file of any format, rate and channel count")
    prompt: str = setting("", "description of the first frame - of the behaviour - of the background")
    negative_prompt: str = setting(WAN_NEGATIVE_PROMPT, "what cfg steers away from; Wan2.1's own by default")
    output: str = setting("output.mp4", "the video to write; its settings go next to it in a .json")
    frames_dir: str = setting("", "folder for every frame as PNG; empty for none")
    cases: str = setting("", "YAML list or CSV table of cases: reference, audio, prompt, output and any other setting of this list",
                         fixed=True)

    width: int = setting(512, "width of the video in pixels, rounded to a multiple of 16", low=1)
    height: int = setting(512, "height of the video in pixels, rounded to a multiple of 16", low=1)
    fit: str = setting("crop", "a portrait of another shape is cropped, padded or stretched", choices=("crop", "pad", "stretch"))
    fps: float = setting(FPS, "frames per second; the model was trained on 25", low=1, high=120)
    seed: int = setting(42, "seed of the noise; the same seed on the same machine gives the same video", low=0, high=2**63 - 1)
    noise_scale: float = setting(1.0, "standard deviation of the noise; below 1 for steadier and less varied videos", low=0, high=2)
    steps: int = setting(50, "denoising steps, 30 to 50 recommended", low=1, high=1000)
    solver: str = setting("euler", "solver of the flow", choices=("euler", "unipc", "dpm"))
    shift: float = setting(5.0, "shift of the noise schedule; more spends more steps on high noise", low=0.01, high=100)
    vocal_separator: str = setting("", "Kim_Vocal_2.onnx, to hear only the voice in music or noise; empty for off")

    device: str = setting("auto", "auto, cpu, cuda, cuda:1, ...", fixed=True)
    dtype: str = setting("auto", "precision of the models; auto is bfloat16 on a GPU and float32 on a CPU", fixed=True,
                         choices=("auto", "float32", "bfloat16", "float16"))
    attention: str = setting("native", "attention backend by its diffusers name: native, flash, sage, _native_cudnn, ...", fixed=True)
    compile: bool = setting(False, "torch.compile the transformer's blocks: slow to start, faster after", fixed=True)
    step_cache: float = setting(0.0, "reuse the blocks' output while its input changes less, 0.05 to 0.3; 0 for off", low=0, high=1)
    work_dir: str = setting("", "folder for the state of unfinished work, from which a run that was killed goes on; empty for none")
    save_every: float = setting(60.0, "seconds between two saves of that state", low=0)

    guidance: GuidanceConfig = field(default_factory=GuidanceConfig)
    windows: WindowConfig = field(default_factory=WindowConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    def check(self) -> None:
        """Raise ValueError if guidance would end before it starts, windows do not move forward, or processes would not go together."""
        if self.guidance.start > self.guidance.end:
            raise ValueError(f"guidance.start must not exceed guidance.end, got {self.guidance.start} and {self.guidance.end}")
        if (self.windows.frames - 1) % TEMPORAL_STRIDE:
            raise ValueError(f"windows.frames must be {TEMPORAL_STRIDE}n + 1, such as {WINDOW_FRAMES}, got {self.windows.frames}")
        length = frames_to_latents(self.windows.frames)
        if self.windows.overlap >= length:
            raise ValueError(f"windows.overlap must be smaller than the window of {length} latent frames, got {self.windows.overlap}")
        if self.windows.strategy == "motion_frame" and not self.windows.overlap:
            raise ValueError("windows.strategy=motion_frame needs windows.overlap of at least 1: the frames that a clip goes on from")
        self._check_parallel()

    def _check_parallel(self) -> None:
        """Raise ValueError if settings do not go with the processes that are asked for."""
        parallel = self.parallel
        if parallel.windows > 1 and self.windows.strategy == "motion_frame":
            raise ValueError(f"windows.strategy=motion_frame makes clip after clip, which parallel.windows={parallel.windows} cannot share "
                             "out; use parallel.ulysses or parallel.guidance")
        if parallel.ring > 1 and self.attention not in RING_BACKENDS:
            raise ValueError(f"parallel.ring={parallel.ring} needs attention's log-sum-exp, which attention={self.attention} lacks; "
                             f"use attention={RING_BACKENDS[0]}, or parallel.ulysses")
        if parallel.offload and not parallel.shard:
            raise ValueError("parallel.offload=true keeps a process's part of the weights on the host; it needs parallel.shard=true")
        if parallel.shard and parallel.ring * parallel.ulysses == 1:
            raise ValueError("parallel.shard=true deals weights out to parallel.ulysses x parallel.ring processes; give them 2 at least")
        if parallel.shard and (self.memory.mode != "full" or self.memory.fp8):
            raise ValueError(f"parallel.shard=true moves weights itself and does not go with memory.mode={self.memory.mode} "
                             f"memory.fp8={str(self.memory.fp8).lower()}; use parallel.offload=true with memory.mode=full memory.fp8=false")


def settings(config: Any) -> dict[str, tuple[type, Any, Limits]]:
    """Dotted key -> (type, value, limits) of a config instance; sections are flattened."""
    flat = {}
    for item in fields(config):
        value = getattr(config, item.name)
        if is_dataclass(value):
            flat |= {f"{item.name}.{key}": entry for key, entry in settings(value).items()}
        else:
            flat[item.name] = (item.type, value, item.metadata["limits"])
    return flat


def load_config(cls: type[C], path: str | Path | None, words: Sequence[str] = ()) -> C:
    """The settings of `cls`: its defaults, then the YAML file at `path` (None for none), then `key=value` words.

    Raises:
        ValueError: no such file, not YAML, an unknown key, a value of the wrong type or outside its limits.
    """
    values = dict(flatten(read_yaml(path, dict))) if path is not None else {}
    return override(cls(), values | dict(map(split_word, words)))


def override(config: C, values: Mapping[str, Any]) -> C:
    """A checked copy of `config` with the dotted keys of `values` replaced. Raises ValueError as load_config does."""
    known = settings(config)
    tree = OmegaConf.structured(type(config))
    for key, value in ({key: value for key, (_, value, _) in known.items()} | dict(values)).items():
        if key not in known:
            raise ValueError(f"unknown setting {key!r}; the nearest is {nearest(key, known)!r}")
        if value in NONE and get_args(known[key][0]):
            value = None
        try:
            # Interpolations were resolved when the file was read; a '${' that is left is meant literally.
            OmegaConf.update(tree, key, UNRESOLVED.sub(r"\1\1\\${", value) if isinstance(value, str) else value)
            OmegaConf.select(tree, key, throw_on_missing=True)
        except MissingMandatoryValue:
            raise ValueError(f"{key} cannot be {value!r}, which stands for a missing value; give {EXPECTED[known[key][0]]}") from None
        except OmegaConfBaseException:
            raise ValueError(f"{key} must be {EXPECTED[known[key][0]]}, got {value!r}") from None
    result = OmegaConf.to_object(tree)
    validate(result)
    return result


def validate(config: Config) -> None:
    """Raise ValueError if a setting is outside its limits or contradicts another."""
    for key, (_, value, limits) in settings(config).items():
        check_limits(key, value, limits)
    config.check()


def check_limits(key: str, value: Any, limits: Limits) -> None:
    """Raise ValueError if one value is not among its choices, not finite, or out of range."""
    if limits.choices and value not in limits.choices:
        raise ValueError(f"{key} must be one of {', '.join(limits.choices)}, got {value!r}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{key} must be a finite number, got {value}")
    if isinstance(value, (int, float)) and not limits.low <= value <= limits.high:
        upper = f" and at most {limits.high:g}" if limits.high < math.inf else ""
        raise ValueError(f"{key} must be at least {limits.low:g}{upper}, got {value}")


def read_yaml(path: str | Path, kind: type) -> Any:
    """The contents of a YAML file, a plain `kind` (dict or list). Raises ValueError if it cannot be read or holds something else."""
    try:
        values = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}") from None
    except (YAMLError, UnicodeDecodeError, OmegaConfBaseException) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, kind):
        expected = "mapping (key: value)" if kind is dict else "list"
        raise ValueError(f"{path} must hold a {expected} at its top, got a {type(values).__name__}")
    return values


def flatten(values: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of nested mappings."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def split_word(word: str) -> tuple[str, str]:
    """`key=value` -> (key, value); everything after the first = is the value."""
    key, equals, value = word.partition("=")
    if not (key and equals):
        raise ValueError(f"settings are written key=value, got {word!r}")
    return key, value


def nearest(key: str, known: Mapping[str, Any]) -> str:
    """The known dotted key that reads most like `key`, with or without its section; a section's first key for its name."""
    for name in known:
        if name.startswith(f"{key}."):
            return name
    names = {name.rpartition(".")[2]: name for name in known} | {name: name for name in known}
    return names[get_close_matches(key, names, n=1, cutoff=0)[0]]


def help_text(config: Config) -> str:
    """One paragraph per setting: key, default, meaning, allowed values."""
    lines = []
    for key, (kind, value, limits) in settings(config).items():
        default = "empty" if value == "" else str(value).lower() if kind is bool or value is None else value
        choices = f" [{' | '.join(limits.choices)}]" if limits.choices else ""
        lines += [f"  {key}  (default: {default})", f"      {limits.help}{choices}"]
    return "\n".join(lines)

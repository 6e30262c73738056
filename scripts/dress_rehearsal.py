"""Writes random checkpoints with the names, shapes and folders of the 1.3B release, and runs the real programs on them.

    python scripts/dress_rehearsal.py FOLDER [--dtype bfloat16] [--width 128 --height 128] [--steps 2] [--seconds 1] [--keep]
    python scripts/dress_rehearsal.py FOLDER --train      an optimiser step of the LoRA configuration on a small clip, from a latent cache

Shows that the released files will load and run on this machine, and what that costs: a table of time and memory of each phase.
FOLDER takes 22 GB and is removed at the end; with `--keep` it stays, and the next run writes only what is not whole.
"""

import argparse
import json
import math
import re
import resource
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import psutil
import soundfile
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn
from tqdm import tqdm
from transformers import (
    ByT5Tokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    UMT5Config,
    UMT5EncoderModel,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForCTC,
)

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from stableavatar.config import InferenceConfig, load_config  # noqa: E402
from stableavatar.geometry import FPS, SAMPLE_RATE, TEMPORAL_STRIDE, samples_to_frames  # noqa: E402
from stableavatar.models import weights  # noqa: E402
from stableavatar.models.checkpoint_files import Checkpoint  # noqa: E402
from stableavatar.models.checkpoint_writing import Specs, write_tensors  # noqa: E402
from stableavatar.models.dit import AvatarTransformer  # noqa: E402
from stableavatar.models.key_maps import AUDIO_TENSOR, CLIP_PREFIX  # noqa: E402
from stableavatar.models.strict_loading import empty_model, export_tensors, released_shapes  # noqa: E402
from stableavatar.training.report import read_metrics  # noqa: E402
from stableavatar.vae import WanVAE  # noqa: E402
from stableavatar.video_writer import VideoWriter  # noqa: E402

CONFIG = ROOT / "configs/inference/wan_1.3b_square.yaml"
TRAIN_CONFIG = ROOT / "configs/train/finetune_1.3b_lora.yaml"
BASE_FILE = "diffusion_pytorch_model.safetensors"
MARK = "RANDOM_WEIGHTS.txt"
MEMORY_LIMIT = 24 * 2**30
GIB = 2**30
POLL_SECONDS = 0.05
RUSAGE_UNIT = 1 if sys.platform == "darwin" else 1024
PHASES = {
    "load": None,
    "encode": re.compile(r"\bencode: "),
    "denoise": re.compile(r"\bdenoise: "),
    "decode": re.compile(r"\bdenoise: 100%|\bdecode: +[1-9]"),
}
"""What the program's progress bars print when a phase begins; decode's own bar is there, at 0 %, from the first step on."""
TEXT_TOWER = {
    "log_scale": torch.Size([]),
    "textual.norm.weight": torch.Size([1024]),
    "textual.head.0.weight": torch.Size([832, 1024]),
}
"""Some of what the CLIP file holds besides the image tower; none of it may be loaded."""


@dataclass(frozen=True)
class Release:
    """Settings of every model of a release, as its class takes them.

    Attributes:
        transformer: of AvatarTransformer; vae: of WanVAE.
    """

    transformer: dict
    vae: dict
    text: UMT5Config
    image: CLIPVisionConfig
    speech: Wav2Vec2Config


RELEASE_1_3B = Release(
    transformer={"dim": 1536, "num_heads": 12, "num_layers": 30, "ffn_dim": 8960, "audio_hidden_dims": ()},
    vae={"base_dim": 96},
    text=UMT5Config(vocab_size=256384, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64),
    image=CLIPVisionConfig(
        hidden_size=1280, intermediate_size=5120, projection_dim=1024, num_hidden_layers=32, num_attention_heads=16, patch_size=14
    ),
    speech=Wav2Vec2Config(),
)


@dataclass(frozen=True)
class Part:
    """A file of tensors to write.

    Attributes:
        build: its model; dtype: as published.
        prefix: of the model's tensors in the file; besides: tensors of no model of ours.
        audio: False leaves the audio tensors out, as a base model's file does.
    """

    path: Path
    build: Callable[[], nn.Module]
    dtype: torch.dtype
    prefix: str = ""
    besides: dict[str, torch.Size] = field(default_factory=dict)
    audio: bool = True

    def wants(self, name: str) -> bool:
        """Whether the file holds the model's tensor of this released name."""
        return self.audio or not AUDIO_TENSOR.match(name)

    def specs(self) -> Specs:
        """Released name -> dtype and shape."""
        ours = {self.prefix + name: shape for name, shape in released_shapes(empty_model(self.build)).items() if self.wants(name)}
        return {name: (self.dtype, shape) for name, shape in (ours | self.besides).items()}

    def is_whole(self) -> bool:
        """Whether the file is there with all its tensors."""
        try:
            found = Checkpoint(self.path).shapes
        except ValueError:
            return False
        return found == {name: shape for name, (_, shape) in self.specs().items()}

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yields every (released name, random tensor), the same ones each time."""
        model, generator = empty_model(self.build), torch.Generator().manual_seed(0)

        def random(ours: str) -> Tensor:
            return random_tensor(ours, model.get_parameter(ours).shape, self.dtype, generator)

        yield from ((self.prefix + name, tensor) for name, tensor in export_tensors(model, random) if self.wants(name))
        for name, shape in self.besides.items():
            yield name, random_tensor(name, shape, self.dtype, generator)


def random_tensor(name: str, shape: torch.Size, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Values that keep activations finite: norms of one, biases of zero, matrices of variance 1 / inputs."""
    leaf = name.rpartition(".")[2]
    if leaf == "bias":
        return torch.zeros(shape, dtype=dtype)
    if leaf == "gamma" or (leaf == "weight" and len(shape) == 1):
        return torch.ones(shape, dtype=dtype)
    inputs = math.prod(shape[1:] if len(shape) > 1 else shape)
    return torch.empty(shape, dtype=dtype).normal_(0, inputs**-0.5, generator=generator)


def parts(folder: Path, release: Release) -> list[Part]:
    """Every file of tensors of a release, where the 1.3B configuration looks for it and in the published dtype."""
    config = load_config(InferenceConfig, CONFIG)
    base = folder / config.base

    def transformer() -> AvatarTransformer:
        return AvatarTransformer(**release.transformer)

    def image_encoder() -> CLIPVisionModelWithProjection:
        return CLIPVisionModelWithProjection(release.image)

    return [
        Part(folder / config.transformer, transformer, torch.bfloat16),
        Part(base / BASE_FILE, transformer, torch.bfloat16, audio=False),
        Part(base / weights.VAE_FILE, lambda: WanVAE(**release.vae), torch.float32),
        Part(base / weights.TEXT_ENCODER_FILE, lambda: UMT5EncoderModel(release.text), torch.bfloat16),
        Part(base / weights.IMAGE_ENCODER_FILE, image_encoder, torch.float32, CLIP_PREFIX, TEXT_TOWER),
    ]


def write_release(folder: Path, release: Release) -> None:
    """Writes every file of a release that is not whole.

    Raises:
        ValueError: `folder` holds something else, or cannot be written.
    """
    if folder.exists() and not (folder / MARK).is_file() and any(folder.iterdir()):
        raise ValueError(f"{folder} holds files that are not this script's; give the name of a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARK).write_text("Random weights of scripts/dress_rehearsal.py: good for nothing but measuring.\n")
    for part in parts(folder, release):
        if not part.is_whole():
            specs = part.specs()
            write_tensors(part.path, specs, tqdm(part.tensors(), part.path.name, total=len(specs), unit="tensor"))
    write_small_parts(folder, release)


def write_small_parts(folder: Path, release: Release) -> None:
    """The base model's config.json, a tokenizer that needs no vocabulary, and the speech encoder's folder."""
    config = load_config(InferenceConfig, CONFIG)
    model = empty_model(lambda: AvatarTransformer(**release.transformer))
    text = json.dumps({"_class_name": "WanModel"} | weights.base_config(model), indent=2)
    (folder / config.base / weights.BASE_CONFIG_FILE).write_text(text)
    ByT5Tokenizer().save_pretrained(folder / config.base / weights.TOKENIZER_FOLDER)
    speech = folder / config.wav2vec
    if not (speech / "preprocessor_config.json").is_file():  # it is written last
        torch.manual_seed(0)
        Wav2Vec2ForCTC(release.speech).save_pretrained(speech)
        Wav2Vec2FeatureExtractor(sampling_rate=SAMPLE_RATE, do_normalize=True).save_pretrained(speech)


def write_inputs(folder: Path, seconds: float) -> None:
    """A portrait of three ellipses, and a modulated tone for a voice."""
    portrait = Image.linear_gradient("L").convert("RGB")
    draw = ImageDraw.Draw(portrait)
    for box, colour in (((48, 32, 208, 224), "peachpuff"), ((88, 96, 104, 112), "black"), ((152, 96, 168, 112), "black")):
        draw.ellipse(box, fill=colour)
    portrait.save(folder / "portrait.png")
    moments = np.arange(round(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    soundfile.write(folder / "voice.wav", 0.4 * np.sin(1400 * moments) * np.sin(20 * moments), SAMPLE_RATE)


@dataclass
class Phase:
    """What a part of a run took; memory in bytes at its largest, `mapped` the part of it that is pages of files."""

    seconds: float = 0.0
    resident: int = 0
    mapped: int = 0


def watch(command: list[str], marks: dict[str, re.Pattern | None] = PHASES) -> dict[str, Phase]:
    """Runs a program and follows its progress bars; ValueError if it fails.

    Args:
        marks: phase -> what is printed when it begins; None for the first.
    """
    phases = {name: Phase() for name in marks}
    first, *ahead = marks
    current, text = phases[first], ""
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE) as process:
        program, moment = psutil.Process(process.pid), time.perf_counter()
        while True:
            if select.select([process.stderr], [], [], POLL_SECONDS)[0]:
                piece = process.stderr.read1().decode(errors="replace")
                if not piece:
                    break
                sys.stderr.write(piece)
                text = text[-200:] + piece
            while ahead and marks[ahead[0]].search(text):
                current = phases[ahead.pop(0)]
            moment, elapsed = time.perf_counter(), time.perf_counter() - moment
            current.seconds += elapsed
            note_memory(program, current)
    if process.returncode:
        raise ValueError(f"the program ended with exit code {process.returncode}; its last line: {text.strip().splitlines()[-1:]}")
    assert not ahead, f"no progress bar of {ahead} was seen"
    return phases


def note_memory(program: psutil.Process, phase: Phase) -> None:
    """Updates a phase's largest memory; a program that has just ended has none."""
    memory = program.memory_info() if program.is_running() else None
    if memory and memory.rss > phase.resident:
        phase.resident, phase.mapped = memory.rss, getattr(memory, "shared", 0)


def check_video(path: Path, frames: int) -> None:
    """Raises ValueError unless a video has that many frames, each with something in it, and no two neighbours the same.

    A latent that is not finite would decode to one colour.
    """
    reader = imageio_ffmpeg.read_frames(str(path))
    width, height = next(reader)["size"]
    pictures = np.stack([np.frombuffer(picture, np.uint8).reshape(height, width, 3) for picture in reader]).astype(np.float32)
    if len(pictures) != frames:
        raise ValueError(f"{path} has {len(pictures)} frames, expected {frames}")
    contrast, change = pictures.std(axis=(1, 2, 3)).min(), np.abs(np.diff(pictures, axis=0)).mean(axis=(1, 2, 3)).min()
    if contrast < 1 or change < 0.01:
        raise ValueError(f"{path} is blank or stands still: contrast {contrast:.2f} and change {change:.3f} of 255")
    print(f"\n{len(pictures)} frames of {width}x{height}; least contrast {contrast:.1f}, least change {change:.1f} of 255")


def rehearse(folder: Path, settings: dict[str, str], seconds: float) -> dict[str, Phase]:
    """Runs inference.py with the 1.3B configuration and checks its video; ValueError if either is wrong."""
    write_inputs(folder, seconds)
    output = folder / "out.mp4"
    files = {"checkpoints": folder, "reference": folder / "portrait.png", "audio": folder / "voice.wav", "output": output}
    words = [f"{key}={value}" for key, value in (files | {"prompt": "A person is talking to the camera"} | settings).items()]
    phases = watch([sys.executable, "inference.py", str(CONFIG), *words])
    check_video(output, samples_to_frames(round(seconds * SAMPLE_RATE), FPS))
    record = json.loads(output.with_suffix(".json").read_text())
    polled = max(phases.values(), key=lambda phase: phase.resident)
    total = sum(phase.seconds for phase in phases.values())
    return phases | {"whole run": Phase(total, max(polled.resident, record["peak_memory"]["host_bytes"]), polled.mapped)}


def write_clip(folder: Path, width: int, height: int, seconds: float) -> Path:
    """A clip folder of a drifting gradient with the tone of `write_inputs`; gives the path list that names it."""
    clip = folder / "clips" / "square" / "speech" / "00001"
    clip.mkdir(parents=True, exist_ok=True)
    with VideoWriter(clip / "sub_clip.mp4", width, height, FPS, sound=folder / "voice.wav") as writer:
        ramp = np.linspace(0, 255, width).astype(np.uint8)
        for frame in range(samples_to_frames(round(seconds * SAMPLE_RATE), FPS)):
            writer.write(np.broadcast_to(np.roll(ramp, frame)[None, None, :, None], (1, height, width, 3)))
    (folder / "clips.txt").write_text(str(clip))
    return folder / "clips.txt"


def rehearse_training(folder: Path, settings: dict[str, str], seconds: float) -> dict[str, Phase]:
    """Caches a clip and trains a LoRA on it for a step; ValueError if the loss is not finite or no LoRA is there afterwards."""
    write_inputs(folder, seconds)
    clips = write_clip(folder, int(settings["width"]), int(settings["height"]), seconds)
    frames = (samples_to_frames(round(seconds * SAMPLE_RATE), FPS) - 1) // TEMPORAL_STRIDE * TEMPORAL_STRIDE + 1
    output = folder / "run"
    shutil.rmtree(output, ignore_errors=True)
    values = {
        "checkpoints": folder, "data.lists": clips, "data.sizes": f"{settings['width']}x{settings['height']}", "data.frames": frames,
        "data.cache": folder / "cache", "data.runs": 1, "data.workers": 0, "validation.every": 0, "device": "cpu",
        "dtype": settings["dtype"], "output": output, "max_steps": 1, "optimizer.warmup": 0,
    }  # fmt: skip
    words = [str(TRAIN_CONFIG), *(f"{key}={value}" for key, value in values.items())]
    phases = watch([sys.executable, "scripts/cache_latents.py", *words], {"encode a clip": None})
    phases |= watch([sys.executable, "train.py", *words], {"train a step": None})
    (figures,) = read_metrics(output / "metrics.jsonl")
    if not (math.isfinite(figures["loss"]) and (output / "checkpoints/step_000001/lora.safetensors").is_file()):
        raise ValueError(f"the step failed: loss {figures['loss']}")
    print(f"\n{frames} frames of {values['data.sizes']}; loss {figures['loss']:.4f}, {figures['seconds']:.1f} s for the step")
    largest = max(phases.values(), key=lambda phase: phase.resident)
    return phases | {"whole run": Phase(sum(phase.seconds for phase in phases.values()), largest.resident, largest.mapped)}


def print_table(phases: dict[str, Phase]) -> None:
    """A Markdown table of what was measured."""
    print("\n| phase | seconds | peak resident, GiB | of it mapped files, GiB |\n|---|---|---|---|")
    for name, phase in phases.items():
        print(f"| {name} | {phase.seconds:.1f} | {phase.resident / GIB:.2f} | {phase.mapped / GIB:.2f} |")


def main(argv: list[str], release: Release = RELEASE_1_3B) -> int:
    """Exit code: 0, 1 if the run needs too much memory, 2 for anything that one line describes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the checkpoints are written: a new folder, or one of an earlier rehearsal")
    for option, default in {"dtype": "bfloat16", "width": "128", "height": "128", "steps": "2"}.items():
        parser.add_argument(f"--{option}", default=default, help="as of inference.py (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=1.0, help="length of the voice (default: %(default)s)")
    parser.add_argument("--train", action="store_true", help="rehearse training instead of inference (--steps is not used)")
    parser.add_argument("--keep", action="store_true", help="leave FOLDER for another run")
    args = parser.parse_args(argv)
    settings = {key: getattr(args, key) for key in ("dtype", "width", "height", "steps")}
    folder = args.folder.resolve()
    try:
        started = time.perf_counter()
        write_release(folder, release)
        written = Phase(time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RUSAGE_UNIT)
        phases = (rehearse_training if args.train else rehearse)(folder, settings, args.seconds)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print_table({"write the checkpoints": written} | phases)
    if not args.keep:
        shutil.rmtree(folder)
    fits = phases["whole run"].resident < MEMORY_LIMIT
    print(f"\n{'fits' if fits else 'DOES NOT fit'} in {MEMORY_LIMIT // GIB} GiB")
    return 0 if fits else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

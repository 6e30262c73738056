"""What a run needs and how long it takes, before anything is loaded; no weights have to be on disk.

    python scripts/plan_memory.py configs/train/NAME.yaml [key=value ...] [--processes 64] [--strategy zero2] [--card 80] [--model 1.3b]
    python scripts/plan_memory.py configs/inference/NAME.yaml --gpus 64 --seconds 60 [key=value ...] [--card 80] [--model 1.3b] ...

Without --gpus: the settings are those of train.py. Prints a line per bucket, in GiB: weights, gradients, optimiser, moving average,
activations, encoders and their total with what a GPU's libraries take (1.5); whether that fits the card; operations of an optimiser
step on one GPU, and its seconds on an A100 that reaches 40 % of its peak, with what gradient checkpointing computes again.

With --gpus: the settings are those of inference.py. Tries every mesh (parallel.windows x guidance x ring x ulysses) of so many GPUs and
prints the fastest: memory of a GPU, seconds of a step and of the video, seconds until the first frames, efficiency against one GPU, bytes
sent; why others fall out; and the best mesh of 1, 2, 4, ... GPUs. The defaults are those of A100s of 80 GiB.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from stableavatar.command_line import Parser  # noqa: E402
from stableavatar.config import InferenceConfig, load_config  # noqa: E402
from stableavatar.models.dit import AvatarTransformer  # noqa: E402
from stableavatar.models.lora import inject_lora  # noqa: E402
from stableavatar.models.strict_loading import empty_model  # noqa: E402
from stableavatar.models.weights import BASE_CONFIG_FILE, read_base_config  # noqa: E402
from stableavatar.parallel.estimate import GIGA, Cluster, Job  # noqa: E402
from stableavatar.parallel.report import report  # noqa: E402
from stableavatar.parallel.work import Size  # noqa: E402
from stableavatar.training.config import TrainConfig  # noqa: E402
from stableavatar.training.estimate import GIB, PARTITIONED, estimate, table  # noqa: E402
from stableavatar.training.processes import training_dtype  # noqa: E402
from stableavatar.training.trainable import select, to_training_dtype, trained  # noqa: E402

PUBLISHED: dict[str, dict[str, Any]] = {
    "1.3b": {},
    "14b": {"dim": 5120, "num_heads": 40, "num_layers": 40, "ffn_dim": 13824, "audio_hidden_dims": (2048,)},
}
"""AvatarTransformer's settings of the published models."""


def transformer_settings(config: TrainConfig | InferenceConfig) -> dict[str, Any]:
    """Of the transformer that a configuration means. Raises ValueError if its config.json cannot be found or read."""
    scratch = getattr(config, "scratch", "")
    if scratch or config.model:
        path = Path(scratch or Path(config.model) / "transformer" / "config.json")
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"cannot read {path} ({error}); --model 1.3b or 14b plans for a published model") from None
        return {key: value for key, value in found.items() if not key.startswith("_")}
    path = Path(config.checkpoints) / config.base / BASE_CONFIG_FILE
    if not config.checkpoints or not path.is_file():
        raise ValueError("the model's size is not known: give --model 1.3b or 14b, scratch=config.json, model=FOLDER or checkpoints=FOLDER")
    settings = read_base_config(path)
    large = PUBLISHED["14b"]
    return settings | ({"audio_hidden_dims": large["audio_hidden_dims"]} if settings.get("dim") == large["dim"] else {})


def build(config: TrainConfig, name: str) -> AvatarTransformer:
    """The transformer as training has it, without memory for its weights."""
    settings = PUBLISHED[name] if name else transformer_settings(config)
    model = empty_model(lambda: AvatarTransformer(**settings))
    if config.what == "lora":
        inject_lora(model, config.lora.rank, config.lora.alpha, config.lora.targets, config.lora.adapter)
    else:
        select(model, config.what)
    to_training_dtype(model, training_dtype(config))
    if config.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    return model


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line: `config` (path or None), `words` (key=value) and the options."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)

    def number(name: str, kind: type, default: float, meaning: str) -> None:
        parser.add_argument(name, type=kind, default=default, help=f"{meaning} (default: %(default)s)")

    parser.add_argument("words", nargs="*", metavar="CONFIG.yaml | key=value", help="settings of train.py, or of inference.py with --gpus")
    number("--card", float, 80, "memory of one GPU in GiB")
    parser.add_argument("--model", default="", choices=("", *PUBLISHED), help="a published size, for settings whose files are not here")
    number("--processes", int, 1, "training: GPUs of the run")
    parser.add_argument("--strategy", default="ddp", choices=PARTITIONED, help="training: what the GPUs share (default: %(default)s)")
    parser.add_argument("--gpus", type=int, help="inference: GPUs at hand; plans for inference.py")
    number("--seconds", float, 60, "inference: length of the video")
    number("--best", int, 5, "inference: meshes to show")
    number("--peak", float, 312, "inference: TFLOP/s on a GPU's data sheet")
    number("--share", float, 0.4, "inference: part of the peak that the transformer reaches")
    number("--decode-share", float, 0.1, "inference: part of the peak that the VAE, in float32, reaches")
    number("--machine", int, 8, "inference: GPUs in a machine")
    number("--link", float, 300, "inference: GB/s that a GPU sends to others in its machine")
    number("--network", float, 25, "inference: GB/s that a GPU sends to other machines")
    number("--host", float, 1, "inference: GB/s between the hosts' memories, where latents are")
    number("--copy", float, 25, "inference: GB/s from a host to its GPU, for parallel.offload")
    number("--stream", float, 1500, "inference: GB/s of a GPU's own memory")
    number("--latency", float, 20, "inference: microseconds that a message takes beside its bytes")
    args = parser.parse_intermixed_args(argv)
    args.config = args.words.pop(0) if args.words and "=" not in args.words[0] else None
    return args


def plan_training(args: argparse.Namespace) -> Iterator[str]:
    """Lines of a plan for train.py."""
    config = load_config(TrainConfig, args.config, args.words)
    model = build(config, args.model)
    plans = estimate(model, config, args.processes, args.strategy)
    numbers = sum(p.numel() for p in model.parameters()), sum(p.numel() for p in trained(model).values())
    yield f"{numbers[0] / 1e9:.3f} billion weights, {numbers[1] / 1e9:.3f} of them train; {args.processes} GPUs, {args.strategy}"
    yield table(plans, args.card)


def plan_inference(args: argparse.Namespace) -> Iterator[str]:
    """Lines of a plan for inference.py."""
    for name, value in vars(args).items():
        if isinstance(value, (int, float)) and value <= 0:
            raise ValueError(f"--{name.replace('_', '-')} must be more than 0, got {value}")
    config = load_config(InferenceConfig, args.config, args.words)
    dtype = getattr(torch, "bfloat16" if config.dtype == "auto" else config.dtype)
    size = Size.of(PUBLISHED[args.model] if args.model else transformer_settings(config), dtype)
    cluster = Cluster(
        args.card * GIB, args.peak * args.share * 1e12, args.peak * args.decode_share * 1e12, args.link * GIGA, args.network * GIGA,
        args.host * GIGA, args.copy * GIGA, args.stream * GIGA, args.machine, args.latency * 1e-6,
    )  # fmt: skip
    yield from report(Job.of(config, size, max(1, int(args.seconds * config.fps))), cluster, args.gpus, args.best)


def main(argv: list[str]) -> int:
    """Exit code: 0, or 2 for a mistake that one line describes."""
    args = parse(argv)
    try:
        for line in plan_training(args) if args.gpus is None else plan_inference(args):
            print(line)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

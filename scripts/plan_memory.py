"""What a training run needs on each GPU, and what a step computes, before anything is loaded; no weights have to be on disk.

    python scripts/plan_memory.py configs/train/NAME.yaml [key=value ...] [--processes 64] [--strategy zero2] [--card 80] [--model 1.3b]

Prints a line per bucket, in GiB: weights, gradients, optimiser, moving average, activations, encoders and their total with what a
GPU's libraries take (1.5); whether that fits the card; operations of an optimiser step on one GPU, and its seconds on an A100 that
reaches 40 % of its peak, with what gradient checkpointing computes again.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from stableavatar.command_line import Parser  # noqa: E402
from stableavatar.config import load_config  # noqa: E402
from stableavatar.models.dit import AvatarTransformer  # noqa: E402
from stableavatar.models.lora import inject_lora  # noqa: E402
from stableavatar.models.strict_loading import empty_model  # noqa: E402
from stableavatar.models.weights import BASE_CONFIG_FILE, read_base_config  # noqa: E402
from stableavatar.training.config import TrainConfig  # noqa: E402
from stableavatar.training.estimate import PARTITIONED, estimate, table  # noqa: E402
from stableavatar.training.trainable import select, to_training_dtype, trained  # noqa: E402

PUBLISHED: dict[str, dict[str, Any]] = {
    "1.3b": {},
    "14b": {"dim": 5120, "num_heads": 40, "num_layers": 40, "ffn_dim": 13824, "audio_hidden_dims": (2048,)},
}
"""AvatarTransformer's settings of the published models."""


def transformer_settings(config: TrainConfig) -> dict[str, Any]:
    """Of the transformer that a configuration trains. Raises ValueError if its config.json cannot be found or read."""
    if config.scratch or config.model:
        path = Path(config.scratch or Path(config.model) / "transformer" / "config.json")
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
    to_training_dtype(model, getattr(torch, config.dtype))
    if config.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    return model


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line: `config` (path or None), `words` (key=value) and the options."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("words", nargs="*", metavar="CONFIG.yaml | key=value", help="settings of train.py")
    parser.add_argument("--processes", type=int, default=1, help="GPUs of the run (default: %(default)s)")
    parser.add_argument("--strategy", default="ddp", choices=PARTITIONED, help="what the GPUs share (default: %(default)s)")
    parser.add_argument("--card", type=float, default=80, help="memory of one GPU in GiB (default: %(default)s)")
    parser.add_argument("--model", default="", choices=("", *PUBLISHED), help="a published size, for settings whose files are not here")
    args = parser.parse_intermixed_args(argv)
    args.config = args.words.pop(0) if args.words and "=" not in args.words[0] else None
    return args


def main(argv: list[str]) -> int:
    """Exit code: 0, or 2 for a mistake that one line describes."""
    args = parse(argv)
    try:
        config = load_config(TrainConfig, args.config, args.words)
        model = build(config, args.model)
        plans = estimate(model, config, args.processes, args.strategy)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    numbers = sum(p.numel() for p in model.parameters()), sum(p.numel() for p in trained(model).values())
    print(f"{numbers[0] / 1e9:.3f} billion weights, {numbers[1] / 1e9:.3f} of them train; {args.processes} GPUs, {args.strategy}")
    print(table(plans, args.card))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

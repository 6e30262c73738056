"""Merges LoRA files into a transformer, takes them out again, rewrites them for other tools, and says what is in them.

    python scripts/lora.py merge TRANSFORMER OUTPUT lora=FILE[:WEIGHT],...
    python scripts/lora.py unmerge TRANSFORMER OUTPUT lora=FILE[:WEIGHT],...
    python scripts/lora.py export FILE OUTPUT
    python scripts/lora.py show FILE

TRANSFORMER is a file in released names or a folder that save_pretrained wrote. OUTPUT ending in .safetensors, .pt or .pth is a file in
released names, anything else a folder; precisions stay as they are. `unmerge` with the same weights gives the base up to rounding.
`export` writes the layout that most tools take: `diffusion_model.` and released names.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from stableavatar.folders import load_model  # noqa: E402
from stableavatar.models.checkpoint_files import Checkpoint  # noqa: E402
from stableavatar.models.checkpoint_writing import write_state_dict  # noqa: E402
from stableavatar.models.dit import AvatarTransformer  # noqa: E402
from stableavatar.models.lora import merge_files, unmerge_files  # noqa: E402
from stableavatar.models.lora_files import check_loras, describe, export_lora, parse_loras  # noqa: E402
from stableavatar.models.strict_loading import export_tensors  # noqa: E402
from stableavatar.models.weights import load_transformer  # noqa: E402

FILE_ENDINGS = (".safetensors", ".pt", ".pth")
WEIGHTS = "diffusion_pytorch_model.safetensors"
MATRIX = "blocks.0.self_attn.q.weight"
"""A tensor that no precision rule exempts: its dtype is the model's."""


def change(args: argparse.Namespace) -> None:
    """Merges or unmerges."""
    if not args.lora.startswith("lora=") or not (files := parse_loras(args.lora.removeprefix("lora="))):
        raise ValueError(f"name the LoRA files as lora=FILE[:WEIGHT],...; got {args.lora!r}")
    if args.output.resolve() == args.transformer.resolve():
        raise ValueError(f"OUTPUT is TRANSFORMER itself, {args.output}; give another name, because the base cannot be restored exactly")
    check_loras(args.lora.removeprefix("lora="))
    model = load(args.transformer)
    (merge_files if args.command == "merge" else unmerge_files)(model, files)
    if args.output.suffix in FILE_ENDINGS:
        write_state_dict(args.output, dict(export_tensors(model)))
    else:
        write_state_dict(args.output / WEIGHTS, dict(model.named_parameters()))
        model.save_config(args.output)
    print(f"wrote {args.output}")


def load(path: Path) -> AvatarTransformer:
    """The transformer of a file or a folder, in the precision that it has there; a base model's file gets the usual fresh audio tensors."""
    if not path.is_dir():
        return load_transformer(path, dtype=None, fresh_audio=True)
    dtypes = (tensor.dtype for name, tensor in Checkpoint(path).read() if name == MATRIX)
    return load_model(AvatarTransformer, path, next(dtypes, torch.float32))


def export(args: argparse.Namespace) -> None:
    """Rewrites a file under released names."""
    export_lora(args.file, args.output)
    print(f"wrote {args.output}")


def show(args: argparse.Namespace) -> None:
    """Prints what a file holds, a fact per line."""
    for fact, value in describe(args.file).items():
        print(f"{fact}: {value}")


def main(argv: list[str]) -> int:
    """Exit code: 0, or 2 for a mistake that one line describes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("merge", "unmerge"):
        command = commands.add_parser(name)
        command.add_argument("transformer", type=Path, metavar="TRANSFORMER")
        command.add_argument("output", type=Path, metavar="OUTPUT")
        command.add_argument("lora", metavar="lora=FILE[:WEIGHT],...")
        command.set_defaults(run=change)
    command = commands.add_parser("export")
    command.add_argument("file", type=Path, metavar="FILE")
    command.add_argument("output", type=Path, metavar="OUTPUT")
    command.set_defaults(run=export)
    command = commands.add_parser("show")
    command.add_argument("file", type=Path, metavar="FILE")
    command.set_defaults(run=show)
    args = parser.parse_args(argv)
    try:
        args.run(args)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

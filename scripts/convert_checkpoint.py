"""Rewrites the released files as a diffusers-style folder (for `from_pretrained`), and back; no tensor changes by a bit.

    python scripts/convert_checkpoint.py to-diffusers CHECKPOINTS FOLDER [--transformer FILE] [--base DIR] [--wav2vec DIR]
    python scripts/convert_checkpoint.py to-released FOLDER CHECKPOINTS [...]

CHECKPOINTS is laid out as published: the three options are paths in it. `--only transformer vae` converts those parts alone.
The puppet world's VAE has no released form: its folder is copied as it is, into that of the base model as puppet_vae, and back.
Tensors are copied one by one from file to file, so that memory stays small at any size.
"""

import argparse
import json
import logging
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from diffusers import ModelMixin
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection, UMT5Config, UMT5EncoderModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from stableavatar.config import RELEASED_TRANSFORMER, InferenceConfig  # noqa: E402
from stableavatar.models import weights  # noqa: E402
from stableavatar.models.checkpoint_files import Checkpoint  # noqa: E402
from stableavatar.models.checkpoint_writing import write_tensors  # noqa: E402
from stableavatar.models.dit import AvatarTransformer  # noqa: E402
from stableavatar.models.key_maps import CLIP_PREFIX, released_sources  # noqa: E402
from stableavatar.models.strict_loading import by_released, check_shapes, empty_model, export_tensors, released_shapes  # noqa: E402
from stableavatar.pipeline import StableAvatarPipeline  # noqa: E402
from stableavatar.puppet.vae import PuppetVAE  # noqa: E402
from stableavatar.vae import WanVAE  # noqa: E402

SMALL_PARTS = ("tokenizer", "audio_encoder", "audio_processor")

NOT_SETTINGS = {
    "architectures",
    "dtype",
    "transformers_version",
    "_name_or_path",
    "_use_default_values",
    "_class_name",
    "_diffusers_version",
}
"""Entries of a saved config that do not describe the network."""


@dataclass(frozen=True)
class Part:
    """A component with weights: its released file, and how either side describes the model.

    Attributes:
        file: released file; prefix: of its tensors' names.
        from_released: model without memory from the released file; from_folder: from the component's config.json.
        copied: `file` is a folder that is copied as it is.
    """

    file: Path
    from_released: Callable[[Checkpoint], nn.Module]
    from_folder: Callable[[Path], nn.Module]
    prefix: str = ""
    copied: bool = False


def parts(args: argparse.Namespace) -> dict[str, Part]:
    """Component name -> part, for the released layout that the options state."""
    base, config = args.checkpoints / args.base, args.checkpoints / args.base / "config.json"

    def transformer(file: Checkpoint) -> AvatarTransformer:
        return weights.empty_transformer(file, config if config.is_file() else None)

    def diffusers_model(cls: type[ModelMixin]) -> Callable[[Path], nn.Module]:
        return lambda folder: cls.from_config(cls.load_config(folder))

    def text_encoder(folder: Path) -> UMT5EncoderModel:
        return UMT5EncoderModel(UMT5Config.from_pretrained(folder))

    def image_encoder(folder: Path) -> CLIPVisionModelWithProjection:
        return CLIPVisionModelWithProjection(CLIPVisionConfig.from_pretrained(folder))

    own, own_vae = base / "puppet_vae", diffusers_model(PuppetVAE)
    vae = Part(base / weights.VAE_FILE, weights.empty_vae, diffusers_model(WanVAE))
    if is_puppet_vae(args.folder / "vae" if args.direction == "to-released" else own):
        vae = Part(own, lambda file: empty_model(lambda: own_vae(file.path)), own_vae, copied=True)
    every = {
        "transformer": Part(args.checkpoints / args.transformer, transformer, diffusers_model(AvatarTransformer)),
        "vae": vae,
        "text_encoder": Part(base / weights.TEXT_ENCODER_FILE, weights.empty_text_encoder, text_encoder),
        "image_encoder": Part(base / weights.IMAGE_ENCODER_FILE, weights.empty_image_encoder, image_encoder, CLIP_PREFIX),
    }
    return {name: part for name, part in every.items() if name in (args.only or every)}


def is_puppet_vae(folder: Path) -> bool:
    """Whether a folder holds the puppet world's VAE."""
    config = folder / "config.json"
    return config.is_file() and json.loads(config.read_text(encoding="utf-8")).get("_class_name") == PuppetVAE.__name__


def copy_part(part: Part, source: Path, target: Path) -> nn.Module:
    """Copies the folder of a component; gives its model, without memory."""
    shutil.copytree(source, target, dirs_exist_ok=True)
    return empty_model(lambda: part.from_folder(target))


def to_diffusers(args: argparse.Namespace) -> None:
    """Released files to a pipeline folder."""
    small = (
        {}
        if args.only
        else weights.load_small_parts(args.checkpoints / args.base / weights.TOKENIZER_FOLDER, args.checkpoints / args.wav2vec)
    )
    models = {name: part_to_diffusers(part, args.folder / name) for name, part in parts(args).items()}
    for name, component in small.items():
        component.save_pretrained(args.folder / name)
    if small:
        StableAvatarPipeline(**models, **small).save_config(args.folder)


def part_to_diffusers(part: Part, folder: Path) -> nn.Module:
    """Writes config.json and weights of one component; gives its model, without memory."""
    if part.copied:
        return copy_part(part, part.file, folder)
    file = Checkpoint(part.file, part.prefix)
    model = part.from_released(file)
    check_shapes(file.path, file.shapes, released_shapes(model))
    targets = by_released(released_sources(model))

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in file.read():
            for ours, source in targets[name]:
                yield ours, source.ours(tensor)

    stem = "diffusion_pytorch_model" if isinstance(model, ModelMixin) else "model"
    write(folder / f"{stem}.safetensors", tensors)
    if isinstance(model, ModelMixin):
        model.save_config(folder)
    else:
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(folder)
    return model


def to_released(args: argparse.Namespace) -> None:
    """A pipeline folder to files as released."""
    base = args.checkpoints / args.base
    for name, part in parts(args).items():
        model = part_to_released(part, args.folder / name)
        if name == "transformer":
            base.mkdir(parents=True, exist_ok=True)
            (base / weights.BASE_CONFIG_FILE).write_text(json.dumps(weights.base_config(model), indent=2))
        warn_of_lost_settings(name, model, part.from_released(Checkpoint(part.file, part.prefix)))
    places = () if args.only else zip(SMALL_PARTS, (base / weights.TOKENIZER_FOLDER, *[args.checkpoints / args.wav2vec] * 2), strict=True)
    for name, place in places:
        if not (args.folder / name).is_dir():
            raise ValueError(f"folder {args.folder / name} does not exist; --only converts single parts")
        shutil.copytree(args.folder / name, place, dirs_exist_ok=True)


def part_to_released(part: Part, folder: Path) -> nn.Module:
    """Writes the released file of one component; gives its model, without memory."""
    if part.copied:
        return copy_part(part, folder, part.file)
    file = Checkpoint(folder)
    try:
        model = empty_model(lambda: part.from_folder(folder))
    except OSError as error:
        raise ValueError(f"{folder} has no readable config.json") from error
    check_shapes(file.path, file.shapes, {name: parameter.shape for name, parameter in model.named_parameters()})
    ours = dict(file.read())
    write(part.file, lambda: ((part.prefix + name, tensor) for name, tensor in export_tensors(model, ours.__getitem__)))
    return model


def write(path: Path, tensors: Callable[[], Iterator[tuple[str, Tensor]]]) -> None:
    """Two passes over mapped tensors: their kinds, then their data."""
    specs = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors()}
    write_tensors(path, specs, tqdm(tensors(), desc=path.name, total=len(specs), unit="tensor"))


def warn_of_lost_settings(name: str, model: nn.Module, reread: nn.Module) -> None:
    """Released files hold no settings but a few of the transformer; what a reader would guess otherwise is said."""
    before, after = (dict(m.config) if isinstance(m, ModelMixin) else m.config.to_dict() for m in (model, reread))
    lost = sorted(key for key in before.keys() - NOT_SETTINGS if before[key] != after.get(key) and before[key] not in ([], ()))
    if lost:
        logging.warning("%s: released files cannot state these settings: %s", name, ", ".join(f"{key}={before[key]}" for key in lost))


def main(argv: list[str]) -> int:
    """Exit code: 0, or 2 for a mistake that one line describes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("direction", choices=("to-diffusers", "to-released"))
    parser.add_argument("source", type=Path, help="CHECKPOINTS for to-diffusers, FOLDER for to-released")
    parser.add_argument("target", type=Path, help="the other one; made if missing")
    for option, default in (("transformer", RELEASED_TRANSFORMER), ("base", InferenceConfig.base), ("wav2vec", InferenceConfig.wav2vec)):
        parser.add_argument(f"--{option}", default=default, help="path in CHECKPOINTS (default: %(default)s)")
    parser.add_argument("--only", nargs="+", choices=("transformer", "vae", "text_encoder", "image_encoder"), help="convert these alone")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    forward = args.direction == "to-diffusers"
    args.checkpoints, args.folder = (args.source, args.target) if forward else (args.target, args.source)
    try:
        (to_diffusers if forward else to_released)(args)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Runs every vector of a reference folder and prints the relative errors, max |a - b| / max |b|, of this implementation.

    python scripts/verify_reference.py ../shared/reference

The folder holds cases.json, which states sizes and cases of each model, and NAME.weights.safetensors (released names) and
NAME.io.safetensors (inputs and outputs) for each. Exit code: 0 within the limit, 1 above it, 2 for a missing or damaged file.
"""

import argparse
import json
import logging
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from stableavatar.encoders import encode_image, encode_pixels  # noqa: E402
from stableavatar.geometry import audio_slices  # noqa: E402
from stableavatar.models import weights  # noqa: E402
from stableavatar.models.checkpoint_files import Checkpoint  # noqa: E402
from stableavatar.models.dit import AudioFeatures, AvatarTransformer, Conditions  # noqa: E402
from stableavatar.models.layout import TokenLayout  # noqa: E402
from stableavatar.vae import WanVAE  # noqa: E402

LIMIT = 1e-4

TRANSFORMER_KEYS = {"text_dim": "text_dim", "image_dim": "image_dim", "audio_dim": "audio_dim", "audio_heads": "adapter_heads"} | {
    "audio_layers": "adapter_layers"
}
"""cases.json -> AvatarTransformer's settings, beside the keys of a base model's config.json."""

CLIP_KEYS = {"num_heads": "num_attention_heads", "activation": "hidden_act", "norm_eps": "layer_norm_eps"}

Row = tuple[str, float]
Spec = dict[str, Any]


class Vectors:
    """One model's files in the folder: its weights, and its inputs and outputs by name."""

    def __init__(self, folder: Path, name: str) -> None:
        self.weights = folder / f"{name}.weights.safetensors"
        self.path = folder / f"{name}.io.safetensors"
        self.tensors = {key: tensor.clone() for key, tensor in Checkpoint(self.path).read()}

    def __getitem__(self, key: str) -> Tensor:
        if key not in self.tensors:
            raise ValueError(f"{self.path} has no tensor '{key}', which cases.json promises")
        return self.tensors[key]


def relative_error(got: Tensor, expected: Tensor) -> float:
    """max |a - b| / max |b|; infinite for another shape, and NaN stays NaN."""
    if got.shape != expected.shape:
        return math.inf
    got, expected = got.double(), expected.double()
    return ((got - expected).abs().max() / expected.abs().max().clamp_min(torch.finfo(torch.float32).tiny)).item()


def pick(spec: Spec, keys: dict[str, str]) -> Spec:
    """The settings of `spec` under our names."""
    return {ours: spec[theirs] for theirs, ours in keys.items() if theirs in spec}


def check_transformer(spec: Spec, vectors: Vectors) -> Iterator[Row]:
    """Velocity and refined audio tokens of every case."""
    model = weights.load_transformer(vectors.weights, torch.float32, config=pick(spec, weights.BASE_CONFIG_KEYS | TRANSFORMER_KEYS))
    for case, settings in spec["cases"].items():
        latents, timesteps = vectors[f"{case}.latents"], vectors[f"{case}.timestep"]
        conditions = read_conditions(vectors, case, len(latents), model.config.text_length)
        layout = TokenLayout.full(latents.shape[2], clip_audio=settings.get("clip_level", False))
        yield f"{case}.output", relative_error(model(latents, timesteps, conditions, layout), vectors[f"{case}.output"])
        yield from check_adapter(model, vectors, case, conditions)


def read_conditions(vectors: Vectors, case: str, batch: int, text_length: int) -> Conditions:
    """A case's conditions; in a batch the first sample is the one without refined audio."""
    text = [vectors[f"{case}.text_embeds.{i}"] for i in range(batch)]
    padded = torch.stack([torch.nn.functional.pad(prompt, (0, 0, 0, text_length - len(prompt))) for prompt in text])
    audio = vectors[f"{case}.audio_embeds"]
    keep = torch.tensor([0.0] + [1.0] * (batch - 1)) if batch > 1 else None
    features = AudioFeatures(audio.expand(batch, -1, -1), keep)
    return Conditions(padded, vectors[f"{case}.image_embeds"], vectors[f"{case}.condition"], features)


def check_adapter(model: AvatarTransformer, vectors: Vectors, case: str, conditions: Conditions) -> Iterator[Row]:
    """Refined tokens of the batch's last sample, and how many of each slice are audio."""
    patches = model.embed_patches(vectors[f"{case}.latents"], conditions.reference)
    refined = model.refine_audio(conditions.audio, patches, *model.embed_time(vectors[f"{case}.timestep"]))
    yield f"{case}.audio_tokens", relative_error(refined.tokens[-1:], vectors[f"{case}.audio_tokens"])
    yield f"{case}.audio_lens", relative_error(refined.lengths, vectors[f"{case}.audio_lens"])


def check_text(spec: Spec, vectors: Vectors) -> Iterator[Row]:
    """UMT5's last hidden state."""
    model = weights.load_text_encoder(vectors.weights, torch.float32)
    hidden = model(vectors["input_ids"], attention_mask=vectors["attention_mask"]).last_hidden_state
    yield "output", relative_error(hidden, vectors["output"])


def check_image(spec: Spec, vectors: Vectors) -> Iterator[Row]:
    """CLIP's penultimate hidden states, from prepared pixels and from an image."""
    model = weights.load_image_encoder(vectors.weights, torch.float32, config=pick(spec, CLIP_KEYS))
    yield "penultimate", relative_error(encode_pixels(model, vectors["pixels_224"]), vectors["penultimate"])
    yield "image_penultimate", relative_error(encode_image(model, vectors["image"]), vectors["image_penultimate"])


def check_vae(spec: Spec, vectors: Vectors) -> Iterator[Row]:
    """Both ways in one piece where the vectors ask for what streams do not give, and as streams."""
    vae = weights.load_vae(vectors.weights, torch.float32)
    video, latents, decoded = vectors["video"], vectors["latents"], vectors["decoded"]
    yield "mean", relative_error(torch.stack([torch.cat([*vae.encode_stream([v])], dim=1) for v in video]), vectors["mean"])
    yield "logvar", relative_error(vae.encode(video).latent_dist.parameters.chunk(2, dim=1)[1], vectors["logvar"])
    yield "decoded", relative_error(decode_unclamped(vae, latents), decoded)
    streamed = torch.stack([torch.cat([*vae.decode_stream([z])], dim=1) for z in latents])
    yield "decoded as a stream", relative_error(streamed, decoded.clamp(-1, 1))


def decode_unclamped(vae: WanVAE, latents: Tensor) -> Tensor:
    """The decoder's own output [B, 3, T, H, W] for normalised latents [B, 16, F, h, w]."""
    mean, std = (torch.tensor(values).view(1, -1, 1, 1, 1) for values in (vae.config.latents_mean, vae.config.latents_std))
    hidden = vae.post_quant_conv(latents * std + mean)
    vae.clear_cache()
    state = vae._feat_map
    frames = [vae.decoder(hidden[:, :, i : i + 1], feat_cache=state, feat_idx=[0], first_chunk=i == 0) for i in range(hidden.shape[2])]
    return torch.cat(frames, dim=2)


def check_windows(spec: Spec) -> Iterator[Row]:
    """Audio token ranges per latent frame."""
    for sizes, ranges in spec["ranges"].items():
        tokens, frames = map(int, sizes.split(","))
        yield sizes, relative_error(torch.tensor(audio_slices(tokens, frames)), torch.tensor(ranges))


CHECKS = {"transformer": check_transformer, "umt5": check_text, "clip": check_image, "vae": check_vae}


def check_folder(folder: Path) -> Iterator[Row]:
    """(model.tensor, relative error) of everything that cases.json names; ValueError for a missing or damaged file."""
    for name, spec in read_cases(folder / "cases.json").items():
        kind = spec.get("kind", name.split("_")[0])
        try:
            if kind == "audio":
                rows = list(check_windows(spec))
            elif kind in CHECKS:
                rows = list(CHECKS[kind](spec, Vectors(folder, name)))
            else:
                raise ValueError(f"cases.json names '{name}', which is none of {', '.join(CHECKS)} and audio_windows")
        except (RuntimeError, LookupError, TypeError) as error:
            raise ValueError(f"the vectors of '{name}' do not fit what cases.json says of them: {str(error).splitlines()[0]}") from error
        yield from ((f"{name}.{row}", error) for row, error in rows)


def read_cases(path: Path) -> dict[str, Spec]:
    """Content of cases.json; ValueError if it is missing or none."""
    try:
        cases = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is missing or damaged ({error})") from error
    if not isinstance(cases, dict) or not cases or not all(isinstance(spec, dict) for spec in cases.values()):
        raise ValueError(f"{path} names no models")
    return cases


def main(argv: list[str]) -> int:
    """Prints the table; gives the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder with cases.json and its files")
    folder = parser.parse_args(argv).folder
    logging.basicConfig(level=logging.ERROR)
    worst = 0.0
    try:
        with torch.no_grad():
            for row, error in check_folder(folder):
                failed = not error <= LIMIT
                worst = max(worst, math.inf if failed and not error > LIMIT else error)
                print(f"{row:<40}{error:12.3e}{'  FAILED' if failed else ''}", flush=True)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{'worst':<40}{worst:12.3e}  limit {LIMIT:g}")
    return int(worst > LIMIT)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

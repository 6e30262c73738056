"""Measures a model in the puppet world: faces, voices and sentences that no training has seen, through the project's own pipeline."""

import hashlib
import json
import logging
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import soundfile
import torch
from PIL import Image

from stableavatar.config import Config, InferenceConfig, load_config, override, setting
from stableavatar.evaluation.pairs import seam_frames
from stableavatar.evaluation.signals import correlation
from stableavatar.evaluation.statistics import bootstrap
from stableavatar.files import hash_file, write_json
from stableavatar.geometry import FPS, SAMPLE_RATE, TEMPORAL_STRIDE, frames_to_latents
from stableavatar.media import from_pixels, to_pixels
from stableavatar.models.lora_files import parse_loras
from stableavatar.pipeline import StableAvatarPipeline, transformer_path
from stableavatar.puppet import metrics
from stableavatar.puppet.identity import FRAMINGS, KINDS, STYLES
from stableavatar.puppet.motion import Motion
from stableavatar.puppet.observer import Observation, observe
from stableavatar.puppet.renderer import render
from stableavatar.puppet.vae import VideoVAE
from stableavatar.puppet.world import SHAPES, Scene, draw_scene
from stableavatar.sampling.windows import WindowPlan

logger = logging.getLogger(__name__)

ORACLE_FRAMES = 249
"""Of the truth, so many frames at most go through the VAE."""
MINUTE = 60 * FPS
LONG = 2 * MINUTE
"""From so many frames on, the first and the last minute are compared."""
STRETCH = 10 * FPS
"""Frames at either end that drift is measured between; a quarter of a shorter video."""
MARGIN = 0.05
"""Of the shorter side: so far from where the person is seen, the background begins."""
AWAY = 6.0
"""Head heights: out of the picture."""
PERSON = 4
"""Grey levels by which a person's pixel differs from the background."""
OTHERS = 8
"""Sounds of other cases with which lips are compared."""
WEIGHTS = (".safetensors", ".pt", ".pth")
"""Endings of files with weights."""
CASES = 10_000
"""At most, so that no two seeds share any."""
Values = dict[str, float | None]
"""Figures by name; None: there was nothing to measure."""


@dataclass
class EvaluateConfig(Config):
    """The settings of `puppet.py evaluate`."""

    output: str = setting("evaluation.json", "figures of every case, their means and intervals; an interrupted evaluation goes on from it")
    config: str = setting("configs/inference/puppet.yaml", "settings of inference.py, a YAML file")
    settings: str = setting("", "more of them, key=value words separated by spaces, such as 'steps=10 guidance.alpha=1'")
    model: str = setting("", "folder of a pipeline; empty for the one that the YAML names")
    seed: int = setting(0, "which cases there are, and their noise", low=0, high=9999)
    cases: int = setting(8, "held-out videos", low=1, high=CASES)
    frames: int = setting(125, "frames of each, 25 per second; from 3000 on, first and last minute are compared", low=5)
    kind: str = setting("speech", "what they do", choices=tuple(KINDS))
    shape: str = setting("square", "their shape", choices=tuple(SHAPES))
    style: str = setting("", "how they are drawn; empty for either", choices=("", *STYLES))
    framing: str = setting("", "how much of them is seen; empty for all", choices=("", *FRAMINGS))


@dataclass(frozen=True)
class Truth:
    """What a video is compared with; tracks [T], pictures [H, W, .]."""

    aperture: np.ndarray
    width: np.ndarray
    reference: np.ndarray
    """uint8 [H, W, 3], the first frame."""
    background: np.ndarray
    """bool [H, W]: never covered by the person in the true video, nor close to that."""
    detail: float
    """Fine detail around the true faces after the VAE."""


@dataclass(frozen=True)
class Video:
    """What a pipeline made of a scene."""

    frames: np.ndarray
    """uint8 [T, H, W, 3], as long as the scene."""
    seams: list[int]
    """Frames with which a window begins or ends."""
    seconds: float
    """That it took."""


def evaluate(config: EvaluateConfig) -> None:
    """Makes and measures the cases that `config.output` lacks, writes it after each, and logs a table.

    Raises:
        ValueError: settings that do not fit, a model that cannot be loaded, an output of other settings.
    """
    torch.set_flush_denormal(True)  # as the program does: denormals are slow
    inference = inference_config(config)
    about = {key: value for key, value in asdict(config).items() if key not in ("output", "cases")}
    about |= {"inference": asdict(inference), "weights": weights(inference)}
    output = Path(config.output)
    done = stored(output, about)

    def store(cases: list[dict[str, Any]]) -> None:
        write_json(output, {"settings": about, "cases": cases, "summary": summary(cases)})

    pipeline = StableAvatarPipeline.from_config(inference) if len(done) < config.cases else None
    cases = evaluate_cases(pipeline, inference, draw_scenes(config), done, store)
    logger.info("%s\n%d cases of %d frames; written to %s", table(summary(cases)), len(cases), config.frames, output)


def inference_config(config: EvaluateConfig) -> InferenceConfig:
    """The settings of the pipeline: the YAML, the words, the model and the size of the shape."""
    width, height = SHAPES[config.shape]
    words = [f"width={width}", f"height={height}", *config.settings.split()] + [f"model={config.model}"] * bool(config.model)
    return load_config(InferenceConfig, config.config, words)


def draw_scenes(config: EvaluateConfig) -> list[Scene]:
    """The unseen scenes of an evaluation."""
    options = {"held_out": True, "style": config.style or None, "framing": config.framing or None}
    seeds = range(config.seed * CASES, config.seed * CASES + config.cases)
    return [draw_scene(seed, config.kind, SHAPES[config.shape], config.frames, **options) for seed in seeds]


def evaluate_cases(
    pipeline: StableAvatarPipeline | None,
    config: InferenceConfig,
    scenes: Sequence[Scene],
    done: Sequence[dict[str, Any]] = (),
    store: Callable[[list[dict[str, Any]]], None] = lambda cases: None,
) -> list[dict[str, Any]]:
    """Makes a video of each scene and measures it.

    Args:
        pipeline: None if nothing is left to do.
        config: settings of the videos; the noise of case i has the seed `config.seed` + i.
        done: results of the first scenes from an earlier call.
        store: called with all results after every case.

    Returns:
        for each scene "model" (figures of the video), "oracle" (of the truth after the VAE: what a perfect model would reach) and
        "seconds" (of making the video)
    """
    cases = list(done)[: len(scenes)]
    for number in range(len(cases), len(scenes)):
        others = [scene.motion.aperture for scene in (*scenes[number + 1 :], *scenes[:number])][:OTHERS]
        cases.append(_evaluate_case(pipeline, override(config, {"seed": config.seed + number}), scenes[number], others))
        known = {name: value for name, value in cases[-1]["model"].items() if value is not None}
        logger.info("case %d: %s", number, " ".join(f"{name} {value:.3f}" for name, value in known.items()))
        store(cases)
    return cases


def _evaluate_case(pipeline: StableAvatarPipeline, config: InferenceConfig, scene: Scene, others: list[np.ndarray]) -> dict[str, Any]:
    truth, oracle = true_video(scene, pipeline.vae)
    video = make_video(pipeline, config, scene, truth.reference)
    found = {"model": measure(video.frames, truth, video.seams, others), "oracle": measure(oracle, truth, [], others)}
    return found | {"seconds": video.seconds}


def make_video(pipeline: StableAvatarPipeline, config: InferenceConfig, scene: Scene, reference: np.ndarray) -> Video:
    """The pipeline's video of a scene's first frame, sound and prompt."""
    pipeline.set_progress_bar_config(disable=True)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        sound = Path(folder) / "voice.wav"
        soundfile.write(sound, scene.utterance.waveform, SAMPLE_RATE, subtype="PCM_16")
        frames = torch.cat(list(pipeline.stream(Image.fromarray(reference), sound, scene.prompt, config))).numpy()
    seconds = time.perf_counter() - began
    assert len(frames) == len(scene), f"{len(frames)} frames of a scene of {len(scene)}"
    lengths = frames_to_latents(len(frames)), frames_to_latents(config.windows.frames)
    plan = WindowPlan.sliding(*lengths, config.windows.overlap, config.windows.tail)
    return Video(frames, seam_frames(plan, len(frames)), seconds)


def true_video(scene: Scene, vae: VideoVAE) -> tuple[Truth, np.ndarray]:
    """What is true of a scene, and its (first) frames after the VAE, uint8 [T, H, W, 3]."""
    frames = np.stack([scene.render(i).pixels for i in range(min(len(scene), ORACLE_FRAMES))])
    after = round_trip(vae, frames)
    detail = metrics.fine_detail(after, observe(after))
    return Truth(scene.motion.aperture, scene.motion.width, frames[0], background_mask(scene), detail), after


@torch.no_grad()
def round_trip(vae: VideoVAE, frames: np.ndarray) -> np.ndarray:
    """Frames uint8 [T, H, W, 3] encoded and decoded."""
    padding = -(len(frames) - 1) % TEMPORAL_STRIDE
    whole = torch.from_numpy(np.concatenate([frames, *[frames[-1:]] * padding]))
    pixels = from_pixels(whole.permute(3, 0, 1, 2)).to(vae.device)
    decoded = torch.cat(list(vae.decode_stream(vae.encode_stream([pixels]))), dim=1)
    return to_pixels(decoded).permute(1, 2, 3, 0).cpu().numpy()[: len(frames)]


def background_mask(scene: Scene) -> np.ndarray:
    """bool [H, W]: pixels that show the background in every true frame (of 50), and are not within MARGIN of the person in any.

    A model moves a person's head in its own time, but not much further than the true one; what is left is to stay as in the reference.
    """
    still = {name: np.zeros(1, np.float32) for name in vars(scene.motion)}
    still |= {name: np.full(1, AWAY, np.float32) for name in ("head_x", "sway")}
    empty = render(scene.identity, Motion(**still), 0, scene.size).pixels
    frames = (scene.render(i).pixels for i in metrics.sampled(len(scene)).tolist())
    person = np.any([cv2.absdiff(frame, empty).max(axis=2) > PERSON for frame in frames], axis=0)
    reach = max(1, round(MARGIN * min(scene.size)))
    return cv2.dilate(person.astype(np.uint8), np.ones((2 * reach + 1, 2 * reach + 1), np.uint8)) == 0


def measure(frames: np.ndarray, truth: Truth, seams: list[int], others: list[np.ndarray]) -> Values:
    """All figures of one video uint8 [T, H, W, 3] (see `metrics`).

    Args:
        seams: frames with which a window begins or ends.
        others: true apertures [.] of other cases' sounds.
    """
    seen, count = observe(frames), len(frames)
    heads, head = metrics.head_cuts(frames, seen), metrics.head_cuts(truth.reference[None], observe(truth.reference[None]))[0]
    alike = metrics.face_likeness(heads, head)
    aperture, width = truth.aperture[:count], truth.width[:count]
    silence, closed = metrics.silence(seen.aperture, aperture)
    values = {
        "aperture_correlation": correlation(seen.aperture, aperture),
        "lag": float(metrics.lag(seen.aperture, aperture)),
        "swapped_correlation": metrics.swapped_correlation(seen.aperture, others),
        "silence_aperture": silence,
        "silence_closed": closed,
        "width_correlation": correlation(seen.width, width),
        "blinks_per_minute": metrics.blink_rate(seen.blink),
        "broken_frames": float(metrics.broken_frames(frames, seen, alike, truth.reference, truth.background).sum()),
        "seam_jitter": metrics.seam_jitter(frames, seams),
    }
    if count >= LONG:
        for name, part in (("first", slice(MINUTE)), ("last", slice(count - MINUTE, count))):
            values[f"aperture_correlation_{name}_minute"] = correlation(seen.aperture[part], aperture[part])
    values |= _pictures(frames, seen, truth, heads, head)
    return {name: float(value) if math.isfinite(value) else None for name, value in values.items()}


def _pictures(frames: np.ndarray, seen: Observation, truth: Truth, heads: np.ndarray, head: np.ndarray) -> dict[str, float]:
    """What is compared in some of the frames."""
    chosen, stretch = metrics.sampled(len(frames)), min(STRETCH, max(1, len(frames) // 4))
    some = frames[chosen]
    values = metrics.identity(heads[chosen], head)
    if truth.background.any():
        values["background_de"] = float(metrics.background_distance(some, truth.reference, truth.background).mean())
        values["background_ssim"] = float(metrics.background_structure(some, truth.reference, truth.background).mean())
    values |= metrics.drift(frames, truth.background, stretch)
    values["sharpness"] = metrics.fine_detail(some, seen[chosen]) / max(truth.detail, 1e-6)
    return values


def summary(cases: Sequence[dict[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """For "model" and "oracle", of every figure: mean over the cases, its 95 % interval from the bootstrap, and how many had it."""
    rows = {}
    for row in ("model", "oracle"):
        known = [{name: value for name, value in case[row].items() if value is not None} for case in cases]
        names = dict.fromkeys(name for values in known for name in values)
        rows[row] = {name: asdict(bootstrap(np.array([[values[name] for values in known if name in values]]))) for name in names}
    return rows


def table(rows: dict[str, dict[str, dict[str, float]]]) -> str:
    """The summary in columns."""
    lines = [f"{'':36}{'model':>8}{'95 % interval':>20}{'truth after VAE':>18}"]
    for name, found in rows["model"].items():
        oracle = rows["oracle"].get(name, {}).get("mean", math.nan)
        lines.append(f"{name:36}{found['mean']:8.3f}{found['low']:11.3f} ..{found['high']:6.3f}{oracle:18.3f}")
    return "\n".join(lines)


def weights(config: InferenceConfig) -> str:
    """Digest of the weights that the settings name: other weights under the same name are another model."""
    places = [Path(folder) for folder in (config.model, config.checkpoints) if folder][:1]
    places += [transformer_path(config)] * bool(config.transformer) + [file for file, _ in parse_loras(config.lora)]
    digest = hashlib.sha256()
    for place in places:
        for file in [place] if place.is_file() else sorted(file for file in place.rglob("*") if file.suffix in WEIGHTS):
            digest.update(f"{file.relative_to(place).as_posix()} {hash_file(file)}".encode())
    return digest.hexdigest()[:16]


def stored(path: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Results of an earlier, perhaps interrupted run, by case. Raises ValueError if it was of something else."""
    if not path.exists():
        return []
    content = json.loads(path.read_text(encoding="utf-8"))
    if content["settings"] != settings:
        raise ValueError(f"{path} was made with other settings or weights; remove it, or give another output")
    return content["cases"]

"""Makes the videos of an experiment: every variant of every case with every seed, each once.

They go to OUT/videos/VARIANT/seed_N/NAME.mp4. What is there already is not made again, a video that was being made when the program was
killed goes on where it was, and a variant whose settings or weights have changed is an error, not a mixture.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from tqdm import tqdm

from stableavatar import cases
from stableavatar.config import InferenceConfig, load_config, override, settings, split_word
from stableavatar.evaluation.pairs import files_by_case
from stableavatar.evaluation.sets import read_cases, write_first_frame
from stableavatar.evaluation.settings import EvaluateConfig, Variant
from stableavatar.files import hash_file, write_json
from stableavatar.models.lora_files import parse_loras
from stableavatar.pipeline import transformer_path
from stableavatar.video_writer import sidecar_path

logger = logging.getLogger(__name__)

VIDEOS, WORK, PORTRAITS, RECORD = "videos", "work", "portraits", "variant.json"
OF_THE_CASE = ("reference", "audio", "prompt", "output", "seed", "work_dir")
"""Settings that differ between the videos of a variant."""
OF_THE_MACHINE = ("device", "save_every", "frames_dir", "cases")
"""Settings that may differ from run to run: they do not change what is seen."""


@dataclass(frozen=True)
class Job:
    """A video to make: its variant and all settings."""

    variant: str
    settings: InferenceConfig


def generate(config: EvaluateConfig) -> int:
    """Makes the videos that are not there yet; the exit code: 1 if a case failed (the others are made).

    Raises:
        ValueError: no cases, settings that do not fit, a model that cannot be loaded, videos of other settings or weights.
    """
    jobs = [job for job in check(config) if not _is_done(job)]
    failures: list[str] = []
    with tqdm(total=len(jobs), desc="generate", unit="video") as bar:
        for _, group in groupby(jobs, key=lambda job: _model(job.settings)):
            _make(list(group), failures, bar.update)
    if not failures:
        shutil.rmtree(Path(config.out) / WORK, ignore_errors=True)
    return 1 if failures else 0


def check(config: EvaluateConfig) -> list[Job]:
    """All videos of the experiment. ValueError for what would fail after hours: settings, weights, inputs, videos of other settings."""
    for key in ("out", "reference"):
        if not getattr(config, key):
            raise ValueError(f"{key} is not given; set {key}=FOLDER")
    if not config.rows():
        raise ValueError("variants is empty; an experiment that generates names them, one per line")
    shared = {variant.name: inference_config(config, variant) for variant in config.rows() if not absence(config, variant)}
    for variant, settings_of_all in shared.items():
        cases.check_model(settings_of_all)
        _check_record(config, variant, settings_of_all)
    jobs = list(plan(config, shared))
    for job in {job.settings.reference: job for job in jobs}.values():  # the cases are the same for all variants and seeds
        cases.check_inputs(job.settings)
    return jobs


def absence(config: EvaluateConfig, variant: Variant) -> str:
    """Why a variant cannot be generated, empty if it can be."""
    if variant.needs_weights and variant.name not in config.trained():
        return f"absent: its weights are trained differently; give transformers={variant.name}=FILE"
    return ""


def inference_config(config: EvaluateConfig, variant: Variant) -> InferenceConfig:
    """The settings that all videos of a variant share: the YAML, then the set's rate, the words for all, the variant's own.

    Raises:
        ValueError: there are no such settings, or they do not fit.
    """
    test_set = read_cases(Path(config.reference))["set"]
    values = {"fps": test_set["fps"]} if test_set else {}
    values |= {key: getattr(config, key) for key in ("model", "checkpoints") if getattr(config, key)}
    values |= dict(split_word(word) for word in config.settings.split()) | {"device": config.device} | variant.settings
    if variant.needs_weights:
        values["transformer"] = config.trained()[variant.name]
    try:
        return override(load_config(InferenceConfig, config.inference), values)
    except ValueError as error:
        raise ValueError(f"variant {variant.name}: {error}") from None


def plan(config: EvaluateConfig, shared: Mapping[str, InferenceConfig]) -> Iterator[Job]:
    """The videos of the experiment, whether they are there or not, variant after variant, each with the settings that `shared` tells."""
    folder, out = Path(config.reference), Path(config.out)
    found = files_by_case(folder)
    names = sorted(name for name, files in found.items() if "audio" in files or "video" in files)[: config.limit or None]
    for variant, settings_of_all in shared.items():
        for seed in config.noises():
            for name in names:
                place = Path(variant, f"seed_{seed}", f"{name}.mp4")
                yield Job(variant, override(settings_of_all, {
                    "reference": str(_portrait(name, found[name], out)), "audio": str(found[name].get("audio") or found[name]["video"]),
                    "prompt": _prompt(folder / f"{name}.txt"), "seed": seed, "output": str(out / VIDEOS / place),
                    "work_dir": str(out / WORK / place.with_suffix("")),
                }))  # fmt: skip


def _portrait(name: str, files: dict[str, Path], out: Path) -> Path:
    """The portrait of a case; the first frame of its video where there is none."""
    if "image" in files:
        return files["image"]
    if "video" not in files:
        raise ValueError(f"case {name} has neither portrait nor video; give {name}.png")
    portrait = out / PORTRAITS / f"{name}.png"
    if not portrait.exists():
        write_first_frame(files["video"], portrait)
    return portrait


def _prompt(path: Path) -> str:
    return path.read_text(encoding="utf-8").strip() if path.exists() else ""


def _check_record(config: EvaluateConfig, variant: str, shared: InferenceConfig) -> None:
    """Writes down what a variant is made with, unless it says something else already: then ValueError."""
    folder = Path(config.out) / VIDEOS / variant
    kept = {key: value for key, (_, value, _) in settings(shared).items() if key not in (*OF_THE_CASE, *OF_THE_MACHINE)}
    record = {"settings": kept, "weights": _weights(shared)}
    path = folder / RECORD
    if not path.exists():
        write_json(path, record)
    elif json.loads(path.read_text(encoding="utf-8")) != json.loads(json.dumps(record)):
        raise ValueError(f"{folder} was made with other settings or weights; remove it, or give another out")


def _weights(shared: InferenceConfig) -> str:
    """Digest of the transformer's weights and LoRAs, which is what variants differ by."""
    place = transformer_path(shared)
    files = sorted(place.glob("*.safetensors")) if place.is_dir() else [place] * place.is_file()
    sums = [hash_file(file) for file in (*files, *(Path(file) for file, _ in parse_loras(shared.lora)))]
    return hashlib.sha256(" ".join(sums).encode()).hexdigest()[:16]


def _is_done(job: Job) -> bool:
    """Whether a video is there whole: its record is written last."""
    output = Path(job.settings.output)
    return output.exists() and sidecar_path(output).exists()


def _model(shared: InferenceConfig) -> list[Any]:
    """What decides how the models are loaded."""
    return [value for key, (_, value, limits) in settings(shared).items() if limits.fixed and key != "cases"]


def _make(jobs: list[Job], failures: list[str], done: Callable[[], object]) -> None:
    """Makes videos of one model, which is loaded once."""
    pipeline = cases.load(jobs[0].settings)
    pipeline.set_progress_bar_config(leave=False)
    for job in jobs:
        name = f"{job.variant} {Path(job.settings.output).stem} seed {job.settings.seed}"
        with cases.reported(name, failures):
            cases.make_video(pipeline, job.settings)
            shutil.rmtree(job.settings.work_dir, ignore_errors=True)
        done()

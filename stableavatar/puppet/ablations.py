"""The paper's ablations in miniature: variants of one thing, trained or sampled differently, measured on the same unseen videos.

An experiment is a YAML of `configs/ablations`. What it makes is kept below `output` and made once:

    trainings/3f2a9c1b_seed0/     a run of train.py; variants, and experiments, that train alike share it
    NAME/full_seed0.json          figures of a variant's videos, case by case
    NAME/summary.json             means, differences and their intervals, as in docs/ablations.md
"""

import hashlib
import inspect
import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from stableavatar.config import Config, InferenceConfig, load_config, override, setting, split_word
from stableavatar.files import hash_file, write_json
from stableavatar.folders import load_model
from stableavatar.models.dit import AvatarTransformer
from stableavatar.pipeline import StableAvatarPipeline
from stableavatar.plots import plotting
from stableavatar.puppet.ablation_report import Results, write_report
from stableavatar.puppet.ablation_stretches import SHORTEST_STRETCH, Case, evaluate_stretches
from stableavatar.puppet.evaluation import EvaluateConfig, draw_scenes, evaluate_cases, inference_config, stored, weights
from stableavatar.puppet.world import SHAPES, Scene
from stableavatar.training.config import TrainConfig
from stableavatar.training.parts import from_scratch

logger = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parents[2]
"""Of the repository, where train.py is."""
PARTS = ("transformer", "train", "inference", "evaluate")
"""What a variant's words may change, each word beginning with one of these and a dot."""
MEASURED = ("config", "model", "cases", "frames", "kind", "shape", "style", "framing")
"""Settings of an evaluation that an experiment may choose; the others it sets itself."""
FIRST_SEED = 9000
"""`seed` of evaluation for seed 0 of an experiment: its cases are none of those that a model is usually measured with."""
AUDIO = "audio"
"""In the names of all weights of a transformer that hear, and of no others."""
NOISES = 1000
"""Between the noise of one seed's first case and that of the next's."""


@dataclass
class AblateConfig(Config):
    """The settings of `puppet.py ablate`: an experiment, and where its things are."""

    name: str = setting("", "of the experiment: its folder, its section of docs/ablations.md")
    title: str = setting("", "what it compares, the heading of its section")
    table: str = setting("", "what it repeats of the paper, such as 'tables 2 and 3'")
    variants: str = setting("", f"lines 'NAME: PART.KEY=VALUE PART.KEY=VALUE ...', PART any of {', '.join(PARTS)}")
    reference: str = setting("", "the variant that the others are compared with; empty for the first")
    seeds: str = setting("0,1,2", "of training, cases and noise, 0 to 999, by commas")
    train: str = setting("", "words of train.py for all variants, with max_steps; empty: nothing trains, the model of evaluate is measured")
    inference: str = setting("", "words of inference.py for all variants")
    evaluate: str = setting("cases=4 frames=125", f"words of puppet.py evaluate for all variants: {', '.join(MEASURED)}")
    figures: str = setting("aperture_correlation,identity_ssim,background_de,sharpness,broken_frames", "what the table shows, by commas")
    stretch: int = setting(0, f"frames of each stretch of the drift curve, {SHORTEST_STRETCH} or more; 0 for no curve", low=0)
    recipe: str = setting("configs/train/puppet.yaml", "settings of the trainings, a YAML of train.py")
    transformer: str = setting("configs/train/puppet_transformer.json", "settings of the transformer that the variants change")
    home: str = setting("runs/puppet", "what scripts/train_puppet.sh made: world, cache and parts for the trainings")
    trunk: str = setting("", "folder of a transformer that trainings start from, with fresh weights where it hears; empty: all are fresh")
    processes: int = setting(2, "of a training", low=1)
    output: str = setting("runs/ablations", "folder of trainings and results")
    docs: str = setting("docs", "folder of ablations.md and its pictures")

    def check(self) -> None:
        """Raise ValueError for any word of any variant that names no setting: before hours are spent."""
        variants, seeds = parse_variants(self.variants), parse_seeds(self.seeds)
        names = [variant.name for variant in variants]
        if not re.fullmatch(r"\w+", self.name):
            raise ValueError(f"name must be a word, got {self.name!r}: is the experiment's YAML named?")
        if len(variants) < 2 or len(set(names)) < len(names):
            raise ValueError(f"variants must be at least two, with different names; got {', '.join(names) or 'none'}")
        if self.reference and self.reference not in names:
            raise ValueError(f"reference must be one of {', '.join(names)}, got {self.reference!r}")
        if len({_check_variant(self, variant, seeds[0]).cases for variant in variants}) > 1:
            raise ValueError("evaluate.cases must be the same for all variants: they are compared case by case")


@dataclass(frozen=True)
class Variant:
    """One way to do it: changes of the transformer's settings, and words of train.py, inference.py and `puppet.py evaluate`."""

    name: str
    transformer: dict[str, str]
    train: dict[str, str]
    inference: dict[str, str]
    evaluate: dict[str, str]


@dataclass(frozen=True)
class Training:
    """A run of train.py.

    Attributes:
        folder: of the run; its name follows from all that it depends on.
        transformer: settings of the transformer. words: of train.py. steps: after which it is finished.
        seed: of what is fresh. trunk: folder of the transformer that the rest is of, if there is one.
    """

    folder: Path
    transformer: dict[str, Any]
    words: list[str]
    steps: int
    seed: int
    trunk: str


def ablate(config: AblateConfig) -> None:
    """Runs an experiment, seed by seed, and writes its section of the docs after each; what is there already is not made again.

    Raises:
        ValueError: settings that do not fit, a training that failed, results of other settings.
    """
    torch.set_flush_denormal(True)  # as the program does: denormals are slow
    plotting()  # what the report needs is there before hours are spent
    variants, seeds = parse_variants(config.variants), parse_seeds(config.seeds)
    results: Results = {variant.name: [] for variant in variants}
    for number, seed in enumerate(seeds):
        for variant in variants:
            logger.info("%s: %s, seed %d", config.name, variant.name, seed)
            results[variant.name].append(variant_cases(config, variant, seed))
        home, reference = Path(config.output) / config.name, config.reference or variants[0].name
        figures = [name.strip() for name in config.figures.split(",") if name.strip()]
        write_report(results, reference, figures, heading(config), about(config, seeds[: number + 1]), home, Path(config.docs))


def heading(config: AblateConfig) -> tuple[str, str]:
    """Name and title of the section."""
    return config.name, f"{config.title} ({config.table})" if config.table else config.title


def about(config: AblateConfig, seeds: Sequence[int]) -> str:
    """How it was made: the command, seeds, cases, training."""
    words = _words(config.evaluate)
    parts = [f"`python scripts/puppet.py ablate configs/ablations/{config.name}.yaml`", f"seeds {', '.join(map(str, seeds))}, for each"]
    parts[-1] += f" {words.get('cases', EvaluateConfig.cases)} videos of {words.get('frames', EvaluateConfig.frames)} frames"
    parts += [f"trained with `{config.train}`"] * bool(config.train) + [f"sampled with `{config.inference}`"] * bool(config.inference)
    if config.stretch:
        parts.append(f"early and late: the first and the last {config.stretch} frames")
    return "; ".join(parts) + "."


def parse_variants(text: str) -> list[Variant]:
    """`NAME: word word ...` line by line. Raises ValueError for a line or word that is none."""
    return [_parse_variant(line) for line in text.splitlines() if line.strip()]


def _parse_variant(line: str) -> Variant:
    name, colon, words = line.partition(":")
    if not colon or not re.fullmatch(r"[\w.-]+", name.strip()):
        raise ValueError(f"variants has lines 'NAME: PART.KEY=VALUE ...', got {line.strip()!r}")
    parts: dict[str, dict[str, str]] = {part: {} for part in PARTS}
    for key, value in map(split_word, words.split()):
        part, _, rest = key.partition(".")
        if part not in PARTS or not rest:
            raise ValueError(f"variant {name.strip()} has {key}={value}; expected {', '.join(f'{part}.KEY=VALUE' for part in PARTS)}")
        parts[part][rest] = value
    return Variant(name.strip(), **parts)


def parse_seeds(text: str) -> list[int]:
    """`0,1,2` -> [0, 1, 2]. Raises ValueError for anything but different numbers from 0 to 999."""
    words = [word.strip() for word in text.split(",")]
    if not all(re.fullmatch(r"\d{1,3}", word) for word in words) or len(set(words)) < len(words):
        raise ValueError(f"seeds must be different numbers from 0 to 999, by commas; got {text!r}")
    return list(map(int, words))


def _words(text: str) -> dict[str, str]:
    return dict(map(split_word, text.split()))


def _check_variant(config: AblateConfig, variant: Variant, seed: int) -> EvaluateConfig:
    """A variant's `measurement`. Raises ValueError for settings of it that there are not, or that do not fit."""
    found = measurement(config, variant, seed)
    inference_config(found)
    if config.stretch and not SHORTEST_STRETCH <= config.stretch <= found.frames // 2:
        raise ValueError(f"stretch must be 0, or {SHORTEST_STRETCH} to half of the {found.frames} frames, got {config.stretch}")
    if config.train:
        training(config, variant, seed)
    elif variant.train or variant.transformer:
        raise ValueError(f"variant {variant.name} changes the training, but nothing trains: train is empty")
    return found


def measurement(config: AblateConfig, variant: Variant, seed: int) -> EvaluateConfig:
    """Settings of a variant's evaluation; the model is that of `home` if it trains. Raises ValueError if there are no such settings."""
    words = _words(config.evaluate) | variant.evaluate
    if wrong := sorted(words.keys() - set(MEASURED)):
        raise ValueError(f"evaluate cannot set {', '.join(wrong)}; expected any of {', '.join(MEASURED)}")
    inference = _words(config.inference) | variant.inference | {"seed": str(seed * NOISES)}
    values = words | {"seed": FIRST_SEED + seed, "settings": " ".join(f"{key}={value}" for key, value in inference.items())}
    if config.train:
        values |= {"model": str(Path(config.home) / "parts")}
    return override(EvaluateConfig(), values)


def training(config: AblateConfig, variant: Variant, seed: int) -> Training:
    """A variant's training. Raises ValueError if its settings are none of train.py or of a transformer."""
    transformer = json.loads(Path(config.transformer).read_text(encoding="utf-8"))
    transformer |= {key: yaml.safe_load(value) for key, value in variant.transformer.items()}
    usual = {key: parameter.default for key, parameter in inspect.signature(AvatarTransformer).parameters.items()}
    if unknown := sorted(transformer.keys() - usual.keys()):
        raise ValueError(f"variant {variant.name}: a transformer has no {', '.join(unknown)}")
    home = Path(config.home)
    lists = ",".join(str(home / "world" / f"video_{shape}_path.txt") for shape in SHAPES)
    words = {"data.lists": lists, "data.cache": str(home / "cache_finish"), "model": str(home / "parts")}
    words |= _words(config.train) | variant.train | {"seed": str(seed)}
    written = [f"{key}={value}" for key, value in words.items()]
    settings = load_config(TrainConfig, config.recipe, written)
    if not settings.max_steps:
        raise ValueError("train must say max_steps: when a training is finished")
    depends = {"transformer": usual | transformer, "settings": asdict(settings), "processes": config.processes}
    if config.trunk:
        depends |= {"trunk": [hash_file(file) for file in sorted(Path(config.trunk).glob("*.safetensors"))]}
    digest = hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()[:8]
    folder = Path(config.output) / "trainings" / f"{digest}_seed{seed}"
    return Training(folder, transformer, written, settings.max_steps, seed, config.trunk)


def train(run: Training, recipe: str, processes: int) -> Path:
    """Trains, or goes on with a training, unless it is finished; the folder of its transformer. Raises ValueError if it fails."""
    checkpoint = run.folder / "checkpoints" / f"step_{run.steps:06d}"
    if not checkpoint.exists():
        scratch = run.folder / "transformer.json"
        write_json(scratch, run.transformer)
        start = [f"scratch={scratch}"] if not run.trunk else ["scratch=", f"transformer={_graft(run, scratch)}"]
        words = [*run.words, *start, f"output={run.folder}", "resume=latest"]
        _launch([str(ROOT / "train.py"), recipe, *words], processes, run.folder / "train.log")
    if not checkpoint.exists():
        raise ValueError(f"the training in {run.folder} did not reach step {run.steps}; its end is in {run.folder / 'train.log'}")
    return checkpoint / "transformer"


def _graft(run: Training, settings: Path) -> Path:
    """A folder with the transformer that a training starts from: the trunk's weights, but for those that hear, which are fresh."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(run.seed)
        fresh = from_scratch(settings, torch.float32)
    trunk = load_model(AvatarTransformer, Path(run.trunk), torch.float32).state_dict()
    fresh.load_state_dict(fresh.state_dict() | {name: tensor for name, tensor in trunk.items() if AUDIO not in name})
    fresh.save_pretrained(run.folder / "start")
    return run.folder / "start"


def _launch(program: list[str], processes: int, log: Path) -> None:
    """Runs a program in some processes; if this one is interrupted they are told to stop, and awaited: train.py then saves."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local_addr", "localhost"]
    command = [*launcher, "--nproc_per_node", str(processes), *program]
    environment = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))}
    with log.open("ab") as file, subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment) as child:
        try:
            child.wait()
        finally:
            if child.poll() is None:
                child.terminate()
                child.wait()


def variant_cases(config: AblateConfig, variant: Variant, seed: int) -> list[Case]:
    """Results of a variant's cases with a seed: those that are stored, and the rest made now."""
    evaluation, run = measurement(config, variant, seed), training(config, variant, seed) if config.train else None
    inference = inference_config(evaluation)
    settings = {key: value for key, value in asdict(evaluation).items() if key not in ("output", "cases")}
    settings |= {"inference": asdict(inference), "weights": weights(inference), "stretch": config.stretch}
    settings |= {"training": run.folder.name if run else ""}
    path = Path(config.output) / config.name / f"{variant.name}_seed{seed}.json"
    done = stored(path, settings)
    if len(done) < evaluation.cases:
        if run:
            inference = override(inference, {"transformer": str(train(run, config.recipe, config.processes))})

        def store(cases: list[Case]) -> None:
            write_json(path, {"settings": settings, "cases": cases})

        done = _make_cases(inference, draw_scenes(evaluation), config.stretch, done, store)
    return done[: evaluation.cases]


def _make_cases(inference: InferenceConfig, scenes: list[Scene], stretch: int, done: list[Case], store: Callable) -> list[Case]:
    pipeline = StableAvatarPipeline.from_config(inference)
    if stretch:
        return evaluate_stretches(pipeline, inference, scenes, stretch, done, store)
    return evaluate_cases(pipeline, inference, scenes, done, store)

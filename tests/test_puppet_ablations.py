"""Ablations: experiments name real settings, share trainings, go on where they were; their sums and their section are right."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from make_tiny_model import tiny_pipeline

from stableavatar.config import InferenceConfig, load_config, override
from stableavatar.evaluation.statistics import Interval
from stableavatar.models.dit import AvatarTransformer
from stableavatar.pipeline import StableAvatarPipeline
from stableavatar.puppet import ablations
from stableavatar.puppet.ablation_report import markdown, replace_section, summarise, write_report
from stableavatar.puppet.ablation_stretches import stretch_starts
from stableavatar.puppet.ablations import AblateConfig, ablate, inference_config, measurement, parse_seeds, parse_variants, training
from stableavatar.puppet.vae import PuppetVAE
from stableavatar.training.config import TrainConfig
from stableavatar.training.parts import encoding_identity

EXPERIMENTS = sorted(Path(__file__).parents[1].glob("configs/ablations/*.yaml"))
QUICK = "steps=1 guidance.name=none windows.frames=5 windows.overlap=1"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Folder of the tiny pipeline with the fast VAE of the puppet world, untrained."""
    folder = tmp_path_factory.mktemp("puppet") / "model"
    components = tiny_pipeline().components | {"vae": PuppetVAE().eval()}
    StableAvatarPipeline(**components).save_pretrained(folder)
    return folder


def small(tmp_path: Path, **changes: object) -> AblateConfig:
    """An experiment with a model that is there."""
    values = {"name": "trial", "title": "A trial", "seeds": "0", "variants": "a:\nb: inference.windows.weights=none"}
    folders = {"output": str(tmp_path / "runs"), "docs": str(tmp_path / "docs")}
    return override(AblateConfig(), values | folders | {"figures": "background_de,seconds", "inference": QUICK} | changes)


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_every_experiment_names_real_settings(path):
    config = load_config(AblateConfig, path)
    assert config.name == path.stem and config.title and config.table
    assert len(parse_seeds(config.seeds)) >= 3
    lines = path.read_text().splitlines()
    assert lines[0].startswith("# Purpose: ") and lines[1].startswith("# Cost: ")
    assert lines[2] == f"# python scripts/puppet.py ablate configs/ablations/{path.name}"
    settings = [str((variant, inference_config(measurement(config, variant, 0)))) for variant in parse_variants(config.variants)]
    assert len(set(settings)) == len(settings) >= 2


def test_experiments_share_trainings():
    adapter, accumulation, masks = (
        load_config(AblateConfig, path) for name in ("adapter", "accumulation", "lip_mask") for path in EXPERIMENTS if path.stem == name
    )

    def folders(config: AblateConfig) -> dict[str, Path]:
        return {variant.name: training(config, variant, 0).folder for variant in parse_variants(config.variants)}

    first, long, masked = map(folders, (adapter, accumulation, masks))
    assert len(set(first.values())) == 6 and len(set(masked.values())) == 3
    assert first["full"] == masked["recipe"] == long["adapter"] == long["adapter_guidance"] and first["none"] == long["baseline"]
    full = parse_variants(adapter.variants)[0]
    assert training(adapter, full, 1).folder not in first.values()
    assert training(replace(adapter, train=adapter.train + " max_steps=2000"), full, 0).folder not in first.values()
    recipe, seeded = (load_config(TrainConfig, adapter.recipe, words) for words in ([], training(adapter, full, 1).words))
    assert seeded.seed != recipe.seed and encoding_identity(seeded) == encoding_identity(recipe)  # every seed reads the recipe's cache


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variants": "a:"}, "at least two"),
        ({"variants": "a:\na:"}, "different names"),
        ({"variants": "a:\nb: inference.stepps=3"}, "nearest is 'steps'"),
        ({"variants": "a:\nb: steps=3"}, "steps=3; expected transformer"),
        ({"variants": "a:\nb: transformer.adapter=none"}, "nothing trains"),
        ({"variants": "a:\nb: transformer.adaptor=none", "train": "max_steps=3"}, "has no adaptor"),
        ({"variants": "a:\nb: evaluate.cases=3"}, "same for all"),
        ({"train": "max_steps=0"}, "max_steps"),
        ({"evaluate": "seed=3"}, "cannot set seed"),
        ({"seeds": "0,0"}, "different numbers"),
        ({"reference": "c"}, "one of a, b"),
        ({"stretch": 100}, "half of the 125 frames"),
        ({"name": ""}, "name must be a word"),
    ],
)
def test_mistakes_are_found_before_anything_runs(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        small(tmp_path, **changes)


def test_an_experiment_runs_and_goes_on(model, tmp_path, monkeypatch):
    figures = "background_de_early,background_de_late"
    config = small(tmp_path, evaluate=f"cases=1 frames=20 model={model}", stretch=10, figures=figures)
    ablate(config)
    results = sorted((tmp_path / "runs/trial").glob("?_seed0.json"))
    first = [path.read_text() for path in results]
    case = json.loads(first[0])["cases"][0]
    assert len(case["curve"]) == 2 and case["starts"] == [0, 10]
    assert case["model"]["background_de_late"] == case["curve"][1]["background_de"]
    assert "| background ΔE early ↓ |" in (tmp_path / "docs/ablations.md").read_text()
    picture = tmp_path / "docs/ablations_trial.svg"
    assert "svg" in picture.read_text() and picture.stat().st_size < 100_000
    with monkeypatch.context() as patch:
        patch.setattr(ablations, "_make_cases", lambda *_: pytest.fail("what is finished is made again"))
        ablate(config)
    results[1].unlink()
    ablate(config)
    again = json.loads(results[1].read_text())["cases"][0]
    assert results[0].read_text() == first[0] and again["model"] == json.loads(first[1])["cases"][0]["model"]
    with pytest.raises(ValueError, match="other settings"):
        ablate(override(config, {"inference": QUICK.replace("steps=1", "steps=2")}))


def test_a_training_that_fails_is_told(tmp_path):
    config = small(tmp_path, train="max_steps=2", processes=1, variants="a:\nb: transformer.adapter=none", home=str(tmp_path / "home"))
    with pytest.raises(ValueError, match=r"did not reach step 2.*train\.log"):
        ablate(config)
    (log,) = (tmp_path / "runs/trainings").glob("*_seed0/train.log")
    assert "error:" in log.read_text()


def test_a_finished_training_is_not_run_again(tmp_path, monkeypatch):
    config = small(tmp_path, train="max_steps=2", variants="a:\nb: transformer.adapter=none")
    run = training(config, parse_variants(config.variants)[1], 0)
    assert run.transformer["adapter"] == "none" and load_config(TrainConfig, config.recipe, run.words).seed == 0
    (run.folder / "checkpoints/step_000002").mkdir(parents=True)
    monkeypatch.setattr(ablations, "_launch", lambda *_: pytest.fail("it trains again"))
    assert ablations.train(run, config.recipe, 1) == run.folder / "checkpoints/step_000002/transformer"


def test_trainings_from_a_trunk_hear_afresh(tmp_path, monkeypatch):
    config = small(tmp_path, train="max_steps=2", variants="a:\nb: transformer.adapter=none", trunk=str(tmp_path / "trunk"))
    run = training(config, parse_variants(config.variants)[1], 0)
    trunk = AvatarTransformer(**json.loads(Path(config.transformer).read_text()))
    trunk.save_pretrained(config.trunk)
    after = training(config, parse_variants(config.variants)[1], 0)
    assert after.folder != run.folder, "other weights make another training"
    told = []
    monkeypatch.setattr(ablations, "_launch", lambda words, *_: told.extend(words))
    after.folder.mkdir(parents=True)
    with pytest.raises(ValueError, match="did not reach step 2"):
        ablations.train(after, config.recipe, 1)
    assert f"transformer={after.folder}/start" in told and "scratch=" in told
    start, weights = AvatarTransformer.from_pretrained(after.folder / "start").state_dict(), trunk.state_dict()
    shared = [name for name in start if "audio" not in name]
    assert shared and all(torch.equal(start[name], weights[name]) for name in shared)
    assert not start["blocks.0.cross_attn.k_audio.weight"].any(), "a fresh one hears nothing yet"
    assert not torch.equal(start["audio_adapter.projection.0.weight"], weights["audio_adapter.projection.0.weight"])


def cases(*rows: list[float | None]) -> list[list[dict]]:
    """Results of one variant: rows are seeds."""
    return [[{"model": {"figure": value}, "seconds": 1.0} for value in row] for row in rows]


def test_differences_are_paired():
    results = {"a": cases([1, 5, 9], [2, 8, 4]), "b": cases([1.5, 5.5, 9.5], [2.5, 8.5, None])}
    rows = summarise(results, "a", ["figure"])
    assert rows["b"]["difference"]["figure"] == Interval(0.5, 0.5, 0.5, 5)
    assert rows["a"]["mean"]["figure"].high > rows["a"]["mean"]["figure"].low + 1
    text = markdown(rows, "a", ["figure"])
    assert "**+0.500** (+0.500 .. +0.500)" in text and "| a |" not in text.partition("minus a")[2]
    with pytest.raises(ValueError, match="'sharpness', which no video"):
        summarise(results, "a", ["sharpness"])


def test_a_section_is_replaced(tmp_path):
    path = tmp_path / "ablations.md"
    replace_section(path, "one", "First", "old")
    replace_section(path, "two", "Second", "other")
    path.write_text(path.read_text().replace("<!-- /one -->", "<!-- /one -->\n\nWhat a person wrote."))
    replace_section(path, "one", "First", "new")
    text = path.read_text()
    assert "old" not in text and text.count("<!-- one -->") == text.count("## First") == 1
    assert text.index("new") < text.index("What a person wrote.") < text.index("## Second") < text.index("other")
    path.write_text("<!-- one -->")
    with pytest.raises(ValueError, match="without"):
        replace_section(path, "one", "First", "new")


def test_the_report_is_the_same_each_time(tmp_path):
    results = {"a": cases([1, 2]), "b": cases([2, 4])}
    for _ in range(2):
        write_report(results, "a", ["figure", "seconds"], ("trial", "A trial"), "How.", tmp_path / "home", tmp_path)
        written = (tmp_path / "ablations.md").read_text(), (tmp_path / "ablations_trial.svg").read_text()
        (tmp_path / "ablations_trial.svg").unlink()
    write_report(results, "a", ["figure", "seconds"], ("trial", "A trial"), "How.", tmp_path / "home", tmp_path)
    assert written == ((tmp_path / "ablations.md").read_text(), (tmp_path / "ablations_trial.svg").read_text())
    assert json.loads((tmp_path / "home/summary.json").read_text())["b"]["difference"]["figure"]["mean"] == 1.5


def test_stretches_cover_a_video():
    assert stretch_starts(1000, 100) == list(range(0, 1000, 100))
    assert stretch_starts(149, 24) == [0, 25, 50, 75, 100, 125] and stretch_starts(15, 10) == [0]


def test_noise_and_cases_differ_between_seeds(tmp_path):
    config = small(tmp_path, seeds="0,1")
    settings = [measurement(config, parse_variants(config.variants)[0], seed) for seed in (0, 1)]
    noises = [inference_config(found).seed for found in settings]
    assert settings[1].seed == settings[0].seed + 1 and noises[1] - noises[0] == ablations.NOISES
    assert isinstance(inference_config(settings[0]), InferenceConfig)

"""Settings: YAML and key=value words, defaults, and one clear line for every mistake."""

from pathlib import Path

import pytest

from stableavatar.config import WAN_NEGATIVE_PROMPT, InferenceConfig, help_text, load_config, override, settings

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "configs/inference").glob("*.yaml"))


def load(*words: str, path: Path | None = None) -> InferenceConfig:
    return load_config(InferenceConfig, path, words)


def test_defaults_are_the_released_ones():
    config = load()
    assert (config.steps, config.shift, config.fps, config.windows.frames, config.windows.overlap) == (50, 5.0, 25, 81, 5)
    assert (config.guidance.name, config.guidance.text_scale, config.guidance.audio_scale) == ("cfg", 3.0, 5.0)
    assert config.negative_prompt == WAN_NEGATIVE_PROMPT


def test_words_win_over_yaml_and_yaml_over_defaults(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("steps: 7\nshift: 3e0\nguidance: {name: none, alpha: 2}\nprompt: ${steps} steps\n")
    config = load("steps=9", "windows.overlap=2", "guidance.batched=true", path=path)
    assert (config.steps, config.shift, config.windows.overlap, config.guidance.batched) == (9, 3.0, 2, True)
    assert (config.guidance.name, config.guidance.alpha, config.prompt) == ("none", 2.0, "7 steps")


@pytest.mark.parametrize(
    "prompt",
    ["A man: he talks, [loud] = yes", "${steps}", "\\${steps}", "a\\\\${b", "${", "\\", "5", "null", "- a", "#", "“哈”", ""],
)
def test_text_from_the_command_line_is_literal(prompt):
    assert load(f"prompt={prompt}").prompt == prompt


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["step=3"], "unknown setting 'step'; the nearest is 'steps'"),
        (["overlap=3"], "nearest is 'windows.overlap'"),
        (["windows.overlp=3"], "nearest is 'windows.overlap'"),
        (["guidance=cfg"], "nearest is 'guidance.name'"),
        (["steps=many"], "steps must be a whole number, got 'many'"),
        (["steps=2.5"], "steps must be a whole number, got '2.5'"),
        (["shift=x"], "shift must be a number, got 'x'"),
        (["compile=perhaps"], "compile must be true or false, got 'perhaps'"),
        (["steps=0"], "steps must be at least 1 and at most 1000, got 0"),
        (["width=0"], "width must be at least 1, got 0"),
        (["height=-16"], "height must be at least 1, got -16"),
        (["shift=nan"], "shift must be a finite number"),
        (["guidance.alpha=inf"], "guidance.alpha must be a finite number"),
        (["seed=-1"], "seed must be at least 0"),
        (["guidance.name=best"], "guidance.name must be one of none, cfg, audio_native, got 'best'"),
        (["guidance.start=0.6", "guidance.end=0.5"], "guidance.start must not exceed guidance.end"),
        (["windows.overlap=21"], "windows.overlap must be smaller than the window of 21 latent frames, got 21"),
        (["windows.frames=80"], "windows.frames must be 4n + 1"),
        (["windows.overlap=-1"], "windows.overlap must be at least 0"),
        (["prompt=???"], "prompt cannot be '???', which stands for a missing value; give text"),
        (["steps=???"], "steps cannot be '???'"),
        (["steps"], "settings are written key=value, got 'steps'"),
        (["=3"], "settings are written key=value"),
    ],
)
def test_mistakes_on_the_command_line(words, message):
    with pytest.raises(ValueError, match=r"^[^\n]+$") as caught:
        load(*words)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "is not YAML"),
        ("- a", "must hold a mapping"),
        ("steps: [1]", "steps must be a whole number, got [1]"),
        ("steps: null", "steps must be a whole number, got None"),
        ("steps: {a: 1}", "unknown setting 'steps.a'; the nearest is 'steps'"),
        ("steps: 1\nsteps: 2", "duplicate key"),
        ("guidance: none", "unknown setting 'guidance'"),
        ("prompt: ${nothing}", "nothing"),
    ],
)
def test_mistakes_in_yaml(tmp_path, text, message):
    path = tmp_path / "a.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"^[^\n]+$") as caught:
        load(path=path)
    assert message in str(caught.value)


def test_files_that_are_not_yaml(tmp_path):
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    for path, message in [(tmp_path / "none.yaml", "No such file"), (tmp_path, "cannot read"), (tmp_path / "binary.yaml", "is not YAML")]:
        with pytest.raises(ValueError, match=message):
            load(path=path)


def test_override_copies_and_checks():
    config = load("steps=3")
    changed = override(config, {"steps": 5, "windows.overlap": 1})
    assert (config.steps, config.windows.overlap, changed.steps, changed.windows.overlap) == (3, 5, 5, 1)
    with pytest.raises(ValueError, match="windows.overlap"):
        override(config, {"windows.overlap": 40})


@pytest.mark.parametrize("prompt", ["${steps}", "${nothing}", "\\${steps}"])
def test_override_keeps_literal_text(prompt):
    assert override(load(f"prompt={prompt}"), {"seed": 1}).prompt == prompt


def test_help_names_every_key_its_meaning_and_choices():
    text = help_text(InferenceConfig())
    for key, (_, _, limits) in settings(InferenceConfig()).items():
        assert f"  {key}  (default: " in text and limits.help in text
        assert all(choice in text for choice in limits.choices)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_load_and_open_with_purpose_cost_and_command(path):
    load(path=path)
    purpose, cost, command, *rest = path.read_text().splitlines()
    assert purpose.startswith("# Purpose: ") and cost.startswith("# Cost: ") and len(rest) < 15
    assert command.startswith(f"# python inference.py {path.relative_to(ROOT).as_posix()} ")


def test_there_is_a_recipe_for_every_published_variant():
    assert {path.stem for path in RECIPES} >= {"wan_1.3b_square", "wan_1.3b_rec_vec", "wan_14b", "wan_720p", "low_memory", "puppet"}

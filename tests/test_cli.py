"""inference.py: a video with its record, lists of cases, and one clear line for every mistake."""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
import soundfile
from PIL import Image

import inference
from stableavatar.cases import check_apart, memory_advice
from stableavatar.config import InferenceConfig, override, settings
from stableavatar.pipeline import StableAvatarPipeline
from stableavatar.sampling.offload import resolve_device

ROOT = Path(__file__).parents[1]
QUICK = ["width=64", "height=64", "steps=2", "windows.frames=9", "windows.overlap=1", "guidance.name=none"]


@pytest.fixture
def model(tiny_folder) -> str:
    return str(tiny_folder)


@pytest.fixture
def desk(tmp_path, monkeypatch) -> Path:
    """A working folder with a portrait, 0.4 s of sound, and a model that cannot be loaded."""
    monkeypatch.chdir(tmp_path)
    noise = np.random.default_rng(0)
    Image.fromarray(noise.integers(0, 255, (40, 30, 3), np.uint8)).resize((120, 160)).save("face.png")
    soundfile.write("voice.wav", noise.normal(0, 0.1, 6400), 16000)
    Path("anything").mkdir()
    Path("anything/model_index.json").write_text('{"_class_name": "StableAvatarPipeline"}')
    return tmp_path


def words(model: str, *more: str) -> list[str]:
    inputs = ["reference=face.png", "audio=voice.wav", "output=out.mp4"]
    return [str(ROOT / "configs/inference/puppet.yaml"), f"model={model}", *inputs, *QUICK, *more]


def errors(caplog) -> list[str]:
    return [entry.getMessage() for entry in caplog.records if entry.levelno >= logging.ERROR]


def test_help_prints_every_setting(capsys):
    with pytest.raises(SystemExit) as caught:
        inference.main(["--help"])
    text = capsys.readouterr().out
    assert caught.value.code == 0
    assert all(f"  {key}  (default: " in text and limits.help in text for key, (_, _, limits) in settings(InferenceConfig()).items())


def test_a_portrait_and_a_voice_become_a_video_with_a_record(desk, model):
    assert inference.main(words(model, "frames_dir=frames", "prompt=A person: talking", "seed=3")) == 0
    assert {path.name for path in desk.iterdir()} == {"face.png", "voice.wav", "anything", "out.mp4", "out.json", "frames"}
    assert len(list((desk / "frames").iterdir())) == 10
    reader = imageio_ffmpeg.read_frames("out.mp4")
    facts = next(reader)
    assert facts["size"] == (64, 64) and facts["fps"] == 25 and facts["audio_codec"] == "aac" and len(list(reader)) == 10
    record = json.loads((desk / "out.json").read_text())
    assert record["frames"] == 10 and record["seconds"] == 0.4
    assert record["settings"]["seed"] == 3 and record["settings"]["guidance"]["name"] == "none"
    assert {"torch", "diffusers", "transformers", "stableavatar"} <= record["versions"].keys()
    assert record["device"] == str(resolve_device("auto"))
    assert record["timings"]["total_seconds"] > 0 and record["peak_memory"]["host_bytes"] > 0


def test_the_same_seed_gives_the_same_file(desk, model):
    def make(name: str, seed: int) -> bytes:
        assert inference.main(words(model, f"output={name}", f"seed={seed}")) == 0
        return b"".join(np.asarray(frame).tobytes() for frame in list(imageio_ffmpeg.read_frames(name))[1:])

    first = make("a.mp4", 1)
    assert make("b.mp4", 1) == first != make("c.mp4", 2)


def bad_png(desk: Path) -> None:
    (desk / "bad.png").write_bytes((desk / "face.png").read_bytes()[:500])


def bad_wav(desk: Path) -> None:
    soundfile.write(desk / "nan.wav", np.full(1600, np.nan, np.float32), 16000, subtype="FLOAT")
    (desk / "cut.wav").write_bytes((desk / "voice.wav").read_bytes()[:3000])
    (desk / "empty.wav").touch()


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("reference=none.png", "none.png"),
        ("reference=voice.wav", "not an image"),
        ("reference=bad.png", "bad.png"),
        ("reference=", "reference is missing; give reference=FILE"),
        ("audio=none.wav", "none.wav"),
        ("audio=face.png", "audio"),
        ("audio=nan.wav", "NaN"),
        ("audio=cut.wav", "truncated"),
        ("audio=empty.wav", "empty"),
        ("output=out.avi", ".mp4"),
        ("output=.", "must be the name of an .mp4 file"),
        ("output=face.png/out.mp4", "cannot write to face.png"),
        ("output=/proc/nowhere/out.mp4", "cannot write to /proc/nowhere"),
        ("output=sound.mp4 audio=sound.mp4", "would overwrite the audio sound.mp4"),
        ("output=anything/../link.mp4 audio=sound.mp4", "would overwrite the audio sound.mp4"),
        ("output=taken.mp4", "taken.json, which is a folder"),
        ("output=list.mp4 cases= frames_dir=old", "old already holds frames"),
        ("vocal_separator=Kim_Vocal_2.onnx", "vocal separation needs"),
        ("width=0", "width must be at least 1, got 0"),
        ("windows.overlap=3", "windows.overlap must be smaller than the window"),
        ("steps=several", "steps must be a whole number"),
        ("stepz=3", "the nearest is 'steps'"),
        ("device=cuda:99", "device must be auto or one of cpu"),
        ("device=toaster", "device must be auto or one of cpu"),
        ("cases=none.yaml", "none.yaml"),
        ("model=nowhere", "nowhere is no pipeline folder"),
        ("model=", "no model is named"),
    ],
)
def test_a_mistake_is_one_line_before_any_weights_load(desk, caplog, monkeypatch, word, message):
    bad_png(desk)
    bad_wav(desk)
    for name in ("old", "taken.json"):
        (desk / name).mkdir()
    (desk / "old/frame_7.png").touch()
    (desk / "sound.mp4").write_bytes((desk / "voice.wav").read_bytes())
    (desk / "link.mp4").symlink_to("sound.mp4")
    before = sorted(desk.rglob("*"))
    monkeypatch.setattr(StableAvatarPipeline, "from_config", lambda *_: pytest.fail("weights were loaded"))
    assert inference.main(words("anything", *word.split())) == 2
    (line,) = errors(caplog)
    assert message in line and "\n" not in line
    assert sorted(desk.rglob("*")) == before


@pytest.mark.parametrize(("word", "message"), [("attention=best", "best")])
def test_a_mistake_about_the_model_is_one_line(desk, model, caplog, word, message):
    assert inference.main(words(model, word)) == 2
    (line,) = errors(caplog)
    assert message in line and not list(desk.glob("*out*"))


def test_an_unreadable_yaml_and_an_unknown_flag(desk, caplog, capsys):
    assert inference.main(["none.yaml"]) == 2 and "none.yaml" in errors(caplog)[0]
    with pytest.raises(SystemExit) as caught:
        inference.main(["--steps", "3"])
    assert caught.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1


def test_a_list_of_cases_goes_on_after_a_bad_one(desk, model, caplog, monkeypatch):
    (desk / "list.csv").write_text(
        "reference,audio,prompt,output,seed,windows.tail\n"
        "face.png,voice.wav,\"One, talking\",one.mp4,5,\n"
        "none.png,voice.wav,Two,two.mp4,,\n"
        "face.png,voice.wav,Three,sub/three.mp4,6,cut\n"
        "face.png,voice.wav,Four,one.mp4,,\n"
    )
    loads, load = [], StableAvatarPipeline.from_config
    monkeypatch.setattr(StableAvatarPipeline, "from_config", lambda *given: loads.append(1) or load(*given))
    assert inference.main(words(model, "cases=list.csv", "frames_dir=frames")) == 1
    two, four = errors(caplog)
    assert two.startswith("case 2: ") and "none.png" in two and four.startswith("case 4: ") and "one.mp4" in four
    assert (desk / "one.mp4").exists() and (desk / "sub/three.mp4").exists() and not (desk / "two.mp4").exists() and len(loads) == 1
    one, three = (json.loads((desk / name).read_text())["settings"] for name in ("one.json", "sub/three.json"))
    assert (one["seed"], one["prompt"], three["seed"], three["windows"]["tail"]) == (5, "One, talking", 6, "cut")
    assert sorted(path.name for path in (desk / "frames").iterdir()) == ["case_001", "case_003"]


def test_a_yaml_list_whose_cases_are_all_good(desk, model):
    (desk / "list.yaml").write_text("- {output: a.mp4}\n- {output: b.mp4, guidance: {name: cfg}}\n")
    assert inference.main(words(model, "cases=list.yaml")) == 0
    assert (desk / "a.mp4").exists() and (desk / "b.mp4").exists()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{output: a.mp4, seeed: 3}", "case 1: unknown setting 'seeed'; the nearest is 'seed'"),
        ("{output: a.mp4, dtype: float16}", "case 1: dtype must be the same for all cases"),
        ("{output: a.mp4, cases: other.yaml}", "case 1: cases must be the same for all cases"),
        ("{output: a.mp4, memory: {fp8: true}}", "case 1: memory.fp8 must be the same for all cases"),
    ],
)
def test_a_bad_row_is_reported(desk, caplog, monkeypatch, row, message):
    (desk / "list.yaml").write_text(f"- {row}\n")
    monkeypatch.setattr(StableAvatarPipeline, "from_config", lambda *_: pytest.fail("weights were loaded"))
    assert inference.main(words("anything", "cases=list.yaml")) == 1
    (line,) = errors(caplog)
    assert line.startswith(message)


@pytest.mark.parametrize("key", ["frames_dir", "work_dir"])
def test_two_cases_cannot_share_a_folder(desk, key):
    first, second = (override(InferenceConfig(), {"output": f"{name}.mp4", key: folder}) for name, folder in [("a", "x"), ("b", "y/../x")])
    check_apart(first, [InferenceConfig(output="c.mp4")])
    with pytest.raises(ValueError, match=f"{key} y/../x is already taken by another case"):
        check_apart(second, [first])


def test_a_list_cannot_be_overwritten_by_a_record(desk, caplog):
    (desk / "list.json").write_text('[{"output": "list.mp4"}]')
    assert inference.main(words("anything", "cases=list.json")) == 1
    assert "would overwrite the cases list.json" in errors(caplog)[0]


@pytest.mark.parametrize("error", [RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes"), MemoryError()])
def test_a_full_host_is_advice(error):
    with pytest.raises(ValueError, match="out of host memory"), memory_advice():
        raise error
    with pytest.raises(RuntimeError, match="ours"), memory_advice():
        raise RuntimeError("ours")


def test_every_remark_about_an_input_is_made_once(desk, model, caplog):
    soundfile.write("voice.wav", np.zeros(1600), 8000)
    Image.open("face.png").convert("L").save("face.png")
    assert inference.main(words(model)) == 0
    remarks = [entry.getMessage() for entry in caplog.records if entry.levelno > logging.DEBUG and entry.name == "stableavatar.media"]
    assert sum("silent" in line for line in remarks) == sum("converted from L" in line for line in remarks) == 1
    assert len(remarks) == len(set(remarks))


def test_the_script_with_the_released_flags_keeps_the_callers_paths(desk):
    repository = desk / "a repository"
    for folder in ("scripts", ".venv/bin", "examples/ada"):
        (repository / folder).mkdir(parents=True)
    (repository / "scripts/setup.sh").touch()
    (repository / "examples/ada/prompt.txt").write_text("A person")
    (repository / ".venv/bin/python").write_text('#!/bin/sh\npwd\nprintf "%s\\n" "$@"\n')
    (repository / ".venv/bin/python").chmod(0o755)
    (repository / "scripts/inference.sh").write_bytes((ROOT / "scripts/inference.sh").read_bytes())
    run = subprocess.run(["bash", "a repository/scripts/inference.sh", "audio=voice.wav"], capture_output=True, text=True, check=True)
    folder, program, recipe, *settings_given = run.stdout.splitlines()
    assert (folder, program) == (str(desk), str(repository / "inference.py")) and recipe.startswith(str(repository))
    assert settings_given[-1] == "audio=voice.wav" and f"reference={repository}/examples/ada/reference.png" in settings_given
    assert "output=outputs/video.mp4" in settings_given and "prompt=A person" in settings_given


@pytest.mark.parametrize("file", ["a.yaml:a: 1", "a.yaml:[1, 2]", "a.yaml:", "a.csv:", "a.csv:seed\n1,2,3\n"])
def test_a_bad_list_is_one_line(desk, caplog, file):
    name, _, text = file.partition(":")
    (desk / name).write_text(text)
    assert inference.main(words("anything", f"cases={name}")) == 2
    assert len(errors(caplog)) == 1


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_leaves_nothing(desk, model, stop):
    command = [sys.executable, str(ROOT / "inference.py"), *words(model, "steps=1000", "output=new/out.mp4")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as process:
        give_up = time.monotonic() + 120
        while not (desk / "new").exists() and process.poll() is None and time.monotonic() < give_up:
            time.sleep(0.05)
        time.sleep(0.3)
        process.send_signal(stop)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert {path.name for path in desk.iterdir()} == {"face.png", "voice.wav", "anything"}


def test_a_killed_run_started_again_gives_the_same_bytes(desk, model):
    soundfile.write("voice.wav", np.random.default_rng(1).normal(0, 0.1, 48_000), 16_000)
    assert inference.main(words(model, "steps=6", "output=whole.mp4")) == 0
    command = [sys.executable, str(ROOT / "inference.py"), *words(model, "steps=6", "work_dir=work", "save_every=0", "frames_dir=frames")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(list(Path("work/finished").glob("*.pt"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not Path("out.mp4").exists()
    assert subprocess.run(command, capture_output=True).returncode == 0
    assert Path("out.mp4").read_bytes() == Path("whole.mp4").read_bytes()
    assert len(list(Path("frames").iterdir())) == 75
    assert {path.name for path in desk.iterdir() if path.name.startswith(".")} == set()


def test_a_mistake_prints_one_line_and_nothing_else(desk):
    command = [sys.executable, str(ROOT / "inference.py"), *words("anything", "reference=none.png")]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 2 and run.stdout == ""
    assert run.stderr.startswith("error: ") and len(run.stderr.splitlines()) == 1

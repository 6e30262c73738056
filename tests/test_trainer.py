"""train.py from clip folders to checkpoints: exact resume, cached = online, several processes = one, LoRA, what stops a run."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from clip_files import make_clip
from safetensors.torch import load_file

import train
from stableavatar.models.dit import AvatarTransformer
from stableavatar.models.weights import load_transformer

ROOT = Path(__file__).parents[1]
TINY = ["device=cpu", "dtype=float32", "what=all", "data.sizes=32x32", "data.frames=9", "data.workers=0", "optimizer.lr=1e-3",
        "optimizer.warmup=2", "optimizer.clip=1", "checkpoint.dtype=float32", "checkpoint.every=100", "log.tensorboard=false"]


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    """The path list of four clips of 12 frames."""
    folder = tmp_path_factory.mktemp("clips")
    names = [make_clip(folder / "square" / "speech" / f"{number:05d}", frames=12 + number) for number in range(4)]
    (folder / "list.txt").write_text("\n".join(map(str, names)))
    return folder / "list.txt"


@pytest.fixture
def words(tiny_folder, clips) -> list[str]:
    """Settings of a tiny run."""
    return [f"model={tiny_folder}", f"data.lists={clips}", *TINY]


def run(words: list[str], output: Path, *more: str) -> list[dict]:
    """A run in this process; its figures, step by step."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    assert train.main([*words, f"output={output}", *more]) == 0
    return metrics(output)


def start(words: list[str], output: Path, *more: str, launcher: tuple[str, ...] = ()) -> subprocess.Popen:
    """A run in a process of its own, or in several with accelerate's launcher."""
    program = [sys.executable, *(("-m", "accelerate.commands.launch", *launcher) if launcher else ())]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "MASTER_ADDR": "127.0.0.1"}
    return subprocess.Popen([*program, str(ROOT / "train.py"), *words, f"output={output}", *more], cwd=ROOT, env=environment,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen, code: int = 0) -> str:
    text, _ = process.communicate(timeout=300)
    assert process.returncode == code, text[-3000:]
    return text


def metrics(output: Path) -> list[dict]:
    path = output / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def losses(figures: list[dict]) -> list[float]:
    return [line["loss"] for line in figures if "loss" in line]


def weights(output: Path) -> dict[str, torch.Tensor]:
    last = sorted((output / "checkpoints").glob("step_*"))[-1]
    return load_file(last / "state" / "trained.safetensors")


def wait_for_step(process: subprocess.Popen, output: Path, step: int) -> None:
    """Waits until a run has gone past a step."""
    while process.poll() is None and not any(line["step"] >= step for line in metrics_so_far(output)):
        time.sleep(0.02)
    assert process.poll() is None, process.communicate()[0][-3000:]


def metrics_so_far(output: Path) -> list[dict]:
    path = output / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def test_a_run_writes_what_it_promises(words, tmp_path):
    run(words, tmp_path, "max_steps=4", "checkpoint.every=2", "checkpoint.keep=1", "optimizer.ema=0.5")
    last = tmp_path / "checkpoints/step_000004"
    assert (tmp_path / "config.yaml").is_file() and (tmp_path / "clips.jsonl").is_file()
    saved = AvatarTransformer.from_pretrained(last / "transformer")
    released = load_transformer(last / "transformer3d.safetensors", torch.float32, config={"num_heads": saved.config.num_heads})
    ours = dict(saved.named_parameters())
    assert all(torch.equal(parameter, ours[name]) for name, parameter in released.named_parameters())
    assert any(not torch.equal(ours[name].data, tensor) for name, tensor in weights(tmp_path).items()), "for use: the average"


def test_a_killed_run_goes_on_exactly(words, tmp_path):
    """Uninterrupted = killed twice by SIGKILL in the middle of things; every loss is the same to the last bit."""
    whole = run(words, tmp_path / "whole", "max_steps=9", "optimizer.ema=0.9")
    settings = ["checkpoint.every=2", "max_steps=9", "optimizer.ema=0.9", "resume=latest"]
    for step in (3, 6):
        process = start(words, tmp_path / "cut", *settings)
        wait_for_step(process, tmp_path / "cut", step)
        process.kill()
        process.communicate()
    resumed = run(words, tmp_path / "cut", *settings)
    assert losses(resumed) == losses(whole) and len(losses(whole)) == 9
    after, expected = weights(tmp_path / "cut"), weights(tmp_path / "whole")
    assert all(torch.equal(after[name], expected[name]) for name in expected)
    assert not list((tmp_path / "cut").rglob("*.partial"))

"""Tiny runs of train.py for tests: in this process, in one of its own, or in several as `accelerate launch` starts them."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import readings  # noqa: F401
import torch
from accelerate.state import AcceleratorState, GradientState
from clip_files import make_clip
from safetensors.torch import load_file

import train
from stableavatar.training.report import read_metrics

ROOT = Path(__file__).parents[1]
TINY = ["device=cpu", "dtype=float32", "what=all", "data.sizes=32x32", "data.frames=9", "data.workers=0", "optimizer.lr=1e-3",
        "optimizer.warmup=2", "optimizer.clip=1", "checkpoint.dtype=float32", "checkpoint.every=100", "log.tensorboard=false"]


def clip_list(folder: Path) -> Path:
    """The path list of five new clips of 12 frames and more."""
    names = [make_clip(folder / "square" / "speech" / f"{number:05d}", frames=12 + number) for number in range(5)]
    (folder / "list.txt").write_text("\n".join(map(str, names)))
    return folder / "list.txt"


def tiny_words(model: Path, clips: Path) -> list[str]:
    """Settings of a tiny run."""
    return [f"model={model}", f"data.lists={clips}", *TINY]


def video_words(folder: Path, portrait: Path, voice: Path) -> list[str]:
    """Settings of a validation video as long as the voice."""
    (folder / "cases.yaml").write_text(f"- {{reference: {portrait}, audio: {voice}, prompt: hello}}\n")
    (folder / "video.yaml").write_text("{width: 32, height: 32, steps: 2, windows: {frames: 9, overlap: 1}}")
    return [f"validation.cases={folder / 'cases.yaml'}", f"validation.config={folder / 'video.yaml'}"]


def attempt(words: list[str], output: Path, *more: str) -> int:
    """A run in this process; its exit code."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    return train.main([*words, f"output={output}", *more])


def run(words: list[str], output: Path, *more: str) -> list[dict]:
    """A run in this process that succeeds; its figures, step by step."""
    assert attempt(words, output, *more) == 0
    return metrics(output)


def start(*words: str) -> subprocess.Popen:
    """A run in a process of its own."""
    return _open(sys.executable, str(ROOT / "train.py"), *words)


def launch(strategy: str, processes: int, runs: list[list[str]]) -> subprocess.Popen:
    """Runs, one after another, in processes that are started once, as a configuration of accelerate_config/ says."""
    orders = [(free_port(), words) for words in runs]
    launcher = ["-m", "accelerate.commands.launch", "--config_file", str(ROOT / f"accelerate_config/{strategy}.yaml"),
                "--num_processes", str(processes), "--main_process_port", str(free_port())]
    return _open(sys.executable, *launcher, str(ROOT / "tests/train_in_turn.py"), json.dumps(orders), OMP_NUM_THREADS="1")


def _open(*command: str, **environment: str) -> subprocess.Popen:
    environment = os.environ | {"DS_ACCELERATOR": "cpu"} | environment
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def finish(process: subprocess.Popen, code: int = 0) -> str:
    """What a process says until its end."""
    text, _ = process.communicate(timeout=300)
    assert process.returncode == code, text[-3000:]
    return text


def metrics(output: Path) -> list[dict]:
    return read_metrics(output / "metrics.jsonl")


def losses(figures: list[dict]) -> list[float]:
    return [line["loss"] for line in figures if "loss" in line]


def weights(output: Path) -> dict[str, torch.Tensor]:
    """Those that train, of the last checkpoint."""
    return load_file(last_checkpoint(output) / "state" / "trained.safetensors")


def last_checkpoint(output: Path) -> Path:
    return sorted((output / "checkpoints").glob("step_*"))[-1]


def wait_for_step(process: subprocess.Popen, output: Path, step: int) -> None:
    """Waits until a run has gone past a step."""
    while process.poll() is None and not any(line["step"] >= step for line in metrics(output)):
        time.sleep(0.02)
    assert process.poll() is None, process.communicate()[0][-3000:]

"""Tiny real models and inputs that tests share."""

import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from align_files import write_align
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

from crew import Crew  # noqa: E402
from make_tiny_model import tiny_pipeline, tiny_transformer  # noqa: E402

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore Ctrl-C, and so would what tests start
torch.set_flush_denormal(True)  # as the command line does: zero frames make denormals, which are slow

from stableavatar.config import InferenceConfig, override  # noqa: E402
from stableavatar.models.dit import AudioFeatures, Conditions  # noqa: E402


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete tiny pipeline on disk."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    tiny_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def pipe():
    """The same pipeline in memory, silent."""
    pipeline = tiny_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def dit():
    """A tiny transformer whose audio branches are random."""
    torch.manual_seed(0)
    return tiny_transformer().eval()


@pytest.fixture
def make_conditions():
    """Builds random conditions for a tiny transformer: make(batch, frames, height, width)."""

    def make(batch: int = 1, frames: int = 3, height: int = 4, width: int = 6, seed: int = 0) -> Conditions:
        generator = torch.Generator().manual_seed(seed)

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator)

        tokens = 2 * (4 * (frames - 1) + 1) - 1
        features = AudioFeatures(random(batch, tokens, 32))
        return Conditions(random(batch, 8, 32), random(batch, 257, 32), random(batch, 20, frames, height, width), features)

    return make


@pytest.fixture(scope="session")
def portrait(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture with structure in both directions."""
    rows, columns = np.mgrid[0:96, 0:80]
    pixels = np.stack([rows * 2, columns * 3, (rows * columns) % 255], axis=2).astype(np.uint8)
    path = tmp_path_factory.mktemp("inputs") / "portrait.png"
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture(scope="session")
def make_voice(tmp_path_factory: pytest.TempPathFactory):
    """Builds a modulated tone of some samples at 16 kHz: make(samples)."""
    folder = tmp_path_factory.mktemp("voices")

    def make(samples: int) -> Path:
        path = folder / f"{samples}.wav"
        time = np.arange(samples) / 16_000
        soundfile.write(path, (0.4 * np.sin(2000 * time) * np.sin(9 * time)).astype(np.float32), 16_000)
        return path

    return make


@pytest.fixture
def settings():
    """Settings for a video of 32 x 32 pixels in two steps: settings(key=value, ...) with dots written as __."""

    def make(**values: object) -> InferenceConfig:
        base = {"width": 32, "height": 32, "steps": 2, "windows.frames": 21, "windows.overlap": 2}
        return override(InferenceConfig(), base | {key.replace("__", "."): value for key, value in values.items()})

    return make


@pytest.fixture(scope="session")
def crew():
    """Processes for tests of several: crew.run(processes, function, *args)."""
    together = Crew()
    yield together
    together.dismiss()


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Where transformers keeps the programs that models bring along; a process can have one such place only."""
    return str(tmp_path_factory.mktemp("programs"))


@pytest.fixture
def tiny_align(tmp_path: Path, programs: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is called as q-future/one-align is: bright is good, dark is beautiful."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", programs)
    monkeypatch.setenv("HF_MODULES_CACHE", programs)
    return write_align(tmp_path / f"{tmp_path.name}_align")

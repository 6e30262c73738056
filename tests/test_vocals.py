import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from media_files import tone

from stableavatar.data.vocals import separate_vocals
from stableavatar.media import AudioTrack


@pytest.fixture
def wav(tmp_path: Path) -> Path:
    soundfile.write(tmp_path / "tone.wav", tone(), 44_100)
    return tmp_path / "tone.wav"


def test_vocals_say_what_is_missing(tmp_path: Path, wav: Path) -> None:
    words = "audio-separator" if find_spec("audio_separator") is None else "Kim_Vocal_2"
    with pytest.raises(ValueError, match=words):
        separate_vocals(wav, tmp_path / "Kim_Vocal_2.onnx", tmp_path)
    with pytest.raises(ValueError, match="no such file"):
        separate_vocals(tmp_path / "no.wav", tmp_path / "Kim_Vocal_2.onnx", tmp_path)


def test_a_gpu_that_is_asked_for_must_be_there(tmp_path: Path, wav: Path) -> None:
    pytest.importorskip("audio_separator")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    (tmp_path / "Kim_Vocal_2.onnx").write_bytes(b"x" * 1000)
    with pytest.raises(ValueError, match="needs a GPU"):
        separate_vocals(wav, tmp_path / "Kim_Vocal_2.onnx", tmp_path / "vocals", "cuda")


def test_vocals_of_a_pass_through_model(tmp_path: Path, wav: Path) -> None:
    pytest.importorskip("audio_separator")
    onnx = pytest.importorskip("onnx")
    ends = [onnx.helper.make_tensor_value_info(name, 1, ["batch", 4, 3072, 256]) for name in ("input", "output")]
    graph = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["input"], ["output"])], "pass", ends[:1], ends[1:])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 13)], ir_version=8)
    onnx.save(model, tmp_path / "Kim_Vocal_2.onnx")
    before = os.environ["PATH"]
    path = separate_vocals(wav, tmp_path / "Kim_Vocal_2.onnx", tmp_path / "vocals")
    with AudioTrack(path) as voice, AudioTrack(wav) as source:
        pair = np.stack([track.read(1000, 15_000) for track in (voice, source)])
    assert np.corrcoef(pair)[0, 1] > 0.99 and np.std(pair[0]) == pytest.approx(np.std(pair[1]), rel=0.02)
    assert os.environ["PATH"] == before and os.listdir(tmp_path / "vocals") == ["vocals.wav"]
    (tmp_path / "Kim_Vocal_2.onnx").write_bytes(b"x" * 1000)
    with pytest.raises(ValueError, match="damaged"):
        separate_vocals(wav, tmp_path / "Kim_Vocal_2.onnx", tmp_path / "vocals")


def test_separation_where_its_package_stands_alone(tmp_path: Path) -> None:
    """The tests that are skipped above and in test_preparation_scores, with the audio-separator that scripts/setup.sh dev puts aside.

    torchvision, of which it loads names and uses none, is a stand-in: that would break transformers in this process.
    """
    package = Path(sys.prefix) / "vocals"
    if find_spec("audio_separator") is not None or not package.is_dir():
        pytest.skip("audio-separator is installed as usual, or not put aside")
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision/__init__.py").write_text("from torchvision import ops\n")
    (tmp_path / "torchvision/ops.py").write_text("nms = roi_align = box_convert = None\n")
    tests = Path(__file__).parent
    files = [str(tests / name) for name in ("test_vocals.py", "test_preparation_scores.py")]
    words = ["--noconftest", "-p", "no:cacheprovider", "-rs", "-k", "(vocal or gpu_that_is_asked or separat) and not stands_alone", *files]
    paths = os.pathsep.join(map(str, (tmp_path, package, tests.parent, tests)))
    run = subprocess.run([sys.executable, "-m", "pytest", *words], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": paths})
    assert run.returncode == 0 and "SKIPPED" not in run.stdout, run.stdout[-3000:] + run.stderr[-1000:]

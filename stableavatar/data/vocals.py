"""The voice alone: music and noise taken out of a recording by Kim_Vocal_2, through the audio-separator package."""

import json
import logging
import os
import subprocess
import tempfile
import wave
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import imageio_ffmpeg
import numpy as np

from stableavatar import ffmpeg

if TYPE_CHECKING:
    from audio_separator.separator import Separator

logger = logging.getLogger(__name__)

MODEL_NAME = "Kim_Vocal_2.onnx"
KIM_VOCAL_2 = {
    "compensate": 1.009,
    "mdx_dim_f_set": 3072,
    "mdx_dim_t_set": 8,
    "mdx_n_fft_scale_set": 7680,
    "primary_stem": "Vocals",
}
"""The model's published parameters (UVR's list of MDX-Net models)."""
MODEL_LISTS = [f"{kind}_download_list" for kind in ("vr", "mdx", "demucs", "mdx23c", "roformer")]
VIP_LISTS = ["mdx_download_vip_list", "mdx23c_download_vip_list"]
MODEL_RATE = 44_100


def separate_vocals(source: str | Path, model_file: str | Path, out_dir: str | Path, device: str = "auto") -> Path:
    """Write the voice of an audio or video file to out_dir/vocals.wav (44.1 kHz stereo, as long as the source).

    Raises:
        ValueError: audio-separator is not installed, the model is missing or damaged, the source has no readable sound, there is no such
            device.
    """
    ffmpeg.probe_audio(ffmpeg.existing_file(source, "audio"))
    return VocalSeparator(model_file, device).separate(source, out_dir)


class VocalSeparator:
    """The model, loaded once for many files.

    Args:
        model_file: Kim_Vocal_2.onnx.
        device: cpu, cuda, or auto for a GPU where torch and onnxruntime can use one.
    """

    def __init__(self, model_file: str | Path, device: str = "auto") -> None:
        check_separator(model_file)
        with tempfile.TemporaryDirectory() as work, _environment(Path(work)):
            self._separator = _load(Path(model_file), Path(work), device)

    def separate(self, source: str | Path, out_dir: str | Path) -> Path:
        """Write the voice of an audio or video file to out_dir/vocals.wav; raises ValueError as `separate_vocals` does."""
        source, out_dir = ffmpeg.existing_file(source, "audio"), Path(out_dir)
        logger.info("separating the voice of %s", source)
        out_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as work, _environment(Path(work)):
            # Some versions multiply the voice by the peak of the mix, and none must have to limit it: the mix is given at full scale.
            peak = _peak(_decode(source, Path(work) / "mix.wav")) or 1.0
            mix = _decode(source, Path(work) / "full.wav", gain=1 / peak)
            self._separator.output_dir = self._separator.model_instance.output_dir = work
            self._separator.separate(str(mix), {"Vocals": "vocals"})
            return _decode(Path(work) / "vocals.wav", out_dir / "vocals.wav", gain=peak)


def check_separator(model_file: str | Path) -> None:
    """ValueError if the package is not installed or the model is not there; whether it is whole shows when it loads."""
    if find_spec("audio_separator") is None:
        raise ValueError("vocal separation needs the audio-separator package; pip install 'audio-separator[cpu]' (or [gpu])")
    if Path(model_file).name != MODEL_NAME or not Path(model_file).is_file():
        raise ValueError(f"vocal separation needs the model {MODEL_NAME}, got {model_file}; put it into the checkpoints folder")


def _decode(source: Path, target: Path, gain: float = 1.0) -> Path:
    """Writes the sound of a file as 44.1 kHz stereo with 16 bits."""
    # Of its own accord ffmpeg would make mono quieter by 3 dB in either channel.
    both = "pan=stereo|c0=c0|c1=c0," if ffmpeg.probe_audio(source).layout in ("mono", "1 channels") else ""
    sound = ["-map", "0:a:0", "-ac", "2", "-af", f"{both}volume={gain!r}", "-ar", str(MODEL_RATE), "-c:a", "pcm_s16le"]
    run = subprocess.run(ffmpeg.command("-y", *ffmpeg.file_input(source), *sound, f"file:{target}"), stderr=subprocess.PIPE)
    if run.returncode:
        raise ValueError(f"cannot decode audio {source}: {ffmpeg.reason(run.stderr.decode(errors='replace'))}")
    return target


def _peak(path: Path) -> float:
    """Largest magnitude in a wav with 16 bits, 1 for full scale."""
    with wave.open(str(path)) as file:
        blocks = iter(lambda: file.readframes(1 << 20), b"")
        return max((float(np.abs(np.frombuffer(block, "<i2").astype(np.float32)).max()) for block in blocks), default=0.0) / 32_768


def _load(model_file: Path, work: Path, device: str) -> "Separator":
    """The package's separator with the model loaded from disk; the lists it would download are written to `work` instead."""
    from audio_separator.separator import Separator
    from onnxruntime.capi import onnxruntime_pybind11_state as onnx

    (work / MODEL_NAME).symlink_to(model_file.resolve())
    separator = Separator(
        log_level=logging.ERROR,
        model_file_dir=str(work),
        output_dir=str(work),
        output_single_stem="Vocals",
        normalization_threshold=1.0,  # a loud recording keeps its level
        use_soundfile=True,
    )
    _place(separator, device)
    known = dict.fromkeys(MODEL_LISTS + VIP_LISTS, {})
    known["mdx_download_list"] = {"MDX-Net Model: Kim Vocal 2": MODEL_NAME}
    parameters = {separator.get_model_hash(str(model_file)): KIM_VOCAL_2}
    for name, content in [("download_checks", known), ("vr_model_data", {}), ("mdx_model_data", parameters)]:
        (work / f"{name}.json").write_text(json.dumps(content))
    try:
        separator.load_model(MODEL_NAME)
    except (onnx.InvalidArgument, onnx.InvalidProtobuf, onnx.InvalidGraph, onnx.Fail):
        raise ValueError(f"the model {model_file} is damaged or truncated; fetch it again") from None
    return separator


def _place(separator: "Separator", device: str) -> None:
    """Overrides the device that the package has chosen; ValueError if it has found no GPU for one that is asked for."""
    if device == "cpu":
        separator.torch_device, separator.onnx_execution_provider = separator.torch_device_cpu, ["CPUExecutionProvider"]
    elif device == "cuda" and separator.onnx_execution_provider != ["CUDAExecutionProvider"]:
        raise ValueError("vocal separation on cuda needs a GPU that torch and onnxruntime-gpu can both use; install them, or take the cpu")


@contextmanager
def _environment(work: Path) -> Iterator[None]:
    """The package looks for a program `ffmpeg`, and a variable would replace its model folder: here both are ours."""
    (work / "ffmpeg").symlink_to(imageio_ffmpeg.get_ffmpeg_exe())
    ours = {"PATH": f"{work}{os.pathsep}{os.environ.get('PATH', '')}", "AUDIO_SEPARATOR_MODEL_DIR": str(work)}
    before = {name: os.environ.get(name) for name in ours}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            os.environ.update({} if value is None else {name: value})

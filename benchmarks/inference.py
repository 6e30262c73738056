"""Time and peak memory of whole generations, each in a process of its own, as `inference.py` records them in its sidecar.

    python benchmarks/inference.py length|order|memory|attention|solver [--config configs/inference/puppet.yaml] [key=value ...]

`length` makes 10, 60 and 600 s in wavefront order; `order` compares both orders at 10 and 120 s; `memory` every memory mode;
`attention` every backend that runs on this machine; `solver` solvers, guidance and the step cache.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import soundfile

from stableavatar.geometry import SAMPLE_RATE
from stableavatar.models.kernels import backend_names

ROOT = Path(__file__).resolve().parents[1]
EXPERIMENTS: dict[str, list[tuple[int, list[str]]]] = {
    "length": [(seconds, ["windows.order=wavefront"]) for seconds in (10, 60, 600)],
    "order": [(seconds, [f"windows.order={order}"]) for seconds in (10, 120) for order in ("step_major", "wavefront")],
    "memory": [
        (5, words)
        for words in (
            ["memory.mode=full"],
            ["memory.mode=model_offload"],
            ["memory.mode=group_offload"],
            ["memory.mode=sequential_offload"],
            ["memory.fp8=true"],
            ["memory.vae_tiling=true"],
            ["guidance.batched=true"],
        )
    ],
    "attention": [(5, [f"attention={name}"]) for name in backend_names()],
    "solver": [
        (5, words)
        for words in (
            ["guidance.name=none"],
            ["guidance.name=cfg"],
            ["guidance.name=audio_native"],
            ["solver=unipc"],
            ["solver=dpm"],
            ["steps=20"],
            ["steps=20", "step_cache=0.1"],
            ["steps=20", "step_cache=0.3"],
        )
    ],
}


def write_voice(path: Path, seconds: int) -> Path:
    """A tone whose loudness rises and falls four times a second, written second by second."""
    with soundfile.SoundFile(path, "w", SAMPLE_RATE, 1) as file:
        for second in range(seconds):
            time = second + np.arange(SAMPLE_RATE) / SAMPLE_RATE
            file.write(0.3 * np.sin(2 * np.pi * 180 * time) * (0.5 - 0.5 * np.cos(8 * np.pi * time)))
    return path


def measure(config: str, seconds: int, words: list[str]) -> dict:
    """The sidecar of one run; {"error": line} where it refuses."""
    with tempfile.TemporaryDirectory() as folder:
        voice = write_voice(Path(folder) / "voice.wav", seconds)
        portrait = ROOT / "examples" / "ada" / "reference.png"
        case = [f"reference={portrait}", f"audio={voice}", f"output={folder}/out.mp4", "prompt=A woman talks.", *words]
        run = subprocess.run([sys.executable, "inference.py", config, *case], cwd=ROOT, capture_output=True, text=True)
        if run.returncode:
            return {"error": (run.stderr.strip().splitlines() or ["no message"])[-1]}
        return json.loads((Path(folder) / "out.json").read_text())


def row(seconds: int, words: list[str], record: dict) -> str:
    """One line of the table."""
    label = " ".join(words)
    if "error" in record:
        return f"| {seconds} | {label} | - | - | - | {record['error'][:90]} |"
    timings, memory = record["timings"], record["peak_memory"]
    device = f"{memory['device_bytes'] / 2**20:.0f}" if "device_bytes" in memory else "-"
    first, total = timings["first_frames_seconds"], timings["total_seconds"]
    return f"| {seconds} | {label} | {total:.1f} | {first:.1f} | {memory['host_bytes'] / 2**20:.0f} | {device} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument("words", nargs="*", metavar="key=value")
    parser.add_argument("--config", default="configs/inference/puppet.yaml")
    options = parser.parse_args()
    print("| audio s | settings | total s | first frames s | peak host MiB | peak device MiB |")
    print("|---|---|---|---|---|---|", flush=True)
    for seconds, words in EXPERIMENTS[options.experiment]:
        print(row(seconds, words, measure(options.config, seconds, words + options.words)), flush=True)


if __name__ == "__main__":
    main()

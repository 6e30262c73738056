"""Several processes make one process's video: started by torchrun, tuned and placed, dealt out, killed and gone on."""

import json
import os
import signal
import subprocess
import sys
import time
from itertools import chain
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from PIL import Image

import inference
from stableavatar.cases import check_shares
from stableavatar.config import InferenceConfig, ParallelConfig, override
from stableavatar.media import AudioTrack
from stableavatar.parallel import launch
from stableavatar.parallel.mesh import Mesh
from stableavatar.parallel.shard import held_bytes
from stableavatar.pipeline import StableAvatarPipeline

ROOT = Path(__file__).parents[1]
QUICK = {"width": 32, "height": 32, "steps": 2, "windows.frames": 21, "windows.overlap": 2}
FRAMES = 37
PATIENCE = 60
"""Seconds for the end of a run of which a process is gone; without care it is hours, with it two, on a machine that is not busy."""


def make_latents(config: InferenceConfig, voice: str, mesh: Mesh | None) -> tuple[torch.Tensor, int]:
    """What denoising gives this process, and the bytes of transformer and text encoder that it keeps."""
    pipe = StableAvatarPipeline.from_config(config, mesh)
    pipe.set_progress_bar_config(disable=True)
    pixels = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with AudioTrack(voice) as track:
        conditioning = pipe.encode(pixels, track, "x", FRAMES, config)
        parts = list(pipe.denoise(conditioning, FRAMES, config))
    return torch.cat([torch.empty(16, 0, 4, 4), *parts], dim=1), held_bytes(pipe.transformer) + held_bytes(pipe.text_encoder)


def make_with_each(configs: list[InferenceConfig], voice: str) -> list[tuple[torch.Tensor, int]]:
    """`make_latents` under the meshes that settings name, one after the other."""
    torch.set_num_threads(1)
    sizes = [{name: getattr(config.parallel, name) for name in ("windows", "guidance", "ring", "ulysses")} for config in configs]
    return [make_latents(config, voice, Mesh.over("cpu", **size)) for config, size in zip(configs, sizes, strict=True)]


MESHES = {
    2: ["ulysses=2", "ring=2", "windows=2", "guidance=2", "ring=2 shard=true offload=true", "ulysses=2 shard=true bf16"],
    4: ["ulysses=2 ring=2 shard=true", "windows=2 ulysses=2"],
}


@pytest.mark.parametrize("processes", MESHES)
def test_every_mesh_gives_the_latents_of_one_process(crew, tiny_folder, make_voice, processes):
    def config(mesh: str) -> InferenceConfig:
        words = [word.split("=") for word in mesh.split() if word != "bf16"]
        own = {"dtype": "bfloat16"} if "bf16" in mesh else {}
        return override(InferenceConfig(), QUICK | own | {"model": str(tiny_folder)} | {f"parallel.{key}": value for key, value in words})

    voice, configs = str(make_voice(FRAMES * 640)), [config(mesh) for mesh in MESHES[processes]]
    alone = {dtype: make_latents(override(configs[0], {"parallel.ulysses": 1, "parallel.ring": 1, "parallel.windows": 1,
                                                       "parallel.shard": False, "dtype": dtype}), voice, None)
             for dtype in ("float32", "bfloat16")}  # fmt: skip
    for mesh, *ranks in zip(configs, *crew.run(processes, make_with_each, configs, voice), strict=True):
        dtype = "bfloat16" if mesh.dtype == "bfloat16" else "float32"
        (latents, whole), tolerance = alone[dtype], 1e-5 if dtype == "float32" else (alone["bfloat16"][0] - alone["float32"][0]).abs().max()
        assert (ranks[0][0] - latents).abs().max() < tolerance, str(mesh.parallel)
        held = [bytes_held for _, bytes_held in ranks]
        shares = mesh.parallel.ulysses * mesh.parallel.ring if mesh.parallel.shard else 1
        assert max(held) <= 1.1 * whole / shares and sum(held) >= whole, f"{mesh.parallel}: {held} of {whole} bytes"


@pytest.mark.parametrize(
    ("environment", "parallel", "device", "message"),
    [
        ({}, {"ulysses": 2}, "cpu", "parallel.ulysses=2 needs 2 processes, but one was started; start them with torchrun --nproc_per"),
        ({"WORLD_SIZE": "4"}, {"ulysses": 3, "ring": 2}, "cpu", "ring=2 parallel.ulysses=3 needs 6 of the 4 processes"),
        ({"WORLD_SIZE": "4"}, {}, "cpu", "parallel.ulysses=1 needs 1 of the 4 processes that were started"),
        ({"WORLD_SIZE": "2"}, {"ring": 2}, "cuda:1", "device=cuda:1 names one device for 2 processes"),
        ({"WORLD_SIZE": "64", "LOCAL_WORLD_SIZE": "64"}, {"windows": 64}, "cuda", "64 processes were started on a machine with"),
    ],
)
def test_a_start_that_does_not_fit_the_settings_is_told(monkeypatch, environment, parallel, device, message):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        launch.check_launch(ParallelConfig(**parallel), device)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"parallel.windows": 2, "windows.strategy": "motion_frame"}, "clip after clip, which parallel.windows=2 cannot share"),
        ({"parallel.ring": 2, "attention": "sage"}, "attention's log-sum-exp, which attention=sage lacks"),
        ({"parallel.offload": True, "parallel.ulysses": 2}, "parallel.offload=true .* needs parallel.shard=true"),
        ({"parallel.shard": True, "parallel.windows": 2}, "parallel.shard=true deals weights out to"),
        ({"parallel.shard": True, "parallel.ring": 2, "memory.mode": "group_offload"}, "does not go with memory.mode=group_offload"),
        ({"parallel.shard": True, "parallel.ring": 2, "memory.fp8": True}, "memory.fp8=true"),
        ({"parallel.ring": 0}, "parallel.ring must be at least 1"),
    ],
)
def test_settings_that_do_not_go_with_several_processes_are_told(words, message):
    with pytest.raises(ValueError, match=message):
        override(InferenceConfig(), words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"parallel.ulysses": 5}, "parallel.ulysses=5 shares out 4 attention heads"),
        ({"parallel.ring": 5}, "share the 4 tokens of a frame"),
        ({"parallel.guidance": 2, "guidance.name": "none"}, "guidance.name=none makes 1; use at most as many"),
        ({"parallel.guidance": 3, "guidance.audio_scale": 1}, "guidance.name=cfg makes 2"),
    ],
)
def test_too_little_to_share_out_is_told_from_the_settings_of_the_model(tiny_folder, words, message):
    config = override(InferenceConfig(), QUICK | {"model": str(tiny_folder)})
    check_shares(override(config, {"parallel.ulysses": 2, "parallel.ring": 2, "parallel.guidance": 3}))
    with pytest.raises(ValueError, match=message):
        check_shares(override(config, words))


def meet(mistaken: int) -> list[str]:
    """What the processes get out of a shared piece of work in which one of them, or none (-1), makes a mistake."""
    mesh, rank, heard = Mesh.over("cpu", ulysses=2), torch.distributed.get_rank(), []

    def work() -> str:
        if rank == mistaken:
            raise OSError(f"process {rank} cannot")
        return "done"

    for attempt in (lambda: launch.together(mesh, work), lambda: alone_in_step(mesh, work)):
        try:
            heard.append(attempt())
        except (launch.SharedMistake, launch.Broken) as error:
            heard.append(f"{type(error).__name__}: {error}")
    return heard


def alone_in_step(mesh: Mesh, work) -> str:
    with launch.in_step(mesh):
        return work()


def test_a_mistake_of_one_process_is_everybodys(crew):
    assert crew.run(2, meet, -1) == [["done", "done"]] * 2
    mistake = "process 1 cannot"
    assert crew.run(2, meet, 1) == [[f"SharedMistake: {mistake}", "done"], [f"SharedMistake: {mistake}", f"Broken: {mistake}"]]


@pytest.mark.parametrize(
    ("given", "words", "expected"),
    [
        ({"GPUS": "4"}, [], ["--standalone", "--nproc_per_node=4", "parallel.ulysses=4", "parallel.windows=1"]),
        ({"CUDA_VISIBLE_DEVICES": "0,3"}, ["parallel.windows=2"], ["--standalone", "--nproc_per_node=2", "parallel.windows=2"]),
        ({"GPUS": "8", "SLURM_NNODES": "2", "SLURM_NODEID": "1", "MASTER_ADDR": "first"}, [],
         ["--nnodes=2", "--node_rank=1", "--master_addr=first", "--master_port=29500", "--nproc_per_node=8",
          "parallel.ulysses=8", "parallel.windows=2"]),
    ],
)  # fmt: skip
def test_the_launcher_names_its_mesh_to_torchrun(tmp_path, given, words, expected):
    for folder in ("scripts", ".venv/bin"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "scripts/setup.sh").touch()
    (tmp_path / ".venv/bin/python").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / ".venv/bin/python").chmod(0o755)
    (tmp_path / "scripts/multiple_gpu_inference.sh").write_bytes((ROOT / "scripts/multiple_gpu_inference.sh").read_bytes())
    script, bare = tmp_path / "scripts/multiple_gpu_inference.sh", {"PATH": os.environ["PATH"]}
    run = subprocess.run(["bash", script, "wan_14b", *words], capture_output=True, text=True, env=bare | given, check=True)
    program, config = str(tmp_path / "inference.py"), str(tmp_path / "configs/inference/wan_14b.yaml")
    assert [word for word in run.stdout.splitlines()[1:] if word not in (program, config)] == expected
    alone = subprocess.run(["bash", script, "wan_14b"], capture_output=True, text=True, env=bare | {"GPUS": "2", "NUM_MACHINES": "2"})
    assert alone.returncode == 2 and "give MASTER_ADDR" in alone.stderr


# --- With torchrun itself -------------------------------------------------------------------------------------------------------------


def command(processes: int, folder: Path, *words: str) -> list[str]:
    given = chain((f"{key}={value}" for key, value in QUICK.items()), [f"model={folder}"], words)
    launcher = [sys.executable, str(ROOT / "scripts/launch.py"), "--standalone", f"--nproc_per_node={processes}"]
    return [*launcher, str(ROOT / "inference.py"), *given]


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def frames_of(path: str | Path) -> np.ndarray:
    reader = imageio_ffmpeg.read_frames(str(path))
    next(reader)
    return np.stack([np.frombuffer(frame, np.uint8) for frame in reader]).astype(int)


def in_one_process(folder: Path, *words: str) -> np.ndarray:
    """The frames that one process makes."""
    assert inference.main([*(f"{key}={value}" for key, value in QUICK.items()), f"model={folder}", *words, "output=alone.mp4"]) == 0
    return frames_of("alone.mp4")


def test_torchrun_makes_the_videos_of_a_list_and_skips_a_broken_case(tiny_folder, portrait, make_voice, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    voice = make_voice(FRAMES * 640)
    rows = [f"{portrait},{voice},a.mp4,cfg", f"{portrait},none.wav,b.mp4,cfg", f"{portrait},{make_voice(1400)},c.mp4,none"]
    Path("list.csv").write_text("\n".join(["reference,audio,output,guidance.name", *rows]))
    mesh = ["parallel.windows=2", "parallel.ulysses=2", "parallel.shard=true", "windows.order=step_major"]
    run = subprocess.run(command(4, tiny_folder, "cases=list.csv", *mesh), capture_output=True, text=True, env=environment())
    assert run.returncode == 1, run.stderr
    assert run.stderr.count("none.wav") == 1 and "Traceback" not in run.stderr and "OMP_NUM" not in run.stderr, run.stderr
    assert [line.partition(":")[0] for line in run.stdout.splitlines() if ".mp4:" in line] == ["a.mp4", "c.mp4"]
    assert {path.name for path in tmp_path.iterdir()} == {"list.csv", "a.mp4", "a.json", "c.mp4", "c.json"}
    assert json.loads(Path("a.json").read_text())["settings"]["parallel"]["windows"] == 2
    assert np.abs(frames_of("a.mp4") - in_one_process(tiny_folder, f"reference={portrait}", f"audio={voice}")).max() <= 1


def test_a_mistake_that_all_processes_find_is_one_line(tmp_path):
    run = subprocess.run(command(2, tmp_path, "stepz=3"), capture_output=True, text=True, env=environment())
    assert (run.returncode, run.stdout, len(run.stderr.splitlines())) == (2, "", 1), run.stderr
    assert run.stderr.startswith("error: unknown setting 'stepz'; the nearest is 'steps'")


def test_a_stopped_and_a_killed_run_leave_no_half_file_and_go_on_elsewhere(tiny_folder, portrait, make_voice, tmp_path, monkeypatch):
    """Two processes are told to stop, started again, one of them is killed; one process alone makes the rest."""
    monkeypatch.chdir(tmp_path)
    inputs = [f"reference={portrait}", f"audio={make_voice(FRAMES * 640)}", "steps=20"]
    resumed = [*inputs, "work_dir=work", "save_every=0"]
    for stop in (signal.SIGTERM, signal.SIGKILL):
        seconds, code, words = stopped(command(2, tiny_folder, *resumed, "output=out.mp4", "parallel.ulysses=2"), stop)
        assert (code, seconds < PATIENCE) == ({signal.SIGTERM: 130, signal.SIGKILL: 1}[stop], True), words
        assert {path.name for path in tmp_path.iterdir()} == {"work"} and "Traceback" not in words, words
        assert not list(Path("work").rglob("*.partial"))
        if stop == signal.SIGKILL:
            assert words.count("error: ") >= 1 and "SIGKILL" in words, words
    for words in ([*resumed, "frames_dir=went_on"], [*inputs, "frames_dir=whole"]):  # as PNG: a lossy file makes more of a difference
        in_one_process(tiny_folder, *words)
    went_on, whole = (sorted(Path(folder).iterdir()) for folder in ("went_on", "whole"))
    assert len(went_on) == FRAMES
    for one, other in zip(went_on, whole, strict=True):
        assert np.abs(np.asarray(Image.open(one), int) - np.asarray(Image.open(other), int)).max() <= 1, one


def stopped(words: list[str], stop: signal.Signals) -> tuple[float, int, str]:
    """Seconds until a run that has saved its state is at its end after a signal, its exit code and what it said.

    SIGKILL hits the second process, another signal the launcher.
    """
    state, before = Path("work/state.pt"), time.time_ns()
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment()) as process:
        give_up = time.monotonic() + 500
        while not (state.exists() and state.stat().st_mtime_ns > before) and process.poll() is None and time.monotonic() < give_up:
            time.sleep(0.05)
        assert process.poll() is None and state.exists(), "it ended, or saved nothing, before it could be stopped"
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        if stop == signal.SIGKILL:
            os.kill(int(children[-1]), stop)
        else:
            process.send_signal(stop)
        started = time.monotonic()
        _, err = process.communicate(timeout=100)
    return time.monotonic() - started, process.returncode, err

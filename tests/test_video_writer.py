import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
import soundfile
import torch
from media_files import REAL, needs_real_input, run_ffmpeg, save, tone
from PIL import Image

from stableavatar import ffmpeg
from stableavatar.media import AudioTrack, VideoWriter, fit_image, read_image, write_sidecar

HEIGHT, WIDTH = 96, 128


@pytest.fixture
def wav(tmp_path: Path) -> Path:
    soundfile.write(tmp_path / "tone.wav", tone(), 44_100)
    return tmp_path / "tone.wav"


def clip(count: int) -> np.ndarray:
    """Smooth moving colours, uint8 [count, HEIGHT, WIDTH, 3]."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    frames = [np.stack([x + 2 * i, 2 * y + i, 255 - x], -1) for i in range(count)]
    return (127 + 100 * np.sin(np.stack(frames) / 40)).astype(np.uint8)


def describe(path: Path) -> str:
    return subprocess.run([*ffmpeg.command("-v", "info"), "-i", str(path)], capture_output=True, text=True).stderr


def write(path: Path, frames: np.ndarray, **options: object) -> None:
    with VideoWriter(path, WIDTH, HEIGHT, options.pop("fps", 25), **options) as writer:
        for start in range(0, len(frames), 7):
            writer.write(frames[start : start + 7])


def decode(path: Path) -> np.ndarray:
    raw = run_ffmpeg("-i", str(path), "-f", "rawvideo", "-pix_fmt", "rgb24", "-")
    return np.frombuffer(raw, np.uint8).reshape(-1, HEIGHT, WIDTH, 3)


def stream_seconds(path: Path, stream: str) -> float:
    """End of the last packet of a stream, as the container has it."""
    lines = run_ffmpeg("-i", str(path), "-map", stream, "-c", "copy", "-f", "framecrc", "-").decode().splitlines()
    base = next(line.split()[-1].split("/") for line in lines if line.startswith("#tb"))
    packets = [line.split(",") for line in lines if not line.startswith("#")]
    return max(int(packet[2]) + int(packet[3]) for packet in packets) * int(base[0]) / int(base[1])


def test_video_holds_the_frames(tmp_path: Path, wav: Path) -> None:
    frames = clip(30)
    write(tmp_path / "new" / "out.mp4", frames, sound=wav, metadata={"seed": 7}, frames_dir=tmp_path / "png")
    decoded = decode(tmp_path / "new" / "out.mp4")
    assert decoded.shape == frames.shape
    assert 10 * np.log10(255**2 / np.mean((decoded - frames.astype(float)) ** 2)) > 38
    assert all(np.array_equal(np.asarray(Image.open(tmp_path / "png" / f"frame_{i}.png")), frames[i]) for i in range(30))
    text = describe(tmp_path / "new" / "out.mp4")
    assert all(words in text for words in ("h264", "yuv420p", "25 fps", "aac", "AI-generated", "seed=7", f"{WIDTH}x{HEIGHT}"))
    assert "creation_time" not in text and os.listdir(tmp_path / "new") == ["out.mp4"]
    content = (tmp_path / "new" / "out.mp4").read_bytes()
    assert 0 < content.index(b"moov") < content.index(b"mdat")


def test_other_readers_see_the_same_colours(tmp_path: Path) -> None:
    write(tmp_path / "out.mp4", clip(3))
    read, frame = cv2.VideoCapture(str(tmp_path / "out.mp4")).read()
    assert read and np.abs(frame[..., ::-1].astype(float) - clip(1)[0]).mean() < 3


@pytest.mark.parametrize(("count", "fps"), [(1, 25), (12, 25), (26, 25), (75, 25), (30, 29.97), (20, 1)])
def test_length_is_frames_over_fps(tmp_path: Path, wav: Path, count: int, fps: float) -> None:
    write(tmp_path / "out.mp4", clip(count), sound=wav, fps=fps)
    assert len(decode(tmp_path / "out.mp4")) == count
    assert abs(stream_seconds(tmp_path / "out.mp4", "0:v") - count / fps) <= 1 / fps
    assert abs(stream_seconds(tmp_path / "out.mp4", "0:a") - count / fps) < 0.01
    with AudioTrack(tmp_path / "out.mp4") as track:
        assert abs(track.duration - count / fps) < 0.01


def test_sound_is_in_step(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).normal(0, 0.1, 32_000)
    soundfile.write(tmp_path / "a.wav", noise, 32_000)
    run_ffmpeg(
        *("-itsoffset", "0.4", "-i", str(tmp_path / "a.wav")), *("-f", "lavfi", "-i", "testsrc=s=64x64:d=2"), str(tmp_path / "late.mp4")
    )
    for source in ("a.wav", "late.mp4"):
        write(tmp_path / "out.mp4", clip(25), sound=tmp_path / source)
        with AudioTrack(tmp_path / source) as before, AudioTrack(tmp_path / "out.mp4") as after:
            heard, expected = after.read(1000, 15_000), before.read(1000, 15_000)
        lags = range(-50, 51)
        assert lags[np.argmax([heard @ np.roll(expected, lag) for lag in lags])] == 0


@pytest.mark.parametrize(("rate", "channels"), [(8_000, 1), (11_000, 2), (192_000, 2), (48_000, 6), (48_000, 12)])
def test_any_sound_is_muxed(tmp_path: Path, rate: int, channels: int) -> None:
    soundfile.write(tmp_path / "a.wav", tone(1, rate, channels), rate)
    write(tmp_path / "out.mp4", clip(25), sound=tmp_path / "a.wav")
    assert "Audio: aac" in describe(tmp_path / "out.mp4")


def test_the_same_frames_give_the_same_bytes(tmp_path: Path, wav: Path) -> None:
    write(tmp_path / "a.mp4", clip(40), sound=wav)
    time.sleep(1.1)
    with VideoWriter(tmp_path / "b.mp4", WIDTH, HEIGHT, 25, sound=wav) as writer:
        writer.write(torch.from_numpy(clip(40)))
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


def test_failure_leaves_what_was_there(tmp_path: Path, wav: Path) -> None:
    (tmp_path / "out.mp4").write_text("before")
    with pytest.raises(RuntimeError), VideoWriter(tmp_path / "out.mp4", WIDTH, HEIGHT, 25, wav, None, tmp_path / "a" / "b") as writer:
        writer.write(clip(3))
        raise RuntimeError
    assert sorted(os.listdir(tmp_path)) == ["out.mp4", "tone.wav"] and (tmp_path / "out.mp4").read_text() == "before"


def test_frames_of_another_video_are_refused_and_kept(tmp_path: Path) -> None:
    write(tmp_path / "a.mp4", clip(3), frames_dir=tmp_path / "png")
    with pytest.raises(ValueError, match="already holds frames"):
        VideoWriter(tmp_path / "new" / "b.mp4", WIDTH, HEIGHT, 25, frames_dir=tmp_path / "png")
    assert sorted(os.listdir(tmp_path)) == ["a.mp4", "png"] and len(os.listdir(tmp_path / "png")) == 3


def test_failure_empties_a_folder_that_was_there(tmp_path: Path) -> None:
    (tmp_path / "png").mkdir()
    (tmp_path / "png" / "notes.txt").touch()
    with pytest.raises(RuntimeError), VideoWriter(tmp_path / "a.mp4", WIDTH, HEIGHT, 25, frames_dir=tmp_path / "png") as writer:
        writer.write(clip(3))
        raise RuntimeError
    assert os.listdir(tmp_path) == ["png"] and os.listdir(tmp_path / "png") == ["notes.txt"]


@pytest.mark.parametrize("finish", [False, True])
def test_death_of_ffmpeg(tmp_path: Path, finish: bool) -> None:
    with pytest.raises(ValueError, match="ffmpeg failed"), VideoWriter(tmp_path / "new" / "out.mp4", WIDTH, HEIGHT, 25) as writer:
        writer.write(clip(3))
        writer._ffmpeg.kill()
        writer._ffmpeg.wait()
        for _ in range(0 if finish else 20):
            writer.write(clip(30))
    assert not os.listdir(tmp_path)


INTERRUPTED = """
import sys, time, numpy as np
from stableavatar.media import VideoWriter
with VideoWriter(sys.argv[1] + "/new/out.mp4", 128, 96, 25, frames_dir=sys.argv[1] + "/png") as writer:
    writer.write(np.zeros((9, 96, 128, 3), np.uint8))
    print("ready", flush=True)
    time.sleep(60)
"""


def test_ctrl_c_leaves_nothing(tmp_path: Path) -> None:
    run = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        text=True,
    )
    assert run.stdout.readline() == "ready\n" and os.listdir(tmp_path / "png")
    os.killpg(run.pid, signal.SIGINT)
    assert "KeyboardInterrupt" in run.communicate(timeout=20)[1]
    assert not os.listdir(tmp_path)


def test_a_signal_does_not_stop_the_cleaning_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when a process has failed because another one is gone, and is told to end before it has cleaned up."""
    unlink = os.unlink

    def interrupted(path: Path) -> None:
        signal.raise_signal(signal.SIGINT)
        unlink(path)

    with pytest.raises(KeyboardInterrupt), VideoWriter(tmp_path / "out.mp4", 128, 96, 25) as video:
        video.write(clip(3))
        monkeypatch.setattr("os.unlink", interrupted)
        raise RuntimeError("another process has ended")
    assert not list(tmp_path.iterdir())


def test_a_killed_run_does_not_disturb_the_next(tmp_path: Path) -> None:
    run = subprocess.Popen([sys.executable, "-c", INTERRUPTED, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    run.stdout.readline()
    run.kill()
    run.communicate()
    write(tmp_path / "new" / "out.mp4", clip(5))
    assert os.listdir(tmp_path / "new") == ["out.mp4"] and len(decode(tmp_path / "new" / "out.mp4")) == 5


@pytest.fixture
def small_disk(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A disk of `request.param` kB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if shutil.which("mount") is None or subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={request.param}k", "none", disk]).returncode:
        pytest.skip("a small disk cannot be mounted here")
    yield disk
    subprocess.run(["umount", disk], check=True)


def assert_full(disk: Path, frames: np.ndarray, **options: object) -> None:
    with pytest.raises(ValueError, match="No space left"):
        write(disk / "out.mp4", frames, **options)
    assert not os.listdir(disk)


@pytest.mark.parametrize("small_disk", [500], indirect=True)
def test_full_disk(small_disk: Path, tmp_path: Path, wav: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (80, HEIGHT, WIDTH, 3), np.uint8)
    assert_full(small_disk, noise)
    assert_full(small_disk, noise, frames_dir=small_disk / "png")
    write(tmp_path / "out.mp4", noise[:40])
    half = (tmp_path / "out.mp4").stat().st_size
    assert 250_000 < half < 500_000, "the frames must fit once, but not a second time with the sound"
    assert_full(small_disk, noise[:40], sound=wav)
    with pytest.raises(ValueError, match="No space left"):
        write_sidecar(small_disk / "out.mp4", {"long": "x" * 2_000_000})
    assert not os.listdir(small_disk)


def test_unwritable_output(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder.mp4").mkdir()
    for path, words in [("file/out.mp4", "cannot write"), ("folder.mp4", "is a folder"), ("out.avi", "ends in .mp4")]:
        with pytest.raises(ValueError, match=words):
            VideoWriter(tmp_path / path, WIDTH, HEIGHT, 25)
    with pytest.raises(ValueError, match="cannot write"):
        VideoWriter("/proc/out.mp4", WIDTH, HEIGHT, 25)
    with pytest.raises(ValueError, match="cannot write"):
        VideoWriter(tmp_path / "new" / "out.mp4", WIDTH, HEIGHT, 25, frames_dir=tmp_path / "file")
    with pytest.raises(ValueError, match="cannot write"):
        write_sidecar(tmp_path / "file" / "out.mp4", {})
    assert sorted(os.listdir(tmp_path)) == ["file", "folder.mp4"]


def test_bad_settings_of_a_video(tmp_path: Path, wav: Path) -> None:
    save(tmp_path / "a.png", np.zeros((8, 8, 3), np.uint8))
    out = tmp_path / "new" / "out.mp4"
    for arguments, words in [
        ((0, 96, 25), "0x96"),
        ((128, 97, 25), "even"),
        ((128, 96, 0), "0 frames per second"),
        ((128, 96, 25, tmp_path / "no.wav"), "no such file"),
        ((128, 96, 25, tmp_path / "a.png"), "no audio stream"),
    ]:
        with pytest.raises(ValueError, match=words):
            VideoWriter(out, *arguments)
    with pytest.raises(ValueError, match="at least one"), VideoWriter(out, WIDTH, HEIGHT, 25, wav):
        pass
    assert sorted(os.listdir(tmp_path)) == ["a.png", "tone.wav"]


def test_sidecar(tmp_path: Path) -> None:
    path = write_sidecar(tmp_path / "out.mp4", {"seed": 1, "output": Path("x"), "prompt": "é"})
    assert path == tmp_path / "out.json" and os.listdir(tmp_path) == ["out.json"]
    assert json.loads(path.read_text(encoding="utf-8")) == {"seed": 1, "output": "x", "prompt": "é"}


@needs_real_input
def test_real_inputs(tmp_path: Path) -> None:
    portrait = (fit_image(read_image(REAL / "portrait_a.png"), WIDTH, HEIGHT) + 1) * 127.5
    frames = portrait.round().byte().permute(1, 2, 0).expand(50, -1, -1, -1)
    write(tmp_path / "out.mp4", frames.numpy(), sound=REAL / "talking_head_15s.mp4")
    assert abs(stream_seconds(tmp_path / "out.mp4", "0:a") - 2) < 0.01

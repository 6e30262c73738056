"""Calls of the ffmpeg that imageio-ffmpeg brings along, and what its messages say."""

import re
import struct
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import imageio_ffmpeg
import numpy as np

UNKNOWN_WAV_SIZE = 0x7FFF0000
"""Programs that write a WAV into a pipe cannot go back to fill in its size; they put 0 or a value above this."""
TRUNCATED = ("partial file", "ended prematurely")
"""ffmpeg's words for a container that ends before its index does (it carries on with what there is)."""
DISCARD = 0x4
"""Flag of packets before the start of a cut file: they are decoded for the sake of the later ones, and not shown."""
JITTER = 0.25
"""Frames by which the times of an evenly spaced stream may deviate (containers round them)."""


@dataclass(frozen=True)
class AudioStream:
    """What a file's header says about its first audio stream; `duration` (seconds) is None where it promises none."""

    rate: int
    layout: str
    duration: float | None


@dataclass(frozen=True)
class VideoStream:
    """The first video stream of a file as ffmpeg shows it: upright, its frames numbered from 0 at a constant rate.

    Attributes:
        frames, fps: how many frames, and how many a second.
        even: the file's own frames are evenly spaced, so frame i is the i-th of them; else some are repeated or dropped on the way.
        start: seconds from the start of the file to frame 0; sound_delay: seconds from frame 0 to the start of the file's sound.
    """

    width: int
    height: int
    frames: int
    fps: float
    even: bool
    start: float
    sound_delay: float


def command(*arguments: str) -> list[str]:
    """Command line of the bundled ffmpeg, quiet about all but errors."""
    return [imageio_ffmpeg.get_ffmpeg_exe(), "-nostdin", "-nostats", "-hide_banner", "-v", "error", *arguments]


def file_input(path: Path) -> list[str]:
    """Input arguments for a local file: names such as `-a.wav` or `a:b.wav` are safe, playlists cannot reach the network."""
    return ["-protocol_whitelist", "file", "-i", f"file:{path}"]


def reason(log: str) -> str:
    """The first message of an ffmpeg log (the later ones follow from it), without its origin in brackets."""
    lines = [re.sub(r"^(\[[^]]*\] *)+", "", line).strip() for line in log.splitlines()]
    return next(filter(None, lines), "ffmpeg gave no reason")


def raw_frames(arguments: Sequence[str], width: int, height: int, wrong: Callable[[int, str], str | None]) -> Iterator[np.ndarray]:
    """Frames as they are decoded, uint8 [height, width, 3] RGB, one at a time; who stops taking them stops ffmpeg.

    Args:
        arguments: ffmpeg's, from its input to the filters that give frames of that size.
        wrong: takes how many frames there were when they ended and the log's reason; says what is wrong with that, None if nothing.

    Raises:
        ValueError: what `wrong` says.
    """
    raw, size, count = ["-fps_mode", "passthrough", "-pix_fmt", "rgb24", "-f", "rawvideo", "pipe:1"], width * height * 3, 0
    with tempfile.TemporaryFile() as log, subprocess.Popen(command(*arguments, *raw), stdout=subprocess.PIPE, stderr=log) as process:
        try:
            while len(pixels := process.stdout.read(size)) == size:
                yield np.frombuffer(pixels, np.uint8).reshape(height, width, 3)
                count += 1
            process.wait()
            log.seek(0)
            if problem := wrong(count, reason(log.read().decode(errors="replace"))):
                raise ValueError(problem)
        finally:
            process.stdout.close()
            process.terminate()


def existing_file(path: str | Path, kind: str) -> Path:
    """`path`, if it is a file with something in it; `kind` ("image", "audio") is named in the ValueError otherwise."""
    path = Path(path)
    if not path.is_file():
        problem = "it is a folder" if path.is_dir() else "there is no such file"
        raise ValueError(f"cannot read {kind} {path}: {problem}; give the path of an {kind} file")
    if not path.stat().st_size:
        raise ValueError(f"cannot read {kind} {path}: the file is empty (0 bytes)")
    return path


def missing_wav_bytes(path: Path) -> int:
    """Bytes of sound that a WAV's header promises and the file does not hold; 0 for any other file."""
    with path.open("rb") as file:
        riff = file.read(12)
        if riff[:4] + riff[8:] != b"RIFFWAVE":
            return 0
        while len(header := file.read(8)) == 8:
            name, size = struct.unpack("<4sI", header)
            if name == b"data":
                return 0 if size > UNKNOWN_WAV_SIZE else max(0, file.tell() + size - path.stat().st_size)
            file.seek(size + size % 2, 1)
    return 0


def header(path: Path, kind: str) -> str:
    """ffmpeg's description of a file and its streams; ValueError where it cannot be read as anything (`kind` is what was hoped for)."""
    run = subprocess.run(command("-v", "info", *file_input(path)), stderr=subprocess.PIPE)
    log = run.stderr.decode(errors="replace")
    if "Input #0" not in log:
        expected = "video" if kind == "video" else "audio or video"
        raise ValueError(f"cannot read {kind} {path}: {reason(log)}; expected a whole {expected} file")
    return log


def probe_audio(path: Path) -> AudioStream:
    """The first audio stream of an audio or video file; ValueError where it cannot be read or has none."""
    log = header(path, "audio")
    stream = re.search(r"Audio: .*?(\d+) Hz, ([^,\n]+)", log)
    if stream is None:
        raise ValueError(f"no audio stream in {path}; give an audio file or a video with sound")
    return AudioStream(int(stream[1]), stream[2].strip(), _promised_duration(log))


def clock_span(path: Path, stream: str) -> tuple[float, float] | None:
    """When a stream ("V:0", "a:0") begins and ends by the file's own clock, seconds, told by its packets; None if it has none."""
    copy = ["-map", f"0:{stream}", "-c", "copy", "-f", "framecrc", "pipe:1"]
    table = subprocess.run(command("-fflags", "+genpts", "-copyts", *file_input(path), *copy), capture_output=True).stdout.decode()
    packets = [line.split(",") for line in table.splitlines() if not line.startswith("#")]
    times = [(int(packet[2]), int(packet[2]) + int(packet[3])) for packet in packets if not _is_discarded(packet)]
    if not times:
        return None
    unit = Fraction(re.search(r"#tb 0: (\S+)", table)[1])
    return float(min(start for start, _ in times) * unit), float(max(end for _, end in times) * unit)


def clock_start(log: str) -> float:
    """What a file's own clock shows at its start, from where -ss counts, told by its header."""
    start = re.search(r"Duration: .*, start: (-?[\d.]+)", log)
    return float(start[1]) if start else 0.0


def probe_video(path: Path) -> VideoStream:
    """The first video stream of a file, counted without decoding it; ValueError where it cannot be read, is truncated or has none."""
    copy = ["-map", "0:V:0", "-c", "copy", "-f", "framecrc", "pipe:1"]
    # MPEG's program streams give some packets no time of their own.
    run = subprocess.run(command("-v", "info", "-fflags", "+genpts", *file_input(path), *copy), capture_output=True)
    log, table = run.stderr.decode(errors="replace"), run.stdout.decode()
    if "Input #0" not in log:
        raise ValueError(f"cannot read video {path}: {reason(log)}; expected a whole video file")
    if any(words in log for words in TRUNCATED):
        raise ValueError(f"video {path} is truncated; give a whole file")
    packets = [line.split(",") for line in table.splitlines() if not line.startswith("#")]
    ticks = np.sort([int(packet[2]) for packet in packets if not _is_discarded(packet)])
    if not len(ticks):
        raise ValueError(f"no pictures in {path}; give a video")
    header = dict(re.findall(r"#(tb|dimensions) 0: (\S+)", table))
    width, height = (int(side) for side in header["dimensions"].split("x"))
    if is_turned(log):
        width, height = height, width
    unit = Fraction(header["tb"])
    start = float(ticks[0] * unit)
    return VideoStream(width, height, *_grid(ticks, unit, log), start, _sound_start(log) - start)


def is_turned(log: str) -> bool:
    """Whether a file's description asks to turn the picture by 90 degrees to either side."""
    turn = re.search(r"rotation of (\S+) degrees", log)
    return bool(turn) and bool(round(float(turn[1])) % 180)


def _is_discarded(packet: list[str]) -> bool:
    """Whether a line of framecrc (its flags are left out where they say no more than "key frame") is of a packet that is not shown."""
    return any(int(field.partition("=")[2], 16) & DISCARD for field in packet if field.startswith(" F="))


def _grid(ticks: np.ndarray, unit: Fraction, log: str) -> tuple[int, float, bool]:
    """Frames, rate and evenness of a stream whose frames are shown at `ticks`, in `unit` seconds."""
    count, length = len(ticks), int(ticks[-1]) - int(ticks[0])
    mean = float((count - 1) / (length * unit)) if length else 1.0
    if length and np.abs((ticks - ticks[0]) * ((count - 1) / length) - np.arange(count)).max() < JITTER:
        return count, mean, True
    base = re.search(r" ([\d.]+) tbr", log)
    rate = float(base[1]) if base else mean
    return round(float(length * unit) * rate) + 1, rate, False


def _sound_start(log: str) -> float:
    """Seconds from the start of a file to that of its first audio stream (whose line names its start where it is not 0)."""
    own = re.search(r"Stream #.*Audio: .*, start (-?[\d.]+)", log)
    return (float(own[1]) if own else 0.0) - clock_start(log)


def _promised_duration(log: str) -> float | None:
    """Seconds that the header states; None if it is ffmpeg's estimate, or may be a picture's rather than the sound's."""
    clock = re.search(r"Duration: (\d+):(\d+):([\d.]+)", log)
    has_video = any("Video:" in line and "attached pic" not in line for line in log.splitlines())
    if clock is None or has_video or "Estimating duration" in log:
        return None
    return int(clock[1]) * 3600 + int(clock[2]) * 60 + float(clock[3])

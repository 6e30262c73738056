"""Calls of the ffmpeg that imageio-ffmpeg brings along, and what its messages say."""

import re
import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path

import imageio_ffmpeg

UNKNOWN_WAV_SIZE = 0x7FFF0000
"""Programs that write a WAV into a pipe cannot go back to fill in its size; they put 0 or a value above this."""


@dataclass(frozen=True)
class AudioStream:
    """What a file's header says about its first audio stream; `duration` (seconds) is None where it promises none."""

    rate: int
    layout: str
    duration: float | None


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


def probe_audio(path: Path) -> AudioStream:
    """The first audio stream of an audio or video file; ValueError where it cannot be read or has none."""
    run = subprocess.run(command("-v", "info", *file_input(path)), stderr=subprocess.PIPE)
    log = run.stderr.decode(errors="replace")
    if "Input #0" not in log:
        raise ValueError(f"cannot read audio {path}: {reason(log)}; expected a whole audio or video file")
    stream = re.search(r"Audio: .*?(\d+) Hz, ([^,\n]+)", log)
    if stream is None:
        raise ValueError(f"no audio stream in {path}; give an audio file or a video with sound")
    return AudioStream(int(stream[1]), stream[2].strip(), _promised_duration(log))


def _promised_duration(log: str) -> float | None:
    """Seconds that the header states; None if it is ffmpeg's estimate, or may be a picture's rather than the sound's."""
    clock = re.search(r"Duration: (\d+):(\d+):([\d.]+)", log)
    has_video = any("Video:" in line and "attached pic" not in line for line in log.splitlines())
    if clock is None or has_video or "Estimating duration" in log:
        return None
    return int(clock[1]) * 3600 + int(clock[2]) * 60 + float(clock[3])

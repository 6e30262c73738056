"""Frames and sound into one mp4, as a stream; the JSON record beside it."""

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from stableavatar import ffmpeg
from stableavatar.files import uninterrupted, write_whole

GENERATED = "AI-generated video made with StableAvatar"
FRAME_FILES = "frame_*.png"
# A fixed number, because x264's output depends on it: a video is the same on every machine.
ENCODER_THREADS = "4"
# BT.601 is said and used: readers that ignore the tag assume it, those that heed it are right as well.
TO_YUV = "scale=out_color_matrix=bt601:out_range=tv:flags=bicubic+accurate_rnd+full_chroma_int+bitexact,format=yuv420p"
COLOURS = "setparams=range=tv:colorspace=smpte170m:color_primaries=bt709:color_trc=iec61966-2-1"
ENCODE = [
    *("-vf", f"{TO_YUV},{COLOURS}", "-c:v", "libx264", "-preset", "medium", "-crf", "17"),
    *("-threads", ENCODER_THREADS, "-flags:v", "+bitexact", "-f", "mp4"),
]
# Nothing that varies from run to run is written; a packet waits for its turn, however late the other stream is.
CONTAINER = [
    *("-map", "0:v", "-c:v", "copy", "-max_interleave_delta", "0", "-map_metadata", "-1", "-map_chapters", "-1"),
    *("-fflags", "+bitexact", "-flags:v", "+bitexact", "-flags:a", "+bitexact", "-movflags", "+faststart", "-f", "mp4"),
]


def sound_arguments(seconds: float) -> list[str]:
    """Encode the second input's sound, exactly `seconds` of it, silence after its end.

    Time counts from the first sample, as in `AudioTrack` (in a video the sound may start late). Layouts that AAC lacks are
    mixed to one that it has.
    """
    exact = f"asetpts=N/SR/TB,aformat=channel_layouts=mono|stereo|5.1|7.1,apad,atrim=duration={seconds:.6f}"
    return ["-map", "1:a:0", "-af", exact, "-c:a", "aac", "-b:a", "192k"]


class VideoWriter:
    """Streams frames and a sound file into an mp4 (H.264, yuv420p, faststart, AAC) that lasts frames / fps seconds.

    A context manager: the file takes its name when the block ends well. After an exception or Ctrl-C nothing is left of it,
    and a file that had the name before is untouched. The same frames, sound and settings give the same bytes.

    Args:
        path: the mp4; missing folders are made.
        width, height: pixels, even.
        fps: frames per second.
        sound: audio or video file whose sound goes into the video, cut or followed by silence to the video's length.
        metadata: added as "key=value" to the comment tag, which also says that the video is generated.
        frames_dir: folder for the frames as frame_0.png, frame_1.png, ...; it may not hold such files yet.

    Raises:
        ValueError: bad size or rate, sound without a stream, a place that cannot be written or is full, frames of another video
            in frames_dir, no frames at all.
    """

    def __init__(
        self,
        path: str | Path,
        width: int,
        height: int,
        fps: float,
        sound: str | Path | None = None,
        metadata: Mapping[str, Any] | None = None,
        frames_dir: str | Path | None = None,
    ) -> None:
        self.path = Path(path)
        self.frames_dir = Path(frames_dir) if frames_dir is not None else None
        self.frames = 0
        self._shape = (height, width, 3)
        self._fps = fps
        self._sound = None if sound is None else ffmpeg.existing_file(sound, "audio")
        self._comment = "; ".join([GENERATED, *(f"{key}={value}" for key, value in (metadata or {}).items())])
        self._check()
        # The sound can be fitted only when the number of frames is known, so it is added at the end, without encoding again.
        self._silent, self._part = (self.path.with_name(f".{self.path.stem}.{what}.mp4") for what in ("silent", "part"))
        with ExitStack() as undo:
            self._reserve(undo)
            self._log = undo.enter_context(tempfile.TemporaryFile())
            pixels = ["-f", "rawvideo", "-pixel_format", "rgb24", "-video_size", f"{width}x{height}", "-framerate", str(fps)]
            arguments = ffmpeg.command(*pixels, "-i", "pipe:0", *ENCODE, "-y", f"file:{self._silent}")
            # Its own session: Ctrl-C reaches only us, and we decide what becomes of the file.
            self._ffmpeg = subprocess.Popen(arguments, stdin=subprocess.PIPE, stderr=self._log, start_new_session=True)
            undo.callback(self._kill)
            self._undo = undo.pop_all()

    def write(self, frames: np.ndarray | torch.Tensor) -> None:
        """Appends frames, uint8 [n, height, width, 3] RGB."""
        pixels = frames.cpu().numpy() if isinstance(frames, torch.Tensor) else frames
        assert pixels.dtype == np.uint8 and pixels.shape[1:] == self._shape, (pixels.dtype, pixels.shape, self._shape)
        try:
            if self.frames_dir is not None:
                self._write_images(pixels)
            if len(pixels):
                self._ffmpeg.stdin.write(np.ascontiguousarray(pixels).data)
        except BrokenPipeError:
            raise self._failure() from None
        except OSError as error:
            raise ValueError(f"cannot write {self.frames_dir}: {error.strerror}; choose a writable place with room") from None
        self.frames += len(pixels)

    def __enter__(self) -> "VideoWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *details: object) -> None:
        try:
            if kind is None:
                self._finish()
                self._undo.pop_all()
                self._log.close()
        finally:
            with uninterrupted():
                self._undo.close()

    def _check(self) -> None:
        height, width, _ = self._shape
        if width < 2 or height < 2 or width % 2 or height % 2:
            raise ValueError(f"got a video size of {width}x{height}; width and height must be positive and even")
        if not self._fps > 0:
            raise ValueError(f"got {self._fps} frames per second; expected a positive number")
        if self.path.suffix.lower() != ".mp4":
            raise ValueError(f"got the output {self.path}; expected a name that ends in .mp4")
        if self.path.is_dir():
            raise ValueError(f"cannot write {self.path}: it is a folder; give the name of an mp4 file")
        if self.frames_dir is not None:
            check_frames_dir(self.frames_dir)
        if self._sound is not None:
            ffmpeg.probe_audio(self._sound)

    def _reserve(self, undo: ExitStack) -> None:
        """Makes the folders and empty files under temporary names, so that what cannot be written is known at once."""
        try:
            _make_folder(self.path.parent, undo)
            for part in (self._silent, self._part):
                undo.callback(part.unlink, missing_ok=True)
                part.unlink(missing_ok=True)  # a killed run's; its ffmpeg may still be writing to it
                part.touch(exist_ok=False)
            if self.frames_dir is not None:
                _make_folder(self.frames_dir, undo)
                shutil.rmtree(self._images, ignore_errors=True)  # a killed run's
                self._images.mkdir()
                undo.callback(shutil.rmtree, self._images, ignore_errors=True)
        except OSError as error:
            raise ValueError(f"cannot write {self.path}: {error.strerror} ({error.filename}); choose a writable place") from None

    @property
    def _images(self) -> Path:
        """Where frames wait until the video is whole."""
        return self.frames_dir / ".unfinished"

    def _write_images(self, pixels: np.ndarray) -> None:
        for index, frame in enumerate(pixels, self.frames):
            Image.fromarray(frame).save(self._images / f"frame_{index}.png", compress_level=1)

    def _finish(self) -> None:
        if not self.frames:
            raise ValueError(f"no frames were written to {self.path}; a video needs at least one")
        try:
            self._ffmpeg.stdin.close()
        except BrokenPipeError:
            raise self._failure() from None
        if self._ffmpeg.wait():
            raise self._failure()
        self._add_sound()
        self._silent.unlink()
        if self.frames_dir is not None:
            for image in self._images.iterdir():
                os.replace(image, self.frames_dir / image.name)
            self._images.rmdir()
        os.replace(self._part, self.path)

    def _add_sound(self) -> None:
        inputs, sound = ffmpeg.file_input(self._silent), []
        if self._sound is not None:
            inputs += ffmpeg.file_input(self._sound)
            sound = sound_arguments(self.frames / self._fps)
        tag = ["-metadata", f"comment={self._comment}"]
        arguments = [*inputs, *CONTAINER, *sound, *tag, "-y", f"file:{self._part}"]
        if subprocess.run(ffmpeg.command(*arguments), stderr=self._log, start_new_session=True).returncode:
            raise self._failure()

    def _failure(self) -> ValueError:
        self._ffmpeg.wait()
        self._log.seek(0)
        log = self._log.read().decode(errors="replace")
        return ValueError(f"cannot write {self.path}: ffmpeg failed ({ffmpeg.reason(log)}); choose a writable place with room")

    def _kill(self) -> None:
        self._ffmpeg.kill()
        self._ffmpeg.wait()
        with suppress(BrokenPipeError):  # what was still buffered has nobody to go to
            self._ffmpeg.stdin.close()


def check_frames_dir(folder: Path) -> None:
    """ValueError if frames of another video lie in `folder`: a longer one's would stay among the new ones."""
    if next(folder.glob(FRAME_FILES), None):
        raise ValueError(f"frames_dir {folder} already holds frames ({FRAME_FILES}); remove them or give another folder")


def _make_folder(folder: Path, undo: ExitStack) -> None:
    """Makes a folder and its parents; `undo` removes those that are new, if they are empty."""
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    for path in reversed(new):
        path.mkdir(exist_ok=True)
        undo.callback(_remove_if_empty, path)
    if not folder.is_dir():
        raise NotADirectoryError(20, "it is not a folder", str(folder))


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


def sidecar_path(path: str | Path) -> Path:
    """Where the record of the video `path` goes: out.mp4 -> out.json."""
    return Path(path).with_suffix(".json")


def write_sidecar(path: str | Path, record: Mapping[str, Any]) -> Path:
    """Writes `record` as JSON next to the video `path` (out.mp4 -> out.json), whole or not at all; returns its path.

    Values that JSON does not know (paths, types) are written as their text. ValueError where it cannot be written.
    """
    target = sidecar_path(path)
    text = json.dumps(record, indent=2, default=str, ensure_ascii=False) + "\n"
    write_whole(target, lambda part: part.write_text(text, encoding="utf-8"))
    return target

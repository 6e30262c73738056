"""Images and sound from files of any kind, and the video writer (see `video_writer`)."""

import logging
import subprocess
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Literal

import numpy as np
import soundfile
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from stableavatar import ffmpeg
from stableavatar.geometry import FPS, SAMPLE_RATE
from stableavatar.video_writer import VideoWriter, write_sidecar

__all__ = ["AudioTrack", "Fit", "VideoWriter", "crop_image", "fit_image", "from_pixels", "read_image", "to_pixels", "write_sidecar"]

logger = logging.getLogger(__name__)

Fit = Literal["crop", "pad", "stretch"]

UNREADABLE_IMAGE = (OSError, SyntaxError, ValueError, TypeError, RuntimeError, EOFError, Image.DecompressionBombError)
"""What Pillow's readers of the several formats were seen to raise for damaged files."""
EXIF_ORIENTATION = 0x0112
SILENT_PEAK = 1e-4
"""-80 dB: below the noise of any microphone."""
SCAN_SAMPLES = 1 << 20
OGG_PAGE = 65_307
"""Bytes of the largest page of an Ogg file (RFC 3533)."""
OGG_HEADER = 27
OGG_END = 0x04
"""Flag in the sixth byte of the last page of a stream."""


def read_image(path: str | Path, quiet: bool = False, backdrop: str = "white") -> Image.Image:
    """An image file as RGB: upright, 8 bit, transparency on a backdrop (each change is logged; at debug level if `quiet`).

    Floating-point grey of at most 1 is taken for 0..1, else for 0..255.

    Raises:
        ValueError: missing, not an image, truncated, NaN or infinite pixels.
    """
    level = logging.DEBUG if quiet else logging.INFO
    path = ffmpeg.existing_file(path, "image")
    try:
        with Image.open(path) as image:
            sixteen_bit = ";16" in f"{image.mode} {image.tile}" or image.mode == "I"
            frames = getattr(image, "n_frames", 1)
            image.load()
            upright = ImageOps.exif_transpose(image)
            turned = image.getexif().get(EXIF_ORIENTATION, 1) != 1
    except UnidentifiedImageError:
        raise ValueError(f"cannot read image {path}: not an image; give a PNG, JPEG, WebP or similar file") from None
    except UNREADABLE_IMAGE as error:
        raise ValueError(f"cannot read image {path}: damaged or truncated ({error}); give a whole file") from None
    for happened, what in [
        (turned, "turned as its EXIF orientation says"),
        (sixteen_bit, "16 bit reduced to 8 bit"),
        (frames > 1, f"the first of its {frames} frames is used"),
    ]:
        if happened:
            logger.log(level, "image %s: %s", path, what)
    return _to_rgb(upright, path, level, backdrop)


def _to_rgb(image: Image.Image, path: Path, level: int, backdrop: str) -> Image.Image:
    if image.mode == "F":
        logger.log(level, "image %s: its floating-point pixels are reduced to 8 bit", path)
        image = _from_floats(np.asarray(image), path)
    if image.mode.startswith("I"):  # Pillow's own conversion clips 16-bit grey instead of scaling it
        image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        below = Image.new("RGBA", layer.size, backdrop)
        if layer.getchannel("A").getextrema()[0] < 255:
            logger.log(level, "image %s: its transparent parts are placed on %s", path, backdrop)
        return Image.alpha_composite(below, layer).convert("RGB")
    if image.mode != "RGB":
        logger.log(level, "image %s: converted from %s to RGB", path, image.mode)
    return image.convert("RGB")


def _from_floats(pixels: np.ndarray, path: Path) -> Image.Image:
    if not np.isfinite(pixels).all():
        raise ValueError(f"image {path} holds NaN or infinite pixels; repair or re-export it")
    scale = 255 if pixels.max() <= 1 else 1
    return Image.fromarray((pixels * scale).clip(0, 255).round().astype(np.uint8))


def fit_image(image: Image.Image, width: int, height: int, fit: Fit = "crop") -> torch.Tensor:
    """Resize with antialiasing to [3, height, width], float32 in [-1, 1].

    Args:
        image: RGB.
        fit: "crop" keeps the aspect and the centre, "pad" keeps the aspect and adds black bars, "stretch" keeps neither.

    Raises:
        ValueError: a size that is not positive, an unknown fit.
    """
    if width < 1 or height < 1:
        raise ValueError(f"got a size of {width}x{height}; width and height must be positive")
    if fit not in ("crop", "pad", "stretch"):
        raise ValueError(f"got fit={fit!r}; expected crop, pad or stretch")
    if image.width < width or image.height < height:
        logger.info("the image of %dx%d is smaller than %dx%d: details will be soft", *image.size, width, height)
    placed = {"crop": crop_image, "pad": _pad, "stretch": _stretch}[fit](image, width, height)
    return from_pixels(torch.from_numpy(np.array(placed))).permute(2, 0, 1).contiguous()


def from_pixels(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 of any shape -> float32 in [-1, 1]."""
    return pixels.float() / 127.5 - 1


def to_pixels(values: torch.Tensor) -> torch.Tensor:
    """Values in [-1, 1] of any shape -> uint8, rounded."""
    return ((values + 1) * 127.5).round().to(torch.uint8)


def _stretch(image: Image.Image, width: int, height: int) -> Image.Image:
    return image.resize((width, height), Image.Resampling.LANCZOS)


def crop_image(
    image: Image.Image, width: int, height: int, resample: Image.Resampling = Image.Resampling.LANCZOS
) -> Image.Image:
    """The largest part of the aspect width:height in the middle, resized; the image itself where its size fits."""
    scale = max(width / image.width, height / image.height)
    left, top = (image.width - width / scale) / 2, (image.height - height / scale) / 2
    box = (max(0, left), max(0, top), min(image.width, image.width - left), min(image.height, image.height - top))
    return image.resize((width, height), resample, box=box)


def _pad(image: Image.Image, width: int, height: int) -> Image.Image:
    scale = min(width / image.width, height / image.height)
    inner = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    canvas = Image.new("RGB", (width, height))
    canvas.paste(_stretch(image, *inner), ((width - inner[0]) // 2, (height - inner[1]) // 2))
    return canvas


class AudioTrack:
    """The sound of any audio or video file as 16 kHz mono, kept in a temporary file: memory does not grow with length.

    Args:
        path: file of any format, rate and channel count; of several audio streams the first is taken.
        quiet: log at debug level only, for a file whose oddities were told before.

    Raises:
        ValueError: missing, unreadable, empty or truncated file, no audio stream, NaN or infinite samples. Known limit: a format
            that does not state its length (AAC in ADTS, an mp3 without a Xing or LAME header) cannot be seen to be truncated.
    """

    def __init__(self, path: str | Path, quiet: bool = False) -> None:
        self._level = logging.DEBUG if quiet else logging.WARNING
        self.path = ffmpeg.existing_file(path, "audio")
        with ExitStack() as undo:
            # Without a name: nothing is left behind, even by SIGKILL.
            self._file: IO[bytes] = undo.enter_context(tempfile.TemporaryFile())
            stream = self._copy() if _is_as_kept(self.path) else self._decode()
            self.samples = self._file.seek(0, 2) // 4
            self._check(stream)
            undo.pop_all()

    @property
    def duration(self) -> float:
        """Seconds."""
        return self.samples / SAMPLE_RATE

    def read(self, start: int, stop: int) -> np.ndarray:
        """Samples start..stop, float32 [stop - start]; zeros outside the track."""
        assert start <= stop, (start, stop)
        out = np.zeros(stop - start, np.float32)
        first, last = max(start, 0), min(stop, self.samples)
        if first < last:
            self._file.seek(4 * first)
            out[first - start : last - start] = np.frombuffer(self._file.read(4 * (last - first)), "<f4")
        return out

    def close(self) -> None:
        """Removes the temporary file."""
        self._file.close()

    def __enter__(self) -> "AudioTrack":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _copy(self) -> ffmpeg.AudioStream:
        with soundfile.SoundFile(self.path) as file:
            for block in file.blocks(SCAN_SAMPLES, dtype="float32"):
                self._file.write(block.astype("<f4").tobytes())
            return ffmpeg.AudioStream(SAMPLE_RATE, "mono", file.frames / SAMPLE_RATE)

    def _decode(self) -> ffmpeg.AudioStream:
        stream = ffmpeg.probe_audio(self.path)
        if missing := ffmpeg.missing_wav_bytes(self.path):
            raise ValueError(f"audio {self.path} is truncated: {missing} bytes of what its header promises are missing")
        if _is_cut_ogg(self.path):
            raise ValueError(f"audio {self.path} is truncated: its last Ogg page is not marked as the end; give a whole file")
        # The limit of 1 makes mono the mean of the channels; ffmpeg's own weights are louder.
        mono = ["-map", "0:a:0", "-ac", "1", "-rematrix_maxval", "1", "-ar", str(SAMPLE_RATE)]
        arguments = ffmpeg.command(*ffmpeg.file_input(self.path), *mono, "-f", "f32le", "pipe:1")
        run = subprocess.run(arguments, stdout=self._file, stderr=subprocess.PIPE)
        log = run.stderr.decode(errors="replace")
        if run.returncode:
            raise ValueError(f"cannot decode audio {self.path}: {ffmpeg.reason(log)}")
        if any(words in log for words in ffmpeg.TRUNCATED):
            raise ValueError(f"audio {self.path} is truncated: {ffmpeg.reason(log)}; give a whole file")
        if log.strip():
            logger.log(self._level, "audio %s is damaged in places: %s", self.path, ffmpeg.reason(log))
        return stream

    def _check(self, stream: ffmpeg.AudioStream) -> None:
        if not self.samples:
            raise ValueError(f"audio {self.path} is empty: it holds no samples")
        # Encoders pad and trim the ends of a track by some frames, so only more than that is a loss.
        if stream.duration is not None and self.duration < stream.duration * 0.99 - 0.25:
            promised = f"its header promises {stream.duration:.2f} s, it holds {self.duration:.2f} s"
            raise ValueError(f"audio {self.path} is truncated: {promised}; give a whole file")
        silent = self._peak() < SILENT_PEAK
        for happened, what in [
            (silent, "it is silent; the face will not speak"),
            (self.duration < 1 / FPS, f"{self.duration:.3f} s is less than one video frame ({1 / FPS} s)"),
            (stream.rate < SAMPLE_RATE, f"{stream.rate} Hz is raised to {SAMPLE_RATE} Hz; its treble is missing"),
            (stream.layout not in ("mono", "stereo", "1 channels", "2 channels"), f"{stream.layout} is mixed to mono"),
        ]:
            if happened:
                logger.log(self._level, "audio %s: %s", self.path, what)

    def _peak(self) -> float:
        """Largest magnitude of the whole track; ValueError if a sample is not a finite number."""
        peak = 0.0
        for start in range(0, self.samples, SCAN_SAMPLES):
            peak_here = np.abs(self.read(start, min(start + SCAN_SAMPLES, self.samples))).max()
            if not np.isfinite(peak_here):
                raise ValueError(f"audio {self.path} holds NaN or infinite samples; repair or re-export it")
            peak = max(peak, float(peak_here))
        return peak


def _is_as_kept(path: Path) -> bool:
    """Whether it is a whole WAV of 16 kHz mono, as data sets have them: read without ffmpeg, whose two starts take a tenth of a second."""
    with path.open("rb") as file:
        if file.read(4) != b"RIFF" or ffmpeg.missing_wav_bytes(path):
            return False
    try:
        found = soundfile.info(path)
    except soundfile.LibsndfileError:
        return False
    usual = found.subtype in ("PCM_16", "PCM_24", "FLOAT")
    return usual and (found.samplerate, found.channels) == (SAMPLE_RATE, 1) and found.frames > 0  # 0: perhaps written into a pipe


def _is_cut_ogg(path: Path) -> bool:
    """True for an Ogg file that ends before a page which is whole and marked as the end; False for any other file."""
    with path.open("rb") as file:
        if file.read(4) != b"OggS":
            return False
        file.seek(max(0, path.stat().st_size - OGG_PAGE))
        tail = file.read()
    page = tail[tail.rfind(b"OggS") :]
    if len(page) < OGG_HEADER or not page[5] & OGG_END:
        return True
    lengths = page[OGG_HEADER : OGG_HEADER + page[26]]
    return len(page) < OGG_HEADER + page[26] + sum(lengths)

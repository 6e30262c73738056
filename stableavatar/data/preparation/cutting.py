"""One stretch of a raw file becomes sub_clip.mp4 and audio.wav: even rate, cropped and scaled, picture and sound in step to the sample."""

import subprocess
from pathlib import Path
from typing import Any

from stableavatar import ffmpeg
from stableavatar.data.clips import SOUND, VIDEO
from stableavatar.data.preparation.crops import ClipConfig, Crop
from stableavatar.data.preparation.decoding import Entry, entry, grid_filter
from stableavatar.data.preparation.records import Segment, Source
from stableavatar.files import hash_file, replacing
from stableavatar.geometry import SAMPLE_RATE, frame_samples

GAP = 0.02
"""Seconds by which the times of the sound may jump before silence fills the gap (or an overlap is cut): half a frame."""
LISTENING_RATE = 48_000
"""Of the sound in sub_clip.mp4, which is for people; training hears audio.wav."""
HARMLESS = ("mmco:", "non monotonically", "non-monotonic", "number of reference frames")
"""Words of ffmpeg's complaints about streams that are shown as they should be all the same."""
MONO = f"aresample={SAMPLE_RATE}:ochl=mono:rematrix_maxval=1:osf=s16"
"""All channels at 16 kHz, weighted so that their sum cannot clip: the mean of two; of 5.1, more of the middle, where voices are."""
PLAIN = ["-map_metadata", "-1", "-map_chapters", "-1", "-fflags", "+bitexact", "-flags", "+bitexact"]
"""Nothing but the pictures and the sound decides the bytes."""


def clip_frames(segment: Segment, fps: float) -> int:
    """Frames of the clip of a stretch."""
    return round((segment.end - segment.start) * fps)


def cut(segment: Segment, source: Source, path: Path, crop: Crop, config: ClipConfig, folder: Path) -> dict[str, Any]:
    """Write sub_clip.mp4 and audio.wav into `folder`.

    Frame j shows the picture of segment.start + j / fps (see `decoding`), and the first sample is heard at segment.start. The wav holds
    exactly frames / fps seconds of all channels mixed at 16 kHz, with silence where the file has no sound.

    Returns:
        width, height, fps, frames; video_sha256, audio_sha256.

    Raises:
        ValueError: the stretch is damaged.
        OSError: it cannot be written.
    """
    frames = clip_frames(segment, config.fps)
    place, video, wav = entry(source, path, segment.start), folder / VIDEO, folder / SOUND
    graph = f"[0:V:0]{_picture(source, config.fps, place.at, crop)}[picture];{_sound(place, frames, config.fps)}"
    encode = ["-c:v", "libx264", "-preset", "fast", "-crf", str(config.crf), "-threads", "1", "-g", str(max(1, round(2 * config.fps)))]
    film = ["-map", "[picture]", "-map", "[listen]", "-frames:v", str(frames), "-fps_mode", "passthrough", *encode, "-c:a", "aac",
            "-b:a", "128k", "-movflags", "+faststart", *PLAIN, f"file:{video}"]
    voice = ["-map", "[voice]", "-c:a", "pcm_s16le", *PLAIN, f"file:{wav}"]
    log, failed = _run("-y", *place.arguments, "-filter_complex", graph, *film, *voice)
    if failed or len(log) > len(_errors_before(place)):
        _give_up(log, f"cannot cut {source.path} from {segment.start:.2f} to {segment.end:.2f} s")
    written = ffmpeg.probe_video(video).frames
    if written != frames:
        raise ValueError(f"{source.path} holds {written} of the {frames} pictures from {segment.start:.2f} s on; that stretch is damaged")
    sums = {"video_sha256": hash_file(video), "audio_sha256": hash_file(wav)}
    return {"width": crop.to_width, "height": crop.to_height, "fps": config.fps, "frames": frames} | sums


def _picture(source: Source, fps: float, at: float, crop: Crop) -> str:
    """Filters from the file's pictures to the clip's."""
    scale = f"scale={crop.to_width}:{crop.to_height}:flags=lanczos+accurate_rnd"
    return (f"{grid_filter(source, fps, at)},crop={crop.width}:{crop.height}:{crop.x}:{crop.y},{scale},setsar=1,format=yuv420p,"
            "setpts=PTS-STARTPTS")


def _run(*arguments: str) -> tuple[list[str], bool]:
    """Runs ffmpeg; what it complained of, a line each, and whether it failed."""
    run = subprocess.run(ffmpeg.command("-v", "repeat+error", *arguments), stderr=subprocess.PIPE)
    lines = run.stderr.decode(errors="replace").splitlines()
    return [line for line in lines if line.strip() and not any(word in line for word in HARMLESS)], run.returncode != 0


def _errors_before(place: Entry) -> list[str]:
    """What decoding complains of before the wanted time: a file that is entered in its middle often misses something at first.

    Whatever is damaged later must not be painted over with its neighbours or silence.
    """
    if place.at <= place.clock:
        return []
    return _run("-t", f"{place.at - place.clock:.6f}", *place.arguments, "-map", "0:V:0", "-map", "0:a:0", "-f", "null", "-")[0]


def _sound(place: Entry, frames: int, fps: float) -> str:
    """Filters from the file's sound to [listen] (stereo) and [voice] (16 kHz mono), both from the wanted time on for so many frames."""
    listen = f"aresample={LISTENING_RATE}:ochl=stereo,atrim=end={frames / fps:.6f}"
    voice = f"{MONO},atrim=end_sample={frame_samples(frames, fps)}"
    return f"[0:a:0]{_on_time(place.clock)},apad,{_from(place.at - place.clock)},asplit[a][b];[a]{listen}[listen];[b]{voice}[voice]"


def _on_time(clock: float) -> str:
    """Filters that put a sound onto its own times, from where the file's clock shows `clock`.

    A track that starts late begins with silence, and a gap in it stays one.
    """
    return f"asetpts=PTS-{clock:.6f}/TB,aresample=async=1:min_hard_comp={GAP}:first_pts=0"


def _from(seconds: float) -> str:
    return f"atrim=start={seconds:.6f},asetpts=PTS-STARTPTS"


def extract_sound(path: Path, target: Path) -> None:
    """Write the whole sound of a file as 16 kHz mono, from the time of its first picture on if it has pictures.

    Raises:
        ValueError: it has no sound that can be read.
        OSError: `target` cannot be written.
    """
    ffmpeg.existing_file(path, "audio")
    ffmpeg.probe_audio(path)
    clock = ffmpeg.clock_start(ffmpeg.header(path, "audio"))
    picture = ffmpeg.clock_span(path, "V:0")
    start = picture[0] if picture else clock
    with replacing(target) as part:
        sound = ["-map", "0:a:0", "-af", f"{_on_time(clock)},{_from(start - clock)},{MONO}", "-c:a", "pcm_s16le", *PLAIN, "-f", "wav"]
        log, failed = _run("-y", "-copyts", *ffmpeg.file_input(path), *sound, f"file:{part}")
        if failed:
            _give_up(log, f"cannot extract the sound of {path}")


def _give_up(log: list[str], what: str) -> None:
    """Raises what fits ffmpeg's reason for having failed."""
    if any("No space left" in line for line in log):
        raise OSError(f"{what}: no space left; make room and run again")
    raise ValueError(f"{what}: {ffmpeg.reason(chr(10).join(log))}; it may be damaged there")

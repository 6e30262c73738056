"""Test sets: which videos of a public set, which stretch and crop of them, become the cases of an experiment.

A set is a YAML of configs/evaluation/sets. Its cases are written to a folder that `pairs` and `experiments` read: NAME.mp4 (the true
video), NAME.png (the portrait), NAME.wav (the voice), NAME.txt (the prompt), and cases.json, which says where each comes from.
Self-driven reconstruction takes the first frame of a true video for the portrait, and its own sound for the voice.
"""

import hashlib
import json
import logging
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from stableavatar import ffmpeg
from stableavatar.config import Config, load_config, override, setting
from stableavatar.data.clips import PROMPTS, SOUND, VIDEO
from stableavatar.evaluation.pairs import files_by_case
from stableavatar.files import replacing, write_json
from stableavatar.media import AudioTrack
from stableavatar.workers import worker_pool

logger = logging.getLogger(__name__)

CASES = "cases.json"
CLIPS = ".clips"
"""Folder, in that of the cases, of all clips that the set could be chosen from."""


@dataclass
class SetConfig(Config):
    """What a test set is."""

    name: str = setting("", "of the set, as published rows name it")
    about: str = setting("", "which videos it is of, where they are published, what the papers say of the choice")
    protocol: str = setting("self_driven", "self_driven: cases are cut out of true videos, whose first frame is the portrait and whose own "
                            "sound is the voice; given: they lie in data as NAME.png and NAME.wav, perhaps with NAME.txt and NAME.mp4",
                            choices=("self_driven", "given"))
    public: str = setting("", "reader of the set's annotations (docs/data_preparation.md): hdtf, avspeech, celebv_hq; empty for none")
    annotations: str = setting("", "what it reads, in data")
    table: str = setting("", "own list: a csv in data with path, start, end (seconds), perhaps x0, y0, x1, y1 of each case; empty for none")
    count: int = setting(100, "cases; 0 for all that there are", low=0)
    per_video: int = setting(1, "cases of the same video, at most", low=1)
    seed: int = setting(0, "of the choice: the same videos and seed give the same cases, and a video that is missing changes only its own",
                        low=0)
    min_seconds: float = setting(5.0, "shortest case", low=0.04)
    max_seconds: float = setting(20.0, "longest case; self_driven: at least twice min_seconds", low=0.04)
    frames: int = setting(0, "every case is cut to its first so many frames; 0 for as long as it is", low=0)
    fps: float = setting(25.0, "frames per second of the true videos and of what is generated", low=1, high=120)
    size: str = setting("square", "of the true videos: square (512x512), vec (480x832), rec (832x480) or WIDTHxHEIGHT")
    heads: str = setting("main", "crop: around the main person's head, around all heads, or the middle (none)",
                         choices=("main", "all", "none"))
    detector: str = setting("adaptive", "of shot boundaries within a video; none takes the files, or the list's stretches, as they are",
                            choices=("adaptive", "content", "none"))

    def check(self) -> None:
        """Raise ValueError if the set has no name or its lengths contradict each other."""
        if not self.name:
            raise ValueError("name is missing: what is the set called?")
        if self.min_seconds > self.max_seconds:
            raise ValueError(f"min_seconds must not exceed max_seconds, got {self.min_seconds:g} and {self.max_seconds:g}")


@dataclass(frozen=True)
class Candidate:
    """A stretch that could become a case.

    Attributes:
        name: of the case's files. source: the video it is of; start: where in it, seconds. key: what the choice goes by.
        files: "video", "image", "audio", "prompt" -> file, as far as there are.
        prompt: where there is no file with one.
    """

    name: str
    source: str
    start: float
    key: str
    files: dict[str, Path]
    prompt: str = ""


def load_set(path: str, words: Sequence[str] = ()) -> SetConfig:
    """The set of a YAML, some of its settings perhaps replaced. Raises ValueError if it is not one."""
    try:
        return load_config(SetConfig, path, words)
    except ValueError as error:
        raise ValueError(f"set {path}: {error}") from None


def write_cases(test_set: SetConfig, data: Path, out: Path, workers: int = 1) -> int:
    """Writes the cases of a set into `out`, in place of those that are there; started again it goes on where it was.

    Returns:
        1 if something could not be written and the same has to be run again, else 0

    Raises:
        ValueError: no folder `data`, nothing in it that fits, or annotations that cannot be read.
    """
    if not data.is_dir():
        raise ValueError(f"data must be the folder that {test_set.name} was downloaded to, got {str(data)!r}; {test_set.about}")
    failed, candidates = _cut(test_set, data, out / CLIPS, workers) if test_set.protocol == "self_driven" else (0, _given(test_set, data))
    chosen = choose(candidates, test_set)
    if not chosen:
        lengths = f"{test_set.min_seconds:g} to {test_set.max_seconds:g} s"
        raise ValueError(f"nothing in {data} fits {test_set.name} ({lengths}); {test_set.about}")
    if test_set.count and len(chosen) < test_set.count:
        logger.warning("%s has %d cases, here are %d: figures are of fewer than published", test_set.name, test_set.count, len(chosen))
    _remove_others(out, {candidate.name for candidate in chosen})
    rows = [_write_case(candidate, test_set, out) for candidate in chosen]
    write_json(out / CASES, {"set": asdict(test_set), "cases": rows})
    logger.info("%d cases of %s in %s", len(rows), test_set.name, out)
    return failed


def choose(candidates: Iterable[Candidate], test_set: SetConfig) -> list[Candidate]:
    """`count` cases, sorted by name, `per_video` of a video at most, in an order that only the seed and their own keys decide."""
    taken: dict[str, int] = {}
    found = []
    for candidate in sorted(candidates, key=lambda one: hashlib.sha256(f"{test_set.seed} {one.key}".encode()).digest()):
        if taken.get(candidate.source, 0) < test_set.per_video:
            taken[candidate.source] = taken.get(candidate.source, 0) + 1
            found.append(candidate)
    return sorted(found[: test_set.count or None], key=lambda candidate: candidate.name)


def _cut(test_set: SetConfig, data: Path, out: Path, workers: int) -> tuple[int, list[Candidate]]:
    """All clips of the raw videos that fit the set, cut by data preparation (see docs/data_preparation.md), and its exit code."""
    # Slow to import, and not needed by those who only read cases.
    from stableavatar.data.preparation.labels import read_table
    from stableavatar.data.preparation.settings import PrepareConfig
    from stableavatar.data.preparation.state import Store
    from stableavatar.data.preparation.steps import prepare
    from stableavatar.data.preparation.walk import Preparation

    # What somebody has chosen is taken as it is: nothing is trimmed, nor left out because nobody moves.
    exact = {"cuts.trim": 0, "cuts.still_seconds": 0, "cuts.black": 0} if test_set.detector == "none" else {}
    config = override(PrepareConfig(), exact | {
        "raw": str(data), "out": str(out), "steps": "inventory cuts crop", "workers": workers,
        "table": str(data / test_set.table) if test_set.table else "",
        "public.name": test_set.public, "public.path": str(data / test_set.annotations) if test_set.public else "",
        "cuts.detector": test_set.detector, "cuts.min_seconds": test_set.min_seconds, "cuts.max_seconds": test_set.max_seconds,
        "clip.fps": test_set.fps, "clip.buckets": test_set.size, "clip.heads": test_set.heads, "clip.upsampling": 100,
    })  # fmt: skip
    failed = prepare(config)
    with worker_pool(1) as share:
        clips = [clip for clip, _ in Preparation(config, Store(out), share, read_table(config.table) if config.table else {}).finished()]
    found = []
    for clip in clips:
        written = data / Path(clip.source.path).with_suffix(".txt")
        files = {"video": clip.folder / VIDEO, "audio": clip.folder / SOUND} | ({"prompt": written} if written.is_file() else {})
        key = f"{Path(clip.source.path).stem} {clip.segment.start:.2f}"
        prompt = PROMPTS[clip.folder.parent.name]
        found.append(Candidate(clip.id, clip.source.path, clip.segment.start, key, files, prompt))
    return failed, found


def _given(test_set: SetConfig, data: Path) -> list[Candidate]:
    """The portraits with voices of a fitting length that lie in a folder."""
    found = []
    for name, files in files_by_case(data).items():
        if {"image", "audio"} <= files.keys() and test_set.min_seconds <= _seconds(files["audio"]) <= test_set.max_seconds:
            written = data / f"{name}.txt"
            found.append(Candidate(name, name, 0.0, name, files | ({"prompt": written} if written.is_file() else {})))
    return found


def _seconds(path: Path) -> float:
    with AudioTrack(path, quiet=True) as track:
        return track.duration


def _remove_others(out: Path, names: set[str]) -> None:
    """Removes the files of cases that an earlier choice had; others of the user's are told apart by cases.json."""
    for case in read_cases(out)["cases"]:
        if case["name"] not in names:
            for file in [path for path in out.iterdir() if path.is_file() and path.stem == case["name"]]:
                file.unlink()


def _write_case(candidate: Candidate, test_set: SetConfig, out: Path) -> dict[str, Any]:
    """Writes the files of a case; its row of cases.json."""
    out.mkdir(parents=True, exist_ok=True)
    files, limit = candidate.files, test_set.frames / test_set.fps
    for kind in ("video", "audio"):
        if kind in files:
            _copy(files[kind], out / f"{candidate.name}{files[kind].suffix}", test_set.frames, limit)
    portrait = out / f"{candidate.name}.png"
    if "image" in files:
        portrait = out / f"{candidate.name}{files['image'].suffix}"
        shutil.copyfile(files["image"], portrait)
    else:
        write_first_frame(out / f"{candidate.name}.mp4", portrait)
    prompt = files["prompt"].read_text(encoding="utf-8").strip() if "prompt" in files else candidate.prompt
    (out / f"{candidate.name}.txt").write_text(f"{prompt}\n", encoding="utf-8")
    seconds = _seconds(out / f"{candidate.name}{files['audio'].suffix}")
    return {"name": candidate.name, "source": candidate.source, "start": candidate.start, "seconds": round(seconds, 3), "prompt": prompt}


def _copy(source: Path, target: Path, frames: int, seconds: float) -> None:
    """Copies a video or a sound, or the beginning of it. Raises ValueError if it cannot be cut."""
    with replacing(target) as part:
        if not frames:
            shutil.copyfile(source, part)
            return
        video = ["-frames:v", str(frames), "-c:v", "libx264", "-crf", "12", "-c:a", "aac", "-f", "mp4"]
        sound = ["-map", "0:a:0", "-c:a", "pcm_s16le", "-f", "wav"]
        kind = video if target.suffix == ".mp4" else sound
        run = subprocess.run(ffmpeg.command(*ffmpeg.file_input(source), "-t", f"{seconds:.6f}", *kind, "-y", f"file:{part}"),
                             stderr=subprocess.PIPE)  # fmt: skip
        if run.returncode:
            raise ValueError(f"cannot cut {source}: {ffmpeg.reason(run.stderr.decode(errors='replace'))}")


def write_first_frame(video: Path, target: Path) -> None:
    """Writes the first frame of a video as PNG. Raises ValueError if it cannot be decoded."""
    stream = ffmpeg.probe_video(video)

    def wrong(count: int, why: str) -> str | None:
        return None if count else f"cannot read the first frame of {video}: {why}"

    frames = ffmpeg.raw_frames([*ffmpeg.file_input(video), "-map", "0:V:0", "-frames:v", "1"], stream.width, stream.height, wrong)
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing(target) as part:
        Image.fromarray(next(frames)).save(part, format="png")
    frames.close()


def read_cases(folder: Path) -> dict[str, Any]:
    """cases.json of a folder of cases; an empty set without cases where there is none. Raises ValueError if it is damaged."""
    path = folder / CASES
    if not path.exists():
        return {"set": {}, "cases": []}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {"set": dict(content["set"]), "cases": list(content["cases"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"cannot read {path}: {error}; run the step cases again") from None

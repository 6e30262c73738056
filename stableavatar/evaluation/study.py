"""A blind user study (section 4.4 of the paper, table 7): pages on which people choose between two videos, and what their answers say.

    study/study.html, clip_001.mp4, ...   what participants get; nothing in it says which model made a clip
    study_key.json                        which did; not for participants

A trial shows the reference image and the sound of a case, one video of ours and one of another model, and asks table 7's four questions.
Trials come in FORMS orders; in every second form all sides are those of the one before it, swapped, so that no model has a better side.
"""

import hashlib
import json
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from stableavatar import ffmpeg
from stableavatar.evaluation.pairs import Pair
from stableavatar.evaluation.side_by_side import by_case, case_panels
from stableavatar.files import filling, write_json
from stableavatar.pages import render
from stableavatar.video_writer import CONTAINER, sound_arguments

PAGE, KEY = "study.html", "study_key.json"
QUESTIONS = {
    "L-A": "Which one has better lip alignment with the audio?",
    "A-A": "Which one has better appearance alignment with the reference?",
    "B-A": "Which one has better background alignment with the reference?",
    "I-A": "Which one has better ID alignment with the reference?",
}
"""Table 7's columns and its questions."""
FORMS = 8
"""Orders of the trials; participant number n gets form n modulo this."""
VIDEOS = 30
"""Cases, as in the paper."""


@dataclass(frozen=True)
class Trial:
    """A comparison: names of files in the study's folder."""

    name: str
    case: str
    competitor: str
    ours: str
    other: str


def write_study(out: Path, ours: str, pairs: Sequence[Pair], seed: int = 0, videos: int = VIDEOS) -> Path:
    """Writes out/study/ and out/study_key.json; returns the path of the page.

    Args:
        ours: the variant that is compared with every other one.
        pairs: of several variants; of every variant of a case its lowest seed is taken.
        seed: draws the cases, the names of the clips, the orders and the sides.
        videos: cases, at most.

    Raises:
        ValueError: no case has both ours and another variant; a file that browsers do not play, or that cannot be read or written.
    """
    rng = np.random.default_rng(seed)
    cases = _draw_cases(ours, pairs, rng, videos)
    clips = _clip_names(cases, rng)
    trials = _trials(ours, cases, clips)
    forms = draw_forms(trials, rng)
    about = {"ours": ours, "questions": QUESTIONS, "trials": [vars(trial) for trial in trials]}
    identity = hashlib.sha256(json.dumps([about, forms, seed]).encode()).hexdigest()[:12]
    with filling(out / "study") as folder:
        for name, case in tqdm(cases.items(), "study", delay=2):
            _write_case(folder, name, case, clips)
        shown = {trial.name: {"image": f"{trial.case}.jpg", "sound": f"{trial.case}.m4a"} for trial in trials}
        content = {"id": identity, "questions": QUESTIONS, "trials": shown, "forms": forms}
        (folder / PAGE).write_text(render("stableavatar.evaluation", "study.html.j2", {"study": content}), encoding="utf-8")
    write_json(out / KEY, {"study": identity, **about, "cases": {name: case[0].name for name, case in cases.items()}})
    return out / "study" / PAGE


def _draw_cases(ours: str, pairs: Sequence[Pair], rng: np.random.Generator, videos: int) -> dict[str, list[Pair]]:
    """case_01, ... -> our pair and those of the others."""
    groups = [sorted(group, key=lambda pair: pair.variant != ours) for group in by_case(pairs)]
    groups = [group for group in groups if len(group) > 1 and group[0].variant == ours]
    if not groups:
        raise ValueError(f"no case has a video of {ours!r} and one of another variant; got {sorted({pair.variant for pair in pairs})}")
    chosen = rng.permutation(len(groups))[:videos]
    return {f"case_{place:02}": groups[number] for place, number in enumerate(chosen, 1)}


def _clip_names(cases: Mapping[str, Sequence[Pair]], rng: np.random.Generator) -> dict[tuple[str, str], str]:
    """(case, variant) -> a file's name that tells neither."""
    keys = [(name, pair.variant) for name, case in cases.items() for pair in case]
    return {key: f"clip_{number + 1:03}.mp4" for key, number in zip(keys, rng.permutation(len(keys)).tolist())}


def _trials(ours: str, cases: Mapping[str, Sequence[Pair]], clips: Mapping[tuple[str, str], str]) -> list[Trial]:
    couples = [(name, pair.variant) for name, case in cases.items() for pair in case[1:]]
    return [
        Trial(f"trial_{number:03}", name, variant, clips[name, ours], clips[name, variant])
        for number, (name, variant) in enumerate(couples, 1)
    ]


def draw_forms(trials: Sequence[Trial], rng: np.random.Generator) -> list[list[tuple[str, str, str]]]:
    """FORMS orders of (trial, left clip, right clip); forms 2k and 2k + 1 have opposite sides."""
    forms = []
    for _ in range(FORMS // 2):
        swapped = rng.random(len(trials)) < 0.5
        for turned in (swapped, ~swapped):
            clips = [(trial.other, trial.ours) if turn else (trial.ours, trial.other) for trial, turn in zip(trials, turned)]
            sides = [(trial.name, *both) for trial, both in zip(trials, clips)]
            forms.append([sides[number] for number in rng.permutation(len(trials))])
    return forms


def _write_case(folder: Path, name: str, case: Sequence[Pair], clips: Mapping[tuple[str, str], str]) -> None:
    """Reference image, sound and clips of a case."""
    Image.fromarray(case_panels(case)[0].still).save(folder / f"{name}.jpg", quality=95)
    sound = [*ffmpeg.file_input(case[0].audio), "-map", "0:a:0", "-map_metadata", "-1", "-c:a", "aac", "-b:a", "192k"]
    _write(folder / f"{name}.m4a", sound, case[0].audio)
    for pair in case:
        _copy_blind(pair, folder / clips[name, pair.variant])


def _copy_blind(pair: Pair, target: Path) -> None:
    """The pictures as they are, the sound of the case (whatever sound the video has), no metadata."""
    if not re.search(r"Video: h264 .*yuvj?420p", ffmpeg.header(pair.generated, "video")):
        raise ValueError(f"{pair.generated} is not H.264 in yuv420p, which all browsers play; convert it first")
    video = ffmpeg.probe_video(pair.generated)
    inputs = [*ffmpeg.file_input(pair.generated), *ffmpeg.file_input(pair.audio)]
    _write(target, [*inputs, *CONTAINER, *sound_arguments(video.frames / video.fps)], pair.generated)


def _write(target: Path, arguments: Sequence[str], source: Path) -> None:
    run = subprocess.run(ffmpeg.command(*arguments, "-y", f"file:{target}"), stderr=subprocess.PIPE)
    if run.returncode:
        raise ValueError(f"cannot copy {source} to {target}: {ffmpeg.reason(run.stderr.decode(errors='replace'))}; give a whole file")

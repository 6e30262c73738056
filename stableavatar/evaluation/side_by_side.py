"""One video of a case to look at: reference image, every variant and the true video beside each other, with the sound and their names."""

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from stableavatar.data.frames import nearest_in_time
from stableavatar.data.preparation.pictures import Pictures, repeat_frames, video_pictures
from stableavatar.evaluation.pairs import Pair
from stableavatar.media import VideoWriter, read_image, write_sidecar
from stableavatar.sheets import GUTTER, fit_cell, grid, label_strip
from stableavatar.video_writer import sidecar_path
from stableavatar.workers import shared_out

HEIGHT = 360
"""Of each picture, in pixels, even."""
LABEL = 28
"""Height of the names, in pixels, even."""
WIDEST = 3840
"""Pixels; more pictures go into a further row."""
REFERENCE, TRUTH = "reference", "ground truth"
ENDED = "(ended)"


@dataclass(frozen=True)
class Panel:
    """A part of the picture: a video, or the reference image, which stands still."""

    name: str
    video: Pictures | None = None
    still: np.ndarray | None = None
    """uint8 [height, width, 3]"""

    @property
    def aspect(self) -> float:
        """Width over height."""
        return self.video.width / self.video.height if self.video else self.still.shape[1] / self.still.shape[0]


def write_videos(out: Path, pairs: Sequence[Pair], workers: int = 1) -> dict[str, Path]:
    """A side-by-side video of every case, out/CASE.mp4; those that are there of the same files stay. Returns case -> file.

    Raises:
        ValueError: a video cannot be read or written.
    """
    jobs = [(out / f"{group[0].name}.mp4", group) for group in by_case(pairs)]
    for _ in tqdm(shared_out(_write_video, jobs, workers, 1), "side-by-side videos", len(jobs), delay=2):
        pass
    return {group[0].name: path for path, group in jobs}


def _write_video(job: tuple[Path, list[Pair]]) -> None:
    path, pairs = job
    files = {pair.variant: pair.generated for pair in pairs}
    files |= {REFERENCE: pairs[0].image, TRUTH: pairs[0].video, "sound": pairs[0].audio}
    record = {"made of": {name: _identity(file) for name, file in files.items() if file}}
    if not path.exists() or _record(path) != record:
        write_side_by_side(path, pairs)
        write_sidecar(path, record)


def by_case(pairs: Iterable[Pair]) -> list[list[Pair]]:
    """The pairs of each case, of every variant the one with its lowest seed, in their order; cases sorted by name."""
    cases: dict[str, dict[str, Pair]] = defaultdict(dict)
    for pair in pairs:
        variants = cases[pair.name]
        if pair.variant not in variants or pair.seed < variants[pair.variant].seed:
            variants[pair.variant] = pair
    return [list(cases[name].values()) for name in sorted(cases)]


def _record(video: Path) -> object:
    """What the sidecar of a video holds; None if it has none."""
    try:
        return json.loads(sidecar_path(video).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _identity(path: Path) -> list[str | int]:
    """Tells a file from another that takes its place."""
    found = path.stat()
    return [str(path), found.st_size, found.st_mtime_ns]


def write_side_by_side(out: Path, pairs: Sequence[Pair], height: int = HEIGHT) -> None:
    """An mp4 of the variants of one case, as long as the longest of their videos, at the highest of their rates, with the case's sound.

    A video that ends earlier holds its last frame, and its name says so; a longer ground truth is cut. One frame of each is in memory.

    Args:
        out: the mp4, whole or not at all.
        pairs: of one case, in the order in which they are to be shown.
        height: of each picture, in pixels, even.

    Raises:
        ValueError: a video, the image or the sound cannot be read; the place cannot be written.
    """
    panels = case_panels(pairs)
    generated = [panel.video for panel in panels[1 : len(pairs) + 1]]
    fps = max(video.fps for video in generated)
    frames = max(round(video.frames * fps / video.fps) for video in generated)
    width = 2 * round(height * max(panel.aspect for panel in panels) / 2)
    columns = min(len(panels), max(1, (WIDEST - GUTTER) // (width + GUTTER)))
    with ExitStack() as stack:
        cells = [stack.enter_context(closing(_cells(panel, fps, frames, width, height))) for panel in panels]
        size = grid([np.zeros((height + LABEL, width, 3), np.uint8)] * len(panels), columns).shape
        writer = stack.enter_context(VideoWriter(out, size[1], size[0], fps, pairs[0].audio, {"case": pairs[0].name}))
        for row in zip(*cells):
            writer.write(grid(row, columns)[None])


def case_panels(pairs: Sequence[Pair]) -> list[Panel]:
    """Reference, each variant, and the ground truth where there is one. The first frame of the truth stands for a missing image.

    Raises:
        ValueError: one of them cannot be read.
    """
    first = pairs[0]
    assert len({pair.name for pair in pairs}) == 1 and len({pair.variant for pair in pairs}) == len(pairs), "pairs of one case are wanted"
    truth = video_pictures(first.video) if first.video else None
    panels = [Panel(pair.variant, video_pictures(pair.generated)) for pair in pairs]
    still = np.asarray(read_image(first.image, quiet=True)) if first.image else next((truth or panels[0].video).read([0]))
    return [Panel(REFERENCE, still=still), *panels, *([Panel(TRUTH, truth)] if truth else [])]


def _cells(panel: Panel, fps: float, frames: int, width: int, height: int) -> Iterator[np.ndarray]:
    """What a panel shows at each frame of the video, uint8 [height + LABEL, width, 3]."""
    names = [label_strip(name, width, LABEL) for name in (panel.name, f"{panel.name} {ENDED}")]
    if panel.video is None:
        cell = np.concatenate([names[0], fit_cell(panel.still, width, height)])
        for _ in range(frames):
            yield cell
        return
    wanted = nearest_in_time(range(frames), fps, panel.video.fps)
    with closing(panel.video.read()) as pictures:
        shown = repeat_frames(pictures, [min(number, panel.video.frames - 1) for number in wanted])
        for number, picture in zip(wanted, shown):
            yield np.concatenate([names[number >= panel.video.frames], fit_cell(picture, width, height)])

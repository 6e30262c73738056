"""A few moments of each case: reference image, every variant and the true video at the same times."""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from stableavatar import ffmpeg
from stableavatar.data.clips import one_line
from stableavatar.data.preparation.pictures import Pictures, spread
from stableavatar.evaluation.pairs import Pair
from stableavatar.evaluation.side_by_side import by_case, case_panels
from stableavatar.pages import jpeg_uri
from stableavatar.sheets import fit_cell, grid
from stableavatar.workers import shared_out

SHEETS = 24
"""Cases that are shown, evenly spread over their names."""
MOMENTS = 6
"""Frames of each video."""
HEIGHT = 144
"""Of each picture, in pixels."""


@dataclass(frozen=True)
class CaseSheet:
    """The pictures of a case, or why they cannot be shown.

    Attributes:
        times: seconds of the frames of every row but that of the reference image.
        rows: name and data URI.
    """

    name: str
    times: tuple[float, ...] = ()
    rows: tuple[tuple[str, str], ...] = ()
    problem: str = ""


def case_sheets(pairs: Sequence[Pair], workers: int = 1) -> list[CaseSheet]:
    """Sheets of at most SHEETS cases."""
    groups = by_case(pairs)
    chosen = [groups[number] for number in spread(len(groups), SHEETS)] if groups else []
    return list(tqdm(shared_out(_case_sheet, chosen, workers, 1), "contact sheets", len(chosen), delay=2))


def _case_sheet(pairs: Sequence[Pair]) -> CaseSheet:
    name = pairs[0].name
    try:
        panels = case_panels(pairs)
        seconds = min(panel.video.frames / panel.video.fps for panel in panels[1 : len(pairs) + 1])
        times = tuple((moment + 0.5) * seconds / MOMENTS for moment in range(MOMENTS))
        rows = [(panel.name, [panel.still] if panel.video is None else [frame_at(panel.video, time) for time in times]) for panel in panels]
        return CaseSheet(name, times, tuple((title, _row(pictures)) for title, pictures in rows))
    except (ValueError, OSError) as error:
        return CaseSheet(name, problem=one_line(error))


def _row(pictures: Sequence[np.ndarray]) -> str:
    width = max(1, round(HEIGHT * pictures[0].shape[1] / pictures[0].shape[0]))
    return jpeg_uri(grid([fit_cell(picture, width, HEIGHT) for picture in pictures], len(pictures)))


def frame_at(video: Pictures, seconds: float) -> np.ndarray:
    """The frame of a video that is nearest to a time, the last one after its end, uint8 [height, width, 3].

    Found by seeking: a long video is not decoded for a few pictures.

    Raises:
        ValueError: it cannot be read.
    """
    number = min(round(seconds * video.fps), video.frames - 1)
    seek = max(0.0, video.start + (number - 0.5) / video.fps)
    source = ["-threads", "1", "-ss", f"{seek:.6f}", *ffmpeg.file_input(video.path), "-map", "0:V:0", "-frames:v", "1"]

    def wrong(count: int, why: str) -> str | None:
        return None if count else f"cannot read frame {number} of {video.path}: {why.rstrip('.')}; give a whole video"

    with closing(ffmpeg.raw_frames(source, video.width, video.height, wrong)) as frames:
        return next(frames).copy()

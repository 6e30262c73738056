"""How a long video changes: the figures of evaluation stretch by stretch, the miniature of the paper's figure 2 and table 4."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from stableavatar.config import InferenceConfig, override
from stableavatar.pipeline import StableAvatarPipeline
from stableavatar.puppet.evaluation import Truth, Values, make_video, measure, true_video
from stableavatar.puppet.world import Scene

SHORTEST_STRETCH = 10
"""Frames in which lips can be compared with a sound at all."""
Case = dict[str, Any]


def evaluate_stretches(
    pipeline: StableAvatarPipeline,
    config: InferenceConfig,
    scenes: Sequence[Scene],
    stretch: int,
    done: Sequence[Case] = (),
    store: Callable[[list[Case]], None] = lambda cases: None,
) -> list[Case]:
    """As `evaluate_cases`, for videos whose quality over time is of interest.

    Returns:
        for each scene "model" (figures of the whole video, and NAME_early, NAME_late of its first and last stretch), "curve" (figures
        of each stretch, in order), "starts" (their first frames) and "seconds" (of making the video)
    """
    cases = list(done)[: len(scenes)]
    for number in range(len(cases), len(scenes)):
        cases.append(_stretched_case(pipeline, override(config, {"seed": config.seed + number}), scenes[number], stretch))
        store(cases)
    return cases


def _stretched_case(pipeline: StableAvatarPipeline, config: InferenceConfig, scene: Scene, stretch: int) -> Case:
    truth, _ = true_video(scene, pipeline.vae)
    video = make_video(pipeline, config, scene, truth.reference)
    curve = drift_curve(video.frames, truth, stretch)
    values = measure(video.frames, truth, video.seams, [])
    for when, found in (("early", curve[0]), ("late", curve[-1])):
        values |= {f"{name}_{when}": value for name, value in found.items()}
    return {"model": values, "curve": curve, "starts": stretch_starts(len(video.frames), stretch), "seconds": video.seconds}


def stretch_starts(frames: int, stretch: int) -> list[int]:
    """First frames of the stretches: evenly spread, the first begins with the video and the last ends with it."""
    return np.linspace(0, frames - stretch, max(1, frames // stretch)).round().astype(int).tolist()


def drift_curve(frames: np.ndarray, truth: Truth, stretch: int) -> list[Values]:
    """All figures of each stretch of a video uint8 [T, H, W, 3]; its pictures are compared with the reference."""
    parts = [slice(start, start + stretch) for start in stretch_starts(len(frames), stretch)]
    return [measure(frames[part], replace(truth, aperture=truth.aperture[part], width=truth.width[part]), [], []) for part in parts]

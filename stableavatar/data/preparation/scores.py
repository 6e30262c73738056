"""The step that gathers and measures all scores of a clip."""

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image

from stableavatar.data.clips import SOUND, VIDEO, one_line
from stableavatar.data.preparation.faces import whole_track
from stableavatar.data.preparation.filters import FilterConfig, ScoreConfig, limits
from stableavatar.data.preparation.pictures import Pictures, nearest_frames, repeat_frames, spread, video_pictures
from stableavatar.data.preparation.quality import confidence_at, cut_out, insightface_detector, sharpness, survey
from stableavatar.data.preparation.records import ClipFolder
from stableavatar.evaluation.aesthetics import check_model
from stableavatar.evaluation.networks.lips import syncnet_on
from stableavatar.evaluation.networks.looks import load_qalign
from stableavatar.evaluation.syncnet import SYNC_FPS, face_crops, load_syncnet, measure_sync
from stableavatar.media import AudioTrack
from stableavatar.sampling.offload import resolve_device

PICTURE_SIDE, FACE_SIDE = 512, 128
"""Standard sizes at which sharpness is told: squares of these sides."""
DIGITS = 5
SOUND_SCORES = ("voice", "silence", "loudness", "peak", "overdriven")
FACE_SCORES = {
    "face_confidence": "confidence_mean",
    "faces": "faces_median",
    "faces_max": "faces_max",
    "faceless": "missing_share",
    "face_size": "face_size",
}
"""Score -> what the step `masks` calls it."""


def score(clip: ClipFolder, config: ScoreConfig, values: Mapping[str, Mapping[str, Any]]) -> dict[str, float | None]:
    """All scores of a clip, by the names in `filters.limits`; None for one that was not taken.

    Args:
        values: what the steps `crop`, `voice` and `masks` gave for the clip.

    Raises:
        ValueError: the clip cannot be read or is too short.
        OSError: a model does not load or work, which is no fault of the clip's: it is to be scored again.
    """
    scores = dict.fromkeys(limits(FilterConfig()))
    scores["static_background"] = values["crop"]["static_background"]
    scores |= {name: values["voice"][name] for name in SOUND_SCORES}
    scores |= {name: values["masks"][theirs] for name, theirs in FACE_SCORES.items()}
    boxes, pictures = whole_track(values["masks"]["boxes"]), video_pictures(clip.folder / VIDEO)
    scores |= _looks(pictures, boxes, config)
    if config.syncnet:
        scores |= _sync(pictures, boxes, clip, config)
    return {name: None if value is None else round(float(value), DIGITS) for name, value in scores.items()}


def check_models(config: ScoreConfig) -> None:
    """ValueError if a model that is given, or the device, is not there or not what it should be; of Q-Align only what is quickly seen."""
    resolve_device(config.device)
    if config.insightface:
        insightface_detector(config.insightface, "cpu")
    if config.syncnet:
        load_syncnet(config.syncnet)
    if config.qalign:
        check_model(config.qalign, config.trust_remote_code)
    if config.qalign_python and not shutil.which(config.qalign_python):
        raise ValueError(f"there is no program {config.qalign_python}; scores.qalign_python must be a python with transformers 4.37")


@contextmanager
def _model_at_work() -> Iterator[None]:
    """Turns what is wrong with a model into an OSError."""
    try:
        yield
    except (ValueError, torch.OutOfMemoryError) as error:
        raise OSError(one_line(error)) from error


def _looks(pictures: Pictures, boxes: np.ndarray, config: ScoreConfig) -> dict[str, float]:
    """The scores of the pictures; those of models only where a model is given."""
    seen = survey(pictures, spread(pictures.frames, config.samples))
    faces = [cut_out(pixels, boxes[number]) for number, pixels in seen.samples.items()]
    scores = {
        "cuts": seen.cuts,
        "black": seen.black,
        "still": seen.still,
        "sharpness": np.mean([sharpness(pixels, PICTURE_SIDE) for pixels in seen.samples.values()]),
        "face_sharpness": np.mean([sharpness(face, FACE_SIDE) for face in faces if face is not None] or [0.0]),
    }
    if config.insightface:
        with _model_at_work():
            detect = insightface_detector(config.insightface, resolve_device(config.device).type)
        scores["face_confidence"] = np.mean([confidence_at(detect(pixels), boxes[number]) for number, pixels in seen.samples.items()])
    if config.qalign:
        with _model_at_work():
            scorer = load_qalign(config.qalign, config.device, config.trust_remote_code, config.qalign_python)
            scores |= scorer.scores([Image.fromarray(pixels) for pixels in seen.samples.values()])
    return scores


def _sync(pictures: Pictures, boxes: np.ndarray, clip: ClipFolder, config: ScoreConfig) -> dict[str, float]:
    """Lip-sync of the main face at 25 pictures a second, whatever the clip's own rate."""
    shown = nearest_frames(pictures.frames, pictures.fps, SYNC_FPS)
    with _model_at_work():
        model = syncnet_on(config.syncnet, config.device)
    with AudioTrack(clip.folder / SOUND, quiet=True) as track:
        sync = measure_sync(model, face_crops(repeat_frames(pictures.read(), shown), boxes[shown]), track)
    return {"sync_confidence": sync.confidence, "sync_distance": sync.distance, "sync_offset": sync.offset}

"""Which scores of a clip are too low or too high for training. Thresholds are applied here alone, so that changing one costs seconds."""

from collections.abc import Mapping
from dataclasses import dataclass

from stableavatar.config import setting

Limit = tuple[str, float]
"""("at least" or "at most", value)."""


@dataclass
class ScoreConfig:
    samples: int = setting(8, "pictures of each clip, evenly spaced, in which sharpness, face (InsightFace) and looks (Q-Align) are judged",
                           low=1, high=1000)
    insightface: str = setting("", "folder with models/buffalo_l/det_10g.onnx: InsightFace tells how sure a face is; empty: mediapipe does")
    syncnet: str = setting("", "syncnet_v2.model, to measure lip-sync; empty for off")
    qalign: str = setting("", "folder of the model q-future/one-align, to measure quality and aesthetics; empty for off")
    qalign_python: str = setting("", "python of an environment with transformers 4.37, which one-align needs; empty to run it in this one")
    trust_remote_code: bool = setting(False, "let the program that lies in the folder of Q-Align run")
    device: str = setting("auto", "where the models compute: auto, cpu, cuda, cuda:1, ...")


@dataclass
class FilterConfig:
    """Thresholds; none switches one off, and a score that was not taken never filters."""

    face_confidence: float | None = setting(0.9, "least mean confidence of the face's detection; none for off", low=0, high=1)
    faces: int | None = setting(1, "most faces in half of the frames; none for off", low=1)
    faces_max: int | None = setting(None, "most faces in any frame; none for off", low=1)
    faceless: float | None = setting(0.05, "largest share of frames without masks; none for off", low=0, high=1)
    face_size: float | None = setting(0.1, "least height of the face, as a share of the picture's; none for off", low=0, high=1)
    sharpness: float | None = setting(0.3, "least sharpness of the picture, 0 to 1; none for off", low=0, high=1)
    face_sharpness: float | None = setting(0.3, "least sharpness of the face, 0 to 1; none for off", low=0, high=1)
    sync_confidence: float | None = setting(3.0, "least confidence of SyncNet (Sync-C); none for off", low=0)
    sync_offset: int | None = setting(3, "most pictures by which lips and voice may be apart; none for off", low=0, high=15)
    quality: float | None = setting(3.0, "least quality by Q-Align, 1 (bad) to 5 (excellent); none for off", low=1, high=5)
    aesthetics: float | None = setting(None, "least aesthetics by Q-Align, 1 (bad) to 5 (excellent); none for off", low=1, high=5)
    cuts: int | None = setting(0, "most shot boundaries within the clip; none for off", low=0)
    black: float | None = setting(0.0, "largest share of black pictures; none for off", low=0, high=1)
    still: float | None = setting(0.2, "largest share of pictures that stand still for 2 s or longer; none for off", low=0, high=1)
    static_background: float | None = setting(0.5, "least share of the background that does not change; none for off", low=0, high=1)
    voice: float | None = setting(0.3, "least share of the time with a voice; none for off", low=0, high=1)
    silence: float | None = setting(None, "largest share of the time that is silent; none for off", low=0, high=1)
    loudness: float | None = setting(-45.0, "least loudness in LUFS; none for off", low=-70, high=0)
    overdriven: float | None = setting(0.01, "largest share of samples at full scale; none for off", low=0, high=1)


def limits(config: FilterConfig) -> dict[str, list[Limit]]:
    """Every score's name -> its thresholds, none if it has none or they are switched off."""
    return {
        "face_confidence": _least(config.face_confidence),
        "faces": _most(config.faces),
        "faces_max": _most(config.faces_max),
        "faceless": _most(config.faceless),
        "face_size": _least(config.face_size),
        "sharpness": _least(config.sharpness),
        "face_sharpness": _least(config.face_sharpness),
        "sync_confidence": _least(config.sync_confidence),
        "sync_distance": [],
        "sync_offset": [] if config.sync_offset is None else _least(-config.sync_offset) + _most(config.sync_offset),
        "quality": _least(config.quality),
        "aesthetics": _least(config.aesthetics),
        "cuts": _most(config.cuts),
        "black": _most(config.black),
        "still": _most(config.still),
        "static_background": _least(config.static_background),
        "voice": _least(config.voice),
        "silence": _most(config.silence),
        "loudness": _least(config.loudness),
        "peak": [],
        "overdriven": _most(config.overdriven),
    }


def _least(value: float | None) -> list[Limit]:
    return [] if value is None else [("at least", value)]


def _most(value: float | None) -> list[Limit]:
    return [] if value is None else [("at most", value)]


def decide(values: Mapping[str, float | None], config: FilterConfig) -> list[str]:
    """Why a clip is rejected, a reason per threshold that it misses, such as "sharpness 0.12 < 0.3"; empty if it is accepted.

    Args:
        values: score -> value; one that is missing or None was not taken and rejects nothing.
    """
    reasons = []
    for name, bounds in limits(config).items():
        value = values.get(name)
        for side, bound in bounds:
            if value is not None and (value < bound if side == "at least" else value > bound):
                reasons.append(f"{name} {value:.6g} {'<' if side == 'at least' else '>'} {bound:g}")
    return reasons


def not_taken(config: ScoreConfig) -> list[str]:
    """What is not measured because no model is given for it, and which setting names one; a line each."""
    missing = [
        (config.insightface, "InsightFace's face confidence is not measured (mediapipe's stands in for it): scores.insightface is empty"),
        (config.syncnet, "lip-sync is not measured and filters nothing: scores.syncnet is empty"),
        (config.qalign, "quality and aesthetics are not measured and filter nothing: scores.qalign is empty"),
    ]
    return [line for given, line in missing if not given]

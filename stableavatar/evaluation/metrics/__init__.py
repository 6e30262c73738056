"""The metrics by the names that settings and tables use."""

from stableavatar.config import nearest
from stableavatar.evaluation.metrics.base import Metric
from stableavatar.evaluation.metrics.cost import FPS, Minutes, PeakMemory, TimeToFirstFrame
from stableavatar.evaluation.metrics.distances import FID, FVD, FVD16, FIDTail, FVDTail
from stableavatar.evaluation.metrics.faces import CSIM, CSIMTail, LipCorrelation, LipEnvelope, SyncC, SyncD, SyncOffset
from stableavatar.evaluation.metrics.looks import ASE, IQA, Ciede, ColourDrift, DinoSimilarity, SeamJitter

METRICS: dict[str, Metric] = {
    metric.name: metric()
    for metric in (
        FID, FIDTail, FVD, FVD16, FVDTail, CSIM, CSIMTail, SyncC, SyncD, SyncOffset, IQA, ASE, DinoSimilarity, Ciede, ColourDrift,
        LipCorrelation, LipEnvelope, SeamJitter, FPS, TimeToFirstFrame, Minutes, PeakMemory,
    )
}  # fmt: skip
"""Name -> metric, in the order of the papers' tables."""


def choose_metrics(names: str) -> dict[str, Metric]:
    """The metrics that a list names, in its order: "fid, fvd"; ValueError for one that there is not."""
    chosen = [name.strip() for name in names.split(",") if name.strip()]
    for name in chosen:
        if name not in METRICS:
            raise ValueError(f"unknown metric {name!r}; the nearest is {nearest(name, METRICS)!r}")
    return {name: METRICS[name] for name in chosen}

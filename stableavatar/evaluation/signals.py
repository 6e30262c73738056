"""Small measures of tracks and colours that evaluations share."""

from collections.abc import Sequence

import numpy as np
from skimage.color import deltaE_ciede2000, rgb2lab

from stableavatar.geometry import latents_to_frames

FLAT_TRACK = 1e-3
"""A track with a smaller standard deviation does not move: nothing correlates with it."""


def correlation(estimate: np.ndarray, truth: np.ndarray) -> float:
    """Pearson correlation of two tracks of one length; 0 if one of them does not move (standard deviation below FLAT_TRACK)."""
    if len(estimate) != len(truth):
        raise ValueError(f"tracks have {len(estimate)} and {len(truth)} frames, expected as many")
    if min(np.std(estimate), np.std(truth)) < FLAT_TRACK:
        return 0.0
    return float(np.corrcoef(estimate, truth)[0, 1])


def colour_distance(pixels: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """CIEDE2000 of RGB colours 0 .. 255 [..., 3], uint8 or floating point, of one shape or that can be broadcast; [...].

    The difference is scikit-image's, all weights 1; sRGB to Lab under D65, 2 degrees.
    """
    return deltaE_ciede2000(*np.broadcast_arrays(*(rgb2lab(np.asarray(part, dtype=np.float32) / 255) for part in (pixels, reference))))


def seam_ratio(changes: np.ndarray, frames: np.ndarray, seams: Sequence[int]) -> float:
    """Mean change at seams over elsewhere; 1: no seam is seen. NaN where there are no seams or nothing else.

    Elsewhere are the other frames with which a latent begins, since the VAE makes these unlike frames in the middle of one.

    Args:
        changes: of each frame from the one before, [N]; frames: their numbers, [N].
        seams: numbers of the frames with which a window's part of the video begins or ends.
    """
    starts = (frames % (latents_to_frames(2) - 1) == 1) & ~np.isin(frames, seams)
    at_seams = np.isin(frames, seams) & (frames > 0)
    if not at_seams.any() or not starts.any():
        return float("nan")
    return float(changes[at_seams].mean() / max(changes[starts].mean(), 1e-6))

"""How good a video of the puppet world is: each figure is one function of pixels, of what the observer saw in them, and of the truth.

Frames are uint8 [T, H, W, 3] RGB, tracks are [T] at 25 per second. Colours are compared by CIEDE2000, structure by SSIM (scikit-image).
"""

import cv2
import numpy as np
from skimage.metrics import structural_similarity

from stableavatar.evaluation.signals import colour_distance, correlation, seam_ratio
from stableavatar.geometry import FPS
from stableavatar.puppet.observer import Observation

LAG_REACH = 5
"""Frames either way among which the lag is sought."""
TRUTH_CLOSED = 0.05
"""A mouth of the ground truth with a smaller aperture is closed."""
CLOSED_FRAMES = 3
"""So long must the truth have been closed already, until a mouth that follows it has to be closed too."""
SEEN_CLOSED = 0.15
"""A mouth is seen closed below this aperture: the lips of an observed closed mouth touch, estimates are that exact."""
BLINKING = 0.5
"""A lid closed by more than this is a blink."""
SAMPLED_FRAMES = 50
"""Pictures are compared in so many frames, evenly spread, at most."""
HEAD_VIEW = (56, 56, -1.4, 1.4, -1.75, 1.05)
"""Columns and rows of a cut-out head, then left, right, top, bottom around the point between the eyes, in distances of mouth and eyes."""
FACE_ROWS, FACE_COLUMNS = slice(16, 47), slice(10, 46)
"""Of the head: brows, eyes and nose, down to above the upper lip."""
SKIN_PATCHES = ((slice(41, 47), slice(13, 19)), (slice(41, 47), slice(37, 43)))
"""Of the head: both cheeks."""
HAIR_PATCH = (slice(8, 14), slice(18, 38))
"""Of the head: above the forehead, where there is hair, a hat or a bald head."""
BROKEN_DISTANCE, BROKEN_JUMP, BROKEN_CONTRAST = 8.0, 0.4, 3.0
"""CIEDE2000 of the background; shift of the mouth from frame to frame in distances of mouth and eyes; grey levels (standard deviation)."""
BROKEN_FACE = 0.35
"""SSIM of `face_likeness`, for turned heads and closed eyes too; "truth after VAE" of an evaluation counts true frames below it."""
COARSE = 4
"""Backgrounds of all frames are compared at so much smaller a size."""
FINE_SIGMA = 1.5
"""What a Gaussian blur of so many pixels takes away is fine detail."""


def lag(estimate: np.ndarray, truth: np.ndarray) -> int:
    """Frames by which the video is late: the shift within LAG_REACH at which the tracks correlate best, negative if it is early."""
    def shifted(shift: int) -> float:
        late, early = max(shift, 0), max(-shift, 0)
        return correlation(estimate[late : len(estimate) - early], truth[early : len(truth) - late])

    return max(range(-LAG_REACH, LAG_REACH + 1), key=lambda shift: (shifted(shift), -abs(shift)))


def swapped_correlation(estimate: np.ndarray, others: list[np.ndarray]) -> float:
    """Mean correlation with the tracks of other sounds, over the frames that both have; NaN if there are no others."""
    lengths = [min(len(estimate), len(other)) for other in others]
    return float(np.mean([correlation(estimate[:n], other[:n]) for n, other in zip(lengths, others)])) if others else float("nan")


def silent_frames(truth: np.ndarray) -> np.ndarray:
    """bool [T]: the true mouth is closed, and has been in the CLOSED_FRAMES frames before."""
    closed = (truth < TRUTH_CLOSED).astype(np.float64)
    run = np.convolve(closed, np.ones(CLOSED_FRAMES + 1))[: len(truth)]
    return run > CLOSED_FRAMES + 0.5


def silence(estimate: np.ndarray, truth: np.ndarray) -> tuple[float, float]:
    """Mean aperture seen in silent frames, and the part of them in which the mouth is closed (below SEEN_CLOSED); NaN if there are none."""
    seen = estimate[silent_frames(truth)]
    return (float(seen.mean()), float((seen < SEEN_CLOSED).mean())) if len(seen) else (float("nan"), float("nan"))


def blink_rate(blink: np.ndarray, fps: float = FPS) -> float:
    """Blinks per minute: how often the lids go from open to closed (past BLINKING)."""
    closed = blink > BLINKING
    return float(np.count_nonzero(closed[1:] & ~closed[:-1]) * 60 * fps / max(len(blink), 1))


def sampled(count: int) -> np.ndarray:
    """Indices of at most SAMPLED_FRAMES of `count` frames, evenly spread, the first and the last among them."""
    return np.unique(np.linspace(0, count - 1, min(count, SAMPLED_FRAMES)).round().astype(int))


def background_distance(frames: np.ndarray, reference: np.ndarray, background: np.ndarray) -> np.ndarray:
    """[T] mean CIEDE2000 between a frame's and the reference's pixels, pixel by pixel, over the background (bool [H, W])."""
    wanted = reference[background]
    return np.array([colour_distance(frame[background], wanted).mean() for frame in frames])


def background_structure(frames: np.ndarray, reference: np.ndarray, background: np.ndarray) -> np.ndarray:
    """[T] mean SSIM with the reference over the background (bool [H, W])."""
    maps = (structural_similarity(frame, reference, channel_axis=-1, full=True)[1] for frame in frames)
    return np.array([found[background].mean() for found in maps])


def head_cuts(frames: np.ndarray, seen: Observation) -> np.ndarray:
    """Heads as HEAD_VIEW, upright and of one size by the mouth and eyes that were seen in them; uint8 [T, rows, columns, 3]."""
    columns, rows, left, right, top, _ = HEAD_VIEW
    step = (right - left) / columns
    cuts = []
    for frame, eyes, mouth in zip(frames, seen.eyes.astype(float), seen.mouth.astype(float)):
        down = mouth - eyes
        across = np.array([down[1], -down[0]])
        corner = eyes + (left + step / 2) * across + (top + step / 2) * down
        matrix = np.column_stack([across * step, down * step, corner])
        flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
        cuts.append(cv2.warpAffine(frame, matrix, (columns, rows), flags=flags, borderMode=cv2.BORDER_REPLICATE))
    return np.stack(cuts)


def face_likeness(heads: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """[T] SSIM of brows, eyes and nose with the reference's, of cut-out heads [T, rows, columns, 3] and [rows, columns, 3]."""
    region = (FACE_ROWS, FACE_COLUMNS)
    return np.array([structural_similarity(head[region], reference[region], channel_axis=-1) for head in heads])


def identity(heads: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    """How far cut-out heads [T, rows, columns, 3] look like the reference's [rows, columns, 3].

    Returns:
        identity_ssim: see `face_likeness`; skin_de, hair_de: CIEDE2000 of the median colours of the cheeks and of what is
        above the forehead; means over the frames. A head that looks elsewhere or blinks costs a little SSIM also in the ground truth.
    """
    def colours(patches: tuple[tuple[slice, slice], ...]) -> float:
        found = [np.median(np.stack([np.median(head[patch], axis=(0, 1)) for patch in patches]), axis=0) for head in (*heads, reference)]
        return float(colour_distance(np.array(found[:-1]), found[-1]).mean())

    alike = face_likeness(heads, reference).mean()
    return {"identity_ssim": float(alike), "skin_de": colours(SKIN_PATCHES), "hair_de": colours((HAIR_PATCH,))}


def drift(frames: np.ndarray, background: np.ndarray, stretch: int) -> dict[str, float]:
    """CIEDE2000 between the mean pictures of the first and of the last `stretch` frames.

    Returns:
        drift_background: pixel by pixel, mean over the background (bool [H, W]); drift_colour: of the whole pictures' mean colours.
    """
    first, last = (part.mean(axis=0) for part in (frames[:stretch], frames[-stretch:]))
    return {
        "drift_background": float(colour_distance(first[background], last[background]).mean()),
        "drift_colour": float(colour_distance(first.mean(axis=(0, 1)), last.mean(axis=(0, 1)))),
    }


def seam_jitter(frames: np.ndarray, seams: list[int]) -> float:
    """Mean absolute change from the frame before, at seams over elsewhere (see `seam_ratio`)."""
    changes = np.array([0.0] + [cv2.absdiff(frame, before).mean() for before, frame in zip(frames, frames[1:])])
    return seam_ratio(changes, np.arange(len(frames)), seams)


def fine_detail(frames: np.ndarray, seen: Observation) -> float:
    """Mean square of what a blur of FINE_SIGMA takes away, in grey levels, around the faces (1.4 mouth-eyes distances from the middle)."""
    found = []
    for frame, eyes, mouth in zip(frames, seen.eyes, seen.mouth):
        grey = cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY).astype(np.float32)
        high, reach = grey - cv2.GaussianBlur(grey, (0, 0), FINE_SIGMA), 1.4 * np.linalg.norm(mouth - eyes)
        low = np.maximum(((mouth + eyes) / 2 - reach).astype(int), 0)
        up = np.maximum(((mouth + eyes) / 2 + reach).astype(int) + 1, low + 1)
        box = high[low[1] : up[1], low[0] : up[0]]
        found.append(np.square(box).mean() if box.size else 0.0)
    return float(np.mean(found))


def broken_frames(frames: np.ndarray, seen: Observation, alike: np.ndarray, reference: np.ndarray, background: np.ndarray) -> np.ndarray:
    """bool [T]: frames that a viewer would call broken.

    No face is found; or brows, eyes and nose are less like the reference's (`alike` [T], see `face_likeness`) than BROKEN_FACE, as where
    they come apart; or the mouth is more than BROKEN_JUMP away from where it was in the frame before; or the picture is flat (below
    BROKEN_CONTRAST); or the background is further than BROKEN_DISTANCE from the reference's, at a quarter of the size.
    """
    size = background.shape[1] // COARSE, background.shape[0] // COARSE
    small = np.stack([cv2.resize(frame, size, interpolation=cv2.INTER_AREA) for frame in (*frames, reference)])
    whole = cv2.resize(background.astype(np.float32), size, interpolation=cv2.INTER_AREA) > 0.99
    away = background_distance(small[:-1], small[-1], whole) if whole.any() else np.zeros(len(frames))
    unit = np.median(np.linalg.norm(seen.mouth - seen.eyes, axis=1))
    moved = np.linalg.norm(np.diff(seen.mouth, axis=0, prepend=seen.mouth[:1]), axis=1) > BROKEN_JUMP * unit
    flat = frames.std(axis=(1, 2, 3)) < BROKEN_CONTRAST
    return ~seen.found | (alike < BROKEN_FACE) | moved | flat | (away > BROKEN_DISTANCE)

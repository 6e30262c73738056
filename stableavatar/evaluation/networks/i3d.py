"""I3D trained on Kinetics-400, by which FVD is defined, as the TorchScript program that StyleGAN-V published.

J. Carreira and A. Zisserman, "Quo Vadis, Action Recognition?", 2017; T. Unterthiner et al., "FVD: A new metric for video generation",
2019; I. Skorokhodov et al., "StyleGAN-V", 2022.
"""

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from stableavatar.evaluation.samples import Arrays, BatchWatcher, PictureNetwork, Seen, View, Watcher
from stableavatar.evaluation.weights import Tools, checked_weights
from stableavatar.media import from_pixels
from stableavatar.sampling.offload import resolve_device

SIDE = 224
FEATURES = 400
SHORTEST = 10
"""Pictures: with fewer the network's strides leave nothing."""
CALL = {"rescale": False, "resize": False, "return_features": True}
"""Its switches: pictures come in the size and range it wants; the logits are asked for."""


class I3D(PictureNetwork):
    """`feature`, float32 [C, 400]: the logits of C clips, each of the middle square of its pictures at 224 x 224 in [-1, 1].

    Of a stretch that is shorter than a clip there are no features at all; a whole video that is raises ValueError.

    Args:
        name: as the cache calls it. view: which pictures.
        clips: at most so many, evenly spread, none overlapping another.
        length: pictures of a clip; 0: one clip of all pictures.
    """

    weights = ("i3d",)
    by_frame = False

    def __init__(self, name: str, tools: Tools, view: View, clips: int, length: int = 0) -> None:
        self.name, self._tools, self._view, self._clips, self._length = name, tools, view, clips, length

    def load(self) -> None:
        """As `Network.load`."""
        self.definition()
        self._model()

    def definition(self) -> dict[str, Any]:
        """As `Network.definition`."""
        digest = checked_weights("i3d", Path(self._tools.weights.i3d), self._tools.weights)
        view = vars(self._view) | {"clips": self._clips, "length": self._length}
        return {"network": "I3D", "sha256": digest, "view": view, "size": SIDE, "resize": "bilinear short side, centre"}

    def watch(self, pictures: Seen, known: Arrays, span: tuple[float, float] | None) -> Watcher:
        """As `PictureNetwork.watch`."""
        numbers, times = self._view.grid(pictures, span)
        least = self._length or SHORTEST
        if len(numbers) < least and span is None:
            raise ValueError(f"{pictures.path} has {len(numbers)} pictures at {self._view.rate:g} a second; FVD needs {least}")
        if len(numbers) < least:  # the video ends before the stretch does: there is nothing to measure
            return BatchWatcher((numbers[:0], times[:0]), _prepare, self._embed, batch=1, rows=False)
        length = self._length or len(numbers)
        chosen = np.concatenate([np.arange(start, start + length) for start in clip_starts(len(numbers), length, self._clips)])
        return BatchWatcher((numbers[chosen], times[chosen]), _prepare, self._embed, batch=length, rows=False)

    def _embed(self, held: list[Tensor]) -> Arrays:
        with torch.inference_mode():
            clip = torch.stack(held, dim=1)[None].to(resolve_device(self._tools.device))
            return {"feature": self._model()(clip, **CALL).float().cpu().numpy()}

    def _model(self) -> torch.jit.ScriptModule:
        return load_i3d(self._tools.weights.i3d, self._tools.device)


def clip_starts(frames: int, length: int, clips: int) -> list[int]:
    """Where clips begin: as many as fit side by side, `clips` at most, evenly spread over the video."""
    count = min(clips, frames // length)
    return np.linspace(0, frames - length, count).astype(int).tolist()


def _prepare(frame: np.ndarray) -> Tensor:
    """[3, 224, 224]: the short side is brought to 224, then the middle is cut out."""
    pixels = from_pixels(torch.from_numpy(np.array(frame))).permute(2, 0, 1)[None]
    scale = SIDE / min(pixels.shape[2:])
    size = [max(SIDE, round(scale * side)) for side in pixels.shape[2:]]
    resized = functional.interpolate(pixels, size, mode="bilinear", align_corners=False)[0]
    top, left = (size[0] - SIDE) // 2, (size[1] - SIDE) // 2
    return resized[:, top : top + SIDE, left : left + SIDE]


@lru_cache(maxsize=1)
def load_i3d(path: str, device: str) -> torch.jit.ScriptModule:
    """The program in a file, whose checksum says that it is the published one; ValueError where it is none."""
    try:
        return torch.jit.load(path, map_location=resolve_device(device)).eval()
    except (RuntimeError, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise ValueError(f"{path} does not hold I3D ({reason}); expected i3d_torchscript.pt") from None

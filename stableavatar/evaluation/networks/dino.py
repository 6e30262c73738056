"""DINOv2: what a picture shows, whatever its details (M. Oquab et al., "DINOv2", 2023), the model base with 14 x 14 patches."""

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from stableavatar.evaluation.samples import Arrays, BatchWatcher, PictureNetwork, Seen, View, Watcher
from stableavatar.evaluation.weights import Tools, checked_weights
from stableavatar.models.checkpoint_files import TORCH_ERRORS
from stableavatar.sampling.offload import resolve_device

SHORT_SIDE, SIDE = 256, 224
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet's pictures in [0, 1]."""
RATE = 5
"""Pictures a second."""
WEIGHTS_FILE = "model.safetensors"


class Dino(PictureNetwork):
    """`embedding`, float32 [N, C] of length 1: the class token after the last norm, of 5 pictures a second.

    The short side is brought to 256 pixels (bicubic, antialiased) and the middle 224 x 224 are cut out, as its own processor does.
    """

    name, weights = "dino", ("dino",)

    def __init__(self, tools: Tools) -> None:
        self._tools, self._view = tools, View(rate=RATE)

    def load(self) -> None:
        """As `Network.load`."""
        self.definition()
        self._model()

    def definition(self) -> dict[str, Any]:
        """As `Network.definition`."""
        digest = checked_weights("dino", Path(self._tools.weights.dino).expanduser() / WEIGHTS_FILE, self._tools.weights)
        return {"network": "DINOv2", "sha256": digest, "view": vars(self._view), "size": [SHORT_SIDE, SIDE]}

    def watch(self, pictures: Seen, known: Arrays, span: tuple[float, float] | None) -> Watcher:
        """As `PictureNetwork.watch`."""
        return BatchWatcher(self._view.grid(pictures, span), _prepare, self._embed, self._tools.batch)

    def _embed(self, held: list[Tensor]) -> Arrays:
        model = self._model()
        with torch.inference_mode():
            found = model(torch.stack(held).to(model.device)).pooler_output
            return {"embedding": torch.nn.functional.normalize(found.float(), dim=1).cpu().numpy()}

    def _model(self) -> torch.nn.Module:
        return load_dino(str(Path(self._tools.weights.dino).expanduser()), self._tools.device)


def _prepare(frame: np.ndarray) -> Tensor:
    """[3, 224, 224]."""
    image = Image.fromarray(frame)
    scale = SHORT_SIDE / min(image.size)
    image = image.resize(tuple(max(SHORT_SIDE, int(scale * side)) for side in image.size), Image.Resampling.BICUBIC)
    left, top = (image.width - SIDE) // 2, (image.height - SIDE) // 2
    pixels = torch.from_numpy(np.array(image.crop((left, top, left + SIDE, top + SIDE)))).permute(2, 0, 1).float() / 255
    return (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


@lru_cache(maxsize=1)
def load_dino(folder: str, device: str) -> torch.nn.Module:
    """The model in a folder, every tensor in its place; ValueError where it does not hold it."""
    from transformers import Dinov2Model

    try:
        model, info = Dinov2Model.from_pretrained(folder, local_files_only=True, dtype=torch.float32, output_loading_info=True)
    except (OSError, *TORCH_ERRORS) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise ValueError(f"{folder} does not hold DINOv2 ({reason}); expected the folder of facebook/dinov2-base") from None
    if wrong := [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]:
        raise ValueError(f"{folder} does not hold DINOv2: {wrong[0]} is missing, unknown or misshapen; expected facebook/dinov2-base")
    return model.eval().requires_grad_(False).to(resolve_device(device))

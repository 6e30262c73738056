"""What Q-Align says of pictures one by one."""

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from stableavatar.evaluation.aesthetics import QAlign, RemoteQAlign, check_model
from stableavatar.evaluation.samples import Arrays, BatchWatcher, PictureNetwork, Seen, View, Watcher
from stableavatar.evaluation.weights import Tools, checked_weights
from stableavatar.sampling.offload import resolve_device


class Looks(PictureNetwork):
    """`quality` and `aesthetics`, float64 [N], 1 to 5: of a picture a second.

    Its 14 GB are not hashed: its identity is the content of config.json and the names and sizes of its weights.
    """

    name, weights = "looks", ("qalign",)

    def __init__(self, tools: Tools) -> None:
        self._tools, self._view = tools, View(rate=1)

    def load(self) -> None:
        """As `Network.load`; the model itself loads with the first picture."""
        check_model(self._tools.weights.qalign, self._tools.weights.trust_remote_code)
        self.definition()

    def definition(self) -> dict[str, Any]:
        """As `Network.definition`."""
        folder = Path(self._tools.weights.qalign).expanduser()
        digest = checked_weights("qalign", folder / "config.json", self._tools.weights)
        sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.suffix in (".bin", ".safetensors")}
        return {"network": "Q-Align", "sha256": digest, "files": sizes, "view": vars(self._view)}

    def watch(self, pictures: Seen, known: Arrays, span: tuple[float, float] | None) -> Watcher:
        """As `PictureNetwork.watch`."""
        return BatchWatcher(self._view.grid(pictures, span), np.array, self._embed, batch=1)

    def _embed(self, held: list[np.ndarray]) -> Arrays:
        weights = self._tools.weights
        scorer = load_qalign(str(Path(weights.qalign).expanduser()), self._tools.device, weights.trust_remote_code, weights.qalign_python)
        return {name: np.array([value]) for name, value in scorer.scores([Image.fromarray(held[0])]).items()}


@lru_cache(maxsize=1)
def load_qalign(folder: str, device: str, trust: bool, python: str) -> QAlign | RemoteQAlign:
    """The scorer in a folder, in this process or, if `python` is given, in one of that environment; ValueError as `QAlign`."""
    where = str(resolve_device(device))
    return RemoteQAlign(folder, where, trust, python) if python else QAlign(folder, where, trust)

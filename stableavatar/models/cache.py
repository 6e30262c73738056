"""Key/value caches: keys are kept before rotation, with their positions, so that a driver may move them."""

import torch
from torch import Tensor

Positions = tuple[float, ...]


class NoCache:
    """Keeps nothing: keys and values are those of the current forward."""

    def extend(self, layer: int, keys: Tensor, values: Tensor, positions: Positions) -> tuple[Tensor, Tensor, Positions]:
        """Returns the keys [B, L, H, d], values and frame positions that layer `layer` attends to."""
        return keys, values, positions


NO_CACHE = NoCache()


class KVCache(NoCache):
    """Puts the stored frames of every layer before the current ones; stores the current ones while `recording`."""

    def __init__(self) -> None:
        self.recording = True
        self._layers: dict[int, tuple[Tensor, Tensor, Positions]] = {}

    def extend(self, layer: int, keys: Tensor, values: Tensor, positions: Positions) -> tuple[Tensor, Tensor, Positions]:
        """As `NoCache.extend`, with what was recorded first."""
        extended = (keys, values, positions)
        if layer in self._layers:
            past_keys, past_values, past_positions = self._layers[layer]
            extended = (torch.cat([past_keys, keys], 1), torch.cat([past_values, values], 1), past_positions + positions)
        if self.recording:
            self._layers[layer] = extended
        return extended

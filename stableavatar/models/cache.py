"""Key/value caches: keys are kept before rotation, with their positions, so that a driver may move them."""

import torch
from torch import Tensor

from stableavatar.models.rope import Positions, Rotary


class NoCache:
    """Keeps nothing: keys and values are those of the current forward."""

    def extend(self, layer: int, keys: Tensor, values: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values that a layer attends to, and the rotary table of those keys.

        Args:
            keys, values: [B, L, heads, d] of the current frames, keys not yet rotated.
            rotary: positions and table of the current frames.
        """
        return keys, values, rotary.table


NO_CACHE = NoCache()


class KVCache(NoCache):
    """Puts the stored frames of every layer before the current ones; stores the current ones while `recording`.

    Frames are stored by their positions: a forward that is repeated (another guidance pass has a cache of its own; gradient
    checkpointing computes a block twice) stores its frames once and never sees them as past.
    """

    def __init__(self) -> None:
        self.recording = True
        self._layers: dict[int, dict[Positions, tuple[Tensor, Tensor]]] = {}

    def extend(self, layer: int, keys: Tensor, values: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor, Tensor]:
        """As `NoCache.extend`, with what was recorded at other positions first."""
        positions = rotary.positions
        stored = self._layers.setdefault(layer, {})
        past = [(frames, pair) for frames, pair in stored.items() if frames != positions]
        if self.recording:
            stored[positions] = (keys, values)
        all_keys = torch.cat([*(pair[0] for _, pair in past), keys], dim=1)
        all_values = torch.cat([*(pair[1] for _, pair in past), values], dim=1)
        return all_keys, all_values, rotary.table_at(sum((frames for frames, _ in past), ()) + positions)

"""Reuse of predictions across steps, with one state for every window and guidance pass.

The criterion is EasyCache's (arXiv 2507.02860): how fast the prediction changed relative to its input, last time both were
computed, tells how much it will change now; predictions are reused until the accumulated estimate passes a threshold.
Rectified flow's velocity is constant along a straight path, so the velocity itself is what is reused.
"""

from dataclasses import dataclass

from torch import Tensor

Key = tuple[int, str, str]
"""(window, text, audio)"""


@dataclass
class _Entry:
    computed_at: Tensor
    latents: Tensor
    velocity: Tensor
    rate: float | None = None
    error: float = 0.0


class StepCache:
    """Decides, per window and pass, whether the last velocity still serves.

    Args:
        threshold: tolerated relative change of a velocity; 0 turns the cache off.
        steps: of the schedule; the first two and the last are always computed.
    """

    def __init__(self, threshold: float, steps: int) -> None:
        self.threshold, self.steps = threshold, steps
        self.reused = 0
        self._entries: dict[Key, _Entry] = {}

    def lookup(self, key: Key, latents: Tensor, step: int) -> Tensor | None:
        """The velocity to reuse for latents [C, F, h, w] at a step, or None where it must be computed."""
        entry = self._entries.get(key)
        if entry is None or entry.rate is None or step >= self.steps - 1:
            return None
        change = (latents - entry.latents).abs().mean() / entry.velocity.abs().mean().clamp_min(1e-12)
        if entry.error + entry.rate * float(change) >= self.threshold:
            return None
        entry.error += entry.rate * float(change)
        entry.latents = latents
        self.reused += 1
        return entry.velocity

    def record(self, key: Key, latents: Tensor, velocity: Tensor) -> None:
        """Remembers a computed velocity."""
        if self.threshold <= 0:
            return
        last, rate = self._entries.get(key), None
        if last is not None:
            moved = float((latents - last.computed_at).abs().mean())
            rate = float((velocity - last.velocity).abs().mean()) / max(moved, 1e-12)
        self._entries[key] = _Entry(latents, latents, velocity, rate)

    def forget(self, window: int) -> None:
        """Lets go of a window that is finished."""
        self._entries = {key: entry for key, entry in self._entries.items() if key[0] != window}

    def state(self) -> dict:
        """Entries as plain tensors and numbers."""
        return {key: vars(entry) for key, entry in self._entries.items()}

    def restore(self, state: dict) -> None:
        """Takes over what `state` gave."""
        self._entries = {key: _Entry(**entry) for key, entry in state.items()}

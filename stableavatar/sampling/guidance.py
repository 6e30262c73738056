"""Guidance strategies as data: which passes to run through the network, and each pass's weight in the sum.

Every strategy here is linear in the predictions, so that a list of weighted passes says all of it.
"""

from dataclasses import dataclass
from enum import Enum

from torch import Tensor

STRATEGIES = ("none", "cfg", "audio_native")


class Text(Enum):
    """Which prompt a pass is told."""

    POSITIVE = "positive"
    NEGATIVE = "negative"


class Audio(Enum):
    """What a pass hears: the voice; null (zero wav2vec features through the adapter); dropped (zero refined tokens)."""

    SPEECH = "speech"
    NULL = "null"
    DROPPED = "dropped"


@dataclass(frozen=True)
class Pass:
    """One evaluation of the network and its weight in the guided velocity."""

    text: Text
    audio: Audio
    weight: float


PLAIN = (Pass(Text.POSITIVE, Audio.SPEECH, 1.0),)


@dataclass(frozen=True)
class Guidance:
    """A strategy with its scales, on during a part of the steps.

    Attributes:
        name: `none`; `cfg`, the released three branches, u + audio_scale (a - u) + text_scale (c - a);
            `audio_native`, equation 10 of the paper.
        text_scale, audio_scale: of `cfg`.
        alpha, beta: of `audio_native`.
        start, end: fractions of the steps between which guidance is on; outside them only the conditional pass runs.
    """

    name: str = "cfg"
    text_scale: float = 3.0
    audio_scale: float = 5.0
    alpha: float = 4.5
    beta: float = 3.0
    start: float = 0.0
    end: float = 1.0

    def passes(self, step: int, steps: int) -> tuple[Pass, ...]:
        """The passes of a step; those of weight zero are left out."""
        if not self.start <= step / steps < self.end or self.name == "none":
            return PLAIN
        return tuple(p for p in getattr(self, f"_{self.name}")() if p.weight)

    def _cfg(self) -> tuple[Pass, ...]:
        return (
            Pass(Text.NEGATIVE, Audio.DROPPED, 1 - self.audio_scale),
            Pass(Text.NEGATIVE, Audio.SPEECH, self.audio_scale - self.text_scale),
            Pass(Text.POSITIVE, Audio.SPEECH, self.text_scale),
        )

    def _audio_native(self) -> tuple[Pass, ...]:
        return (
            Pass(Text.POSITIVE, Audio.SPEECH, 1 + self.alpha + self.beta),
            Pass(Text.POSITIVE, Audio.NULL, -self.alpha),
            Pass(Text.POSITIVE, Audio.DROPPED, -self.beta),
        )


class PassShares:
    """Who evaluates which pass of a step: this process all of them; parallel/guidance.py shares them out."""

    def own(self, passes: tuple[Pass, ...]) -> tuple[Pass, ...]:
        """The passes that this process evaluates, in their order."""
        return passes

    def gather(self, own: list[Tensor], count: int, latents: Tensor) -> list[Tensor]:
        """The velocities of all `count` passes in their order, each like `latents`, from those that this process evaluated."""
        return own


ALL_PASSES = PassShares()

"""Where tokens stand in time and which tokens see which: data that the caller hands to the model."""

from dataclasses import dataclass

Rule = tuple[slice, tuple[slice, ...]]
"""(query frames, key frames): a rectangle of the attention matrix; several key slices are read as one."""

Plan = tuple[Rule, ...]


def in_tokens(plan: Plan, queries: int, keys: int) -> Plan:
    """Rectangles of frames as rectangles of tokens, of which a frame has `queries` among the queries and `keys` among the keys."""

    def scale(frames: slice, tokens: int) -> slice:
        return slice(frames.start * tokens, frames.stop * tokens)

    return tuple((scale(rows, queries), tuple(scale(c, keys) for c in columns)) for rows, columns in plan)


@dataclass(frozen=True)
class TokenLayout:
    """Temporal positions and the attention plan of one forward, in latent frames.

    Attributes:
        positions: one temporal position per latent frame; negative and fractional values are allowed.
        plan: rectangles of self-attention, in latent frames, their queries in order and without gaps; empty: everything sees
            everything. Key slices count the keys that the cache returns (stored frames first).
        clip_audio: latent tokens see the audio of all frames instead of their own frame's (clip-level mode).
    """

    positions: tuple[float, ...]
    plan: Plan = ()
    clip_audio: bool = False

    def __post_init__(self) -> None:
        stops = [0, *(rows.stop for rows, _ in self.plan)]
        if self.plan and ([rows.start for rows, _ in self.plan] != stops[:-1] or stops[-1] != self.frames):
            raise ValueError(f"attention plan {self.plan} must cover the query frames 0..{self.frames} in order and without gaps")

    @classmethod
    def full(cls, frames: int, clip_audio: bool = False) -> "TokenLayout":
        """Positions 0, 1, 2, ... and full attention: the layout of Wan and of StableAvatar."""
        return cls(tuple(float(i) for i in range(frames)), clip_audio=clip_audio)

    @property
    def frames(self) -> int:
        """Latent frames of the forward."""
        return len(self.positions)

    @property
    def audio_group(self) -> int:
        """Latent frames that share their audio tokens: one, or all of them."""
        return self.frames if self.clip_audio else 1

    def token_plan(self, tokens_per_frame: int) -> Plan:
        """The plan in tokens."""
        return in_tokens(self.plan, tokens_per_frame, tokens_per_frame)

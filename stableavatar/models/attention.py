"""Self-attention over latent tokens; cross-attention as the sum of a text, an image and an audio branch.

Shapes: B batch, F latent frames, S tokens per frame, D width, N audio tokens per frame, K context tokens.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from stableavatar.models import kernels
from stableavatar.models.cache import NoCache
from stableavatar.models.layout import TokenLayout
from stableavatar.models.modulation import RMSNorm
from stableavatar.models.rope import Rotary, rotate


@dataclass(frozen=True)
class Context:
    """What latent tokens cross-attend to, already in the model's width.

    Attributes:
        text: [B, K, D]; image: [B, 257, D]; audio: refined tokens [B, F, N, D].
        audio_mask: [F, N] bool, False for padding that nobody may see; None where padding is seen (as released).
    """

    text: Tensor
    image: Tensor
    audio: Tensor
    audio_mask: Tensor | None = None


class Attention(nn.Module):
    """Projections q, k, v, o with RMS norm over the whole width on q and k, before heads are split."""

    def __init__(self, dim: int, heads: int, eps: float) -> None:
        super().__init__()
        self.heads = heads
        self.head_dim = dim // heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(dim, eps), RMSNorm(dim, eps)
        self.attend: kernels.Attend = kernels.attend

    def split(self, x: Tensor) -> Tensor:
        """[..., L, D] -> [..., L, heads, d]"""
        return x.unflatten(-1, (self.heads, self.head_dim))


class SelfAttention(Attention):
    """Full, or as the layout's plan says, with rotary positions."""

    def forward(self, x: Tensor, layout: TokenLayout, rotary: Rotary, cache: NoCache, layer: int) -> Tensor:
        """x [B, F, S, D] -> [B, F, S, D]"""
        tokens = x.flatten(1, 2)
        q, k, v = self.split(self.norm_q(self.q(tokens))), self.split(self.norm_k(self.k(tokens))), self.split(self.v(tokens))
        k, v, key_table = cache.extend(layer, k, v, rotary)
        q, k = rotate(q, rotary.table), rotate(k, key_table)
        attended = self.attend(q, k, v, layout.token_plan(x.shape[2]))
        return self.o(attended.flatten(2)).view_as(x)


class CrossAttention(Attention):
    """Queries of one sequence, keys and values of another."""

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """x [B, L, D], context [B, K, D] -> [B, L, D]"""
        q = self.split(self.norm_q(self.q(x)))
        k, v = self.split(self.norm_k(self.k(context))), self.split(self.v(context))
        return self.o(self.attend(q, k, v).flatten(2))


class ConditionAttention(Attention):
    """One query, three key/value sets: softmax over each alone, the results summed before the output projection.

    Audio is local in time: the tokens of a group of latent frames see the audio tokens of that group, a group being one
    frame or the whole clip (`layout.audio_group`).
    """

    def __init__(self, dim: int, heads: int, eps: float) -> None:
        super().__init__(dim, heads, eps)
        self.k_img, self.v_img, self.norm_k_img = nn.Linear(dim, dim), nn.Linear(dim, dim), RMSNorm(dim, eps)
        self.k_audio, self.v_audio = nn.Linear(dim, dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor, context: Context, layout: TokenLayout) -> Tensor:
        """x [B, F, S, D] -> [B, F, S, D]"""
        q = self.split(self.norm_q(self.q(x)))
        tokens = q.flatten(1, 2)
        attended = self.attend(tokens, self.split(self.norm_k(self.k(context.text))), self.split(self.v(context.text)))
        image = self.split(self.norm_k_img(self.k_img(context.image))), self.split(self.v_img(context.image))
        attended = attended + self.attend(tokens, *image)
        return self.o((attended + self._audio(q, context, layout.audio_group)).flatten(2)).view_as(x)

    def _audio(self, q: Tensor, context: Context, group: int) -> Tensor:
        """q [B, F, S, heads, d] -> [B, F * S, heads, d]"""

        def by_group(x: Tensor) -> Tensor:
            return x.unflatten(1, (-1, group)).flatten(2, 3).flatten(0, 1)

        mask = context.audio_mask
        if mask is not None:
            mask = by_group(mask.expand(len(q), -1, -1))
        k, v = self.split(self.k_audio(context.audio)), self.split(self.v_audio(context.audio))
        attended = self.attend(by_group(q), by_group(k), by_group(v), key_mask=mask)
        return attended.reshape(len(q), -1, self.heads, self.head_dim)

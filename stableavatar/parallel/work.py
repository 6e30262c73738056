"""What one process of several computes and holds in a forward, read off the transformer itself on tensors without memory.

The process is the first of its sequence group, which has the most tokens and heads where these do not divide.
Shapes: B batch, F latent frames, h x w latent height and width, S = h/2 * w/2 tokens per frame, H heads, d width of a head.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from stableavatar.geometry import LATENT_CHANNELS, PATCH
from stableavatar.models import kernels
from stableavatar.models.dit import AvatarTransformer
from stableavatar.models.layout import Plan, TokenLayout
from stableavatar.models.rope import Rotary
from stableavatar.models.strict_loading import kept_in_float32
from stableavatar.parallel.ulysses import split_sizes
from stableavatar.training.cost import Meter, PartOfSequence, Shape, make_inputs, without_memory
from stableavatar.vae import WanVAE


@dataclass(frozen=True)
class Work:
    """Of one forward in one process.

    Attributes:
        outside: operations before and after the blocks: embeddings, conditions and audio adapter, which every process of a sequence
            group computes whole, and the head.
        block: operations of a block; attention: those of its self-attention.
        outside_activations, activations: the most bytes alive at once beside the weights, outside and in a block.
    """

    outside: float
    block: float
    attention: float
    outside_activations: float
    activations: float

    @property
    def peak(self) -> float:
        """The most bytes alive at once."""
        return max(self.activations, self.outside_activations)


class PartInInference(PartOfSequence):
    """A process of a sequence group whose keys travel around a ring in parts, under a meter that is read on the way."""

    def __init__(self, ring: int, ulysses: int, meter: Meter) -> None:
        super().__init__(ring * ulysses)
        self.ring, self.ulysses, self.meter = ring, ulysses, meter
        self.marks: list[tuple[int, int]] = []
        self.attention = 0

    def mark(self) -> None:
        """Notes the operations so far, and the most bytes that were alive since the last mark."""
        self.marks.append((self.meter.flops, self.meter.peak))
        self.meter.restart()

    def shard(self, x: Tensor, layout: TokenLayout, rotary: Rotary) -> tuple[Tensor, TokenLayout, Rotary]:
        """As `PartOfSequence.shard`."""
        self.mark()
        return super().shard(x, layout, rotary)

    def attend_in_parts(self, q: Tensor, k: Tensor, v: Tensor, plan: Plan = ()) -> Tensor:
        """All heads of some tokens become some heads of more tokens, whose keys come in `ring` parts; and back."""
        start, heads = self.meter.flops, split_sizes(q.shape[2], self.ulysses)[0]
        sizes = split_sizes(self.tokens, self.processes)

        def tensors(count: int, ring_rank: int) -> tuple[Tensor, ...]:
            tokens = q.shape[1] // sizes[0] * sum(sizes[ring_rank * self.ulysses : (ring_rank + 1) * self.ulysses])
            return q.new_empty(count, len(q), tokens, heads, q.shape[3]).unbind()

        leaving = q.new_empty(3, *q.shape) if self.ulysses > 1 else None
        queries, *present = tensors(3, 0)
        merged = queries.new_empty(queries.shape, dtype=torch.float32) if self.ring > 1 else None
        for ring_rank in range(self.ring):
            coming = tensors(2, ring_rank + 1) if ring_rank + 1 < self.ring else present
            attended = kernels.attend(queries, *present)
            present = coming
        self.attention += self.meter.flops - start
        del leaving, merged
        return torch.empty_like(q) if self.ulysses > 1 else attended


def _cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Weights become `dtype`, but for those that the class keeps in float32."""
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(torch.float32 if kept_in_float32(model, name, dtype) else dtype)


@dataclass(frozen=True)
class Size:
    """A transformer by its settings, and the precision it computes in.

    Attributes:
        settings: those of `AvatarTransformer` that differ from its defaults, as sorted pairs.
    """

    settings: tuple[tuple[str, Any], ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, settings: Mapping[str, Any], dtype: torch.dtype) -> "Size":
        """From settings as a config.json has them."""
        return cls(tuple(sorted((key, tuple(value) if isinstance(value, list) else value) for key, value in settings.items())), dtype)

    @property
    def full(self) -> dict[str, Any]:
        """All settings."""
        defaults = signature(AvatarTransformer).parameters
        return {name: parameter.default for name, parameter in defaults.items()} | dict(self.settings)

    @property
    def heads(self) -> int:
        """Attention heads."""
        return self.full["num_heads"]

    def build(self, **changes: Any) -> AvatarTransformer:
        """The transformer; its weights take the dtype that they are loaded in."""
        model = AvatarTransformer(**dict(self.settings) | changes).eval().requires_grad_(False)
        _cast(model, self.dtype)
        return model


@cache
def weights(size: Size) -> tuple[int, int]:
    """Bytes of a transformer's weights outside its blocks, and in each block."""
    with without_memory():
        model = size.build(num_layers=1)
        block = sum(p.nbytes for p in model.blocks.parameters())
        return sum(p.nbytes for p in model.parameters()) - block, block


@cache
def read_work(size: Size, shape: Shape, batch: int, ring: int, ulysses: int) -> Work:
    """What a transformer of one block does with `batch` samples of F, h, w."""
    with without_memory(), torch.no_grad():
        model = size.build(num_layers=1)
        inputs = make_inputs(model, shape, batch)
        with Meter(model.parameters()) as meter:
            model.sequence = part = PartInInference(ring, ulysses, meter)
            model.blocks[0].self_attn.attend = part.attend_in_parts
            model.blocks[0].register_forward_hook(lambda *_: part.mark())
            model(*inputs)
            part.mark()
    (before, peak_before), (blocks, peak), (whole, peak_after) = part.marks
    return Work(before + whole - blocks, blocks - before, part.attention, max(peak_before, peak_after), peak)


def forward_work(size: Size, shape: Shape, batch: int, ring: int = 1, ulysses: int = 1) -> Work:
    """The work of a forward with `batch` samples of F, h, w, in a straight line between what one process and one of 2 x 2 do.

    All but self-attention grows with the tokens of the process; what does not is the keys and values of text, image and audio.
    """
    tokens, parts = shape[1] // PATCH * (shape[2] // PATCH), ring * ulysses
    alone = read_work(size, shape, batch, 1, 1)
    if parts == 1:
        return alone
    shared, sizes = read_work(size, shape, batch, 2, 2), split_sizes(tokens, parts)

    def along(one: float, four: float) -> float:
        fewest = split_sizes(tokens, 4)[0]
        return four + (one - four) * (sizes[0] - fewest) / (tokens - fewest)

    heads = split_sizes(size.heads, ulysses)[0]
    attention = alone.attention * sum(sizes[:ulysses]) * heads / (tokens * size.heads)
    block = along(alone.block - alone.attention, shared.block - shared.attention) + attention
    outside = along(alone.outside, shared.outside), along(alone.outside_activations, shared.outside_activations)
    return Work(outside[0], block, attention, outside[1], along(alone.activations, shared.activations))


@cache
def decode_work(height: int, width: int, tiling: bool) -> tuple[float, int]:
    """Operations and the most bytes alive while the published VAE decodes one latent frame of h x w into four of pixels."""
    with without_memory():
        vae = WanVAE().eval()
        if tiling:
            vae.enable_tiling()
        with Meter(vae.parameters()) as meter:
            stream = vae.decode_stream(torch.zeros(LATENT_CHANNELS, 1, height, width) for _ in range(3))
            for _ in range(2):
                next(stream)
            start = meter.flops
            next(stream)
    return meter.flops - start, meter.peak

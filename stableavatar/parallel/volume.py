"""Bytes that one process sends to others, by kind of message: the formulas behind what `Traffic` counts."""

from stableavatar.geometry import LATENT_CHANNELS, PATCH
from stableavatar.parallel.ulysses import split_sizes
from stableavatar.parallel.windows import WindowShares
from stableavatar.parallel.work import Size
from stableavatar.training.cost import Shape

FLOAT32 = 4
"""Bytes of a number in latents and velocities, which stay on the host, and in what a ring merges."""


def forward_bytes(size: Size, shape: Shape, batch: int, ring: int, ulysses: int, rank: int = 0) -> dict[str, int]:
    """What a process of a sequence group sends in one forward of the transformer.

    Of T tokens per frame in its Ulysses group it has t, and h of H heads. Ulysses sends queries, keys and values of the other heads
    away and results of the others' tokens back: F * d * (3 t (H - h) + (T - t) h) numbers in every block; the ring keys and values of
    its heads, for the tokens of every Ulysses group but the next one's; the gather the velocity of its tokens, padded to the largest
    part, to all others.

    Args:
        shape: F, h, w of the latents.
        rank: in the group: ring rank * ulysses + ulysses rank.
    """
    full, tokens = size.full, shape[1] // PATCH * (shape[2] // PATCH)
    sizes, heads = split_sizes(tokens, ring * ulysses), split_sizes(full["num_heads"], ulysses)
    ring_rank, place = divmod(rank, ulysses)
    by_ring = [sum(sizes[i : i + ulysses]) for i in range(0, len(sizes), ulysses)]
    mine, own_heads, group = sizes[rank], heads[place], by_ring[ring_rank]
    per_head = full["num_layers"] * batch * shape[0] * (full["dim"] // full["num_heads"]) * size.dtype.itemsize
    swapped = 3 * mine * (full["num_heads"] - own_heads) + (group - mine) * own_heads
    passed_on = tokens - by_ring[(ring_rank + 1) % ring] if ring > 1 else 0
    velocity = batch * shape[0] * max(sizes) * PATCH * PATCH * full["out_channels"] * size.dtype.itemsize
    sent = {"ulysses": per_head * swapped, "ring": 2 * per_head * own_heads * passed_on, "gather": (len(sizes) - 1) * velocity}
    return {kind: count for kind, count in sent.items() if count}


def copied_bytes(size: Size, shape: Shape, batch: int, ring: int, ulysses: int) -> int:
    """What goes through the first process's own memory in a block so that it can be sent and put together.

    Ulysses copies queries, keys and values three times and the result twice; a ring merges every part into the result in float32.
    """
    full, element = size.full, size.dtype.itemsize
    sizes, heads = split_sizes(shape[1] // PATCH * (shape[2] // PATCH), ring * ulysses), split_sizes(full["num_heads"], ulysses)
    per_token = batch * shape[0] * full["dim"] // full["num_heads"]
    packing = 11 * 2 * element * sizes[0] * full["num_heads"] if ulysses > 1 else 0
    merging = ring * (4 * FLOAT32 + element) * sum(sizes[:ulysses]) * heads[0] if ring > 1 else 0
    return per_token * (packing + merging)


def velocity_bytes(shape: Shape) -> int:
    """Of a prediction, or of latents, F, h, w."""
    return FLOAT32 * LATENT_CHANNELS * shape[0] * shape[1] * shape[2]


def window_bytes(shares: WindowShares, steps: int, height: int, width: int) -> dict[str, int]:
    """What all processes together send in a whole run of windows of h x w latents."""
    return {kind: frames * velocity_bytes((1, height, width)) for kind, frames in shares.frames_sent(steps).items()}

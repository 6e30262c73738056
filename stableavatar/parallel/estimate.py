"""How long a video takes on every mesh of some GPUs, and whether it fits: a small analytic model.

    forward = outside / rate + blocks * (block / rate + what is not hidden of its messages) + gather
    video   = sum over rounds of the busiest window process's forwards, their velocities' way to the others, + decode

A round is a set of windows' steps that do not depend on one another; in a guidance group the passes of a step take as long as those
of the process with most of them. The first process decodes alone. Operations and bytes are those of the process with most tokens and
heads, read off the transformer itself (`work`, `volume`). Not in it: loading, text, image and audio encoders, compression of the video.
"""

from collections import Counter
from dataclasses import dataclass, field
from functools import cache, cached_property
from itertools import product
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from stableavatar import geometry
from stableavatar.config import InferenceConfig
from stableavatar.parallel.sequence import check_sequence
from stableavatar.parallel.volume import copied_bytes, forward_bytes, velocity_bytes, window_bytes
from stableavatar.parallel.windows import WindowShares
from stableavatar.parallel.work import Size, Work, decode_work, forward_work, weights
from stableavatar.sampling.guidance import Guidance
from stableavatar.sampling.windows import WindowPlan
from stableavatar.training.cost import Shape
from stableavatar.training.estimate import A100_FLOPS, EXPECTED_SHARE, GATHERED_BLOCKS, GIB, RUNTIME, encoder_sizes

GIGA = 1e9
ORDERS = ("step_major", "wavefront")


class MeshSizes(NamedTuple):
    """Processes along the dimensions of a mesh."""

    windows: int = 1
    guidance: int = 1
    ring: int = 1
    ulysses: int = 1

    @property
    def sequence(self) -> int:
        """Processes that share a sequence."""
        return self.ring * self.ulysses

    def __str__(self) -> str:
        return " x ".join(map(str, self))


@dataclass(frozen=True)
class Cluster:
    """The GPUs and what lies between them.

    Attributes:
        memory: of a GPU, in bytes.
        rate: operations per second that a GPU reaches in the transformer; decode_rate: in the VAE.
        link, network: bytes per second that a GPU sends to others inside its machine, and to those of another one.
        host: bytes per second between the hosts' memories, where latents are; copy: from a host to its GPU;
            stream: within a GPU's memory.
        machine: GPUs in a machine.
        latency: seconds that a message takes beside its bytes.
    """

    memory: float = 80 * GIB
    rate: float = A100_FLOPS * EXPECTED_SHARE
    decode_rate: float = A100_FLOPS * 0.1
    link: float = 300 * GIGA
    network: float = 25 * GIGA
    host: float = 1 * GIGA
    copy: float = 25 * GIGA
    stream: float = 1500 * GIGA
    machine: int = 8
    latency: float = 20e-6

    def bandwidth(self, neighbours: int) -> float:
        """Between processes that lie within so many consecutive ones."""
        return self.link if neighbours <= self.machine and not self.machine % neighbours else self.network


@dataclass(frozen=True)
class Job:
    """A video to be made.

    Attributes:
        height, width: of the latents; frames: of the video.
        passes: through the network in every step.
    """

    size: Size
    plan: WindowPlan
    height: int
    width: int
    frames: int
    passes: tuple[int, ...]
    config: InferenceConfig = field(repr=False, hash=False)

    @classmethod
    def of(cls, config: InferenceConfig, size: Size, frames: int) -> "Job":
        """As the settings say, for so many video frames."""
        if min(config.width, config.height) < 2 * geometry.SIZE_MULTIPLE:
            raise ValueError(f"a plan needs pictures of at least 32x32, got {config.width}x{config.height}")
        windows = config.windows
        length, total = geometry.frames_to_latents(windows.frames), geometry.frames_to_latents(frames)
        plan = WindowPlan.sliding(total, length, windows.overlap, windows.tail, windows.weights)
        guidance = {key: value for key, value in vars(config.guidance).items() if key != "batched"}
        passes = tuple(len(Guidance(**guidance).passes(step, config.steps)) for step in range(config.steps))
        height, width = (geometry.round_size(side) // geometry.SPATIAL_STRIDE for side in (config.height, config.width))
        return cls(size, plan, height, width, frames, passes, config)

    @property
    def shape(self) -> Shape:
        """F, h, w of a whole window."""
        return self.plan.windows[0].stop, self.height, self.width

    def batch(self, guidance: int) -> int:
        """Passes that a process runs at once."""
        return -(-max(self.passes) // guidance) if self.config.guidance.batched else 1

    @cached_property
    def encoders(self) -> dict[str, int]:
        """Bytes of text, image and speech encoder and VAE by name."""
        return encoder_sizes(self.config.model, self.size.dtype)


@dataclass(frozen=True)
class Forecast:
    """What a mesh would do.

    Attributes:
        order: of the windows; the video is the same.
        memory: bytes on the first GPU at the worst moment.
        forward: seconds of a window's pass through the network, of which `replicated` is work that does not shrink with the group.
        step, denoise, decode, first: seconds of a step of all windows on average, of all steps, of decoding all, and until the first
            frames are there.
        sent: bytes of the first process in a step, by kind.
    """

    sizes: MeshSizes
    order: str
    memory: float
    forward: float
    replicated: float
    step: float
    denoise: float
    decode: float
    first: float
    sent: dict[str, float]

    @property
    def video(self) -> float:
        """Seconds of all of it."""
        return self.denoise + self.decode


def meshes(gpus: int) -> list[MeshSizes]:
    """All of exactly so many processes."""
    divisors = [n for n in range(1, gpus + 1) if gpus % n == 0]
    return [MeshSizes(*sizes) for sizes in product(divisors, repeat=4) if prod(sizes) == gpus]


def check(job: Job, sizes: MeshSizes) -> None:
    """Raises ValueError for a mesh some of whose processes would have nothing to do."""
    if sizes.windows > len(job.plan):
        raise ValueError(f"windows: more than the {len(job.plan)} of the video")
    if sizes.windows > 1 and job.config.windows.strategy == "motion_frame":
        raise ValueError("windows: motion_frame makes clip after clip")
    if sizes.guidance > max(job.passes):
        raise ValueError(f"guidance: more than the {max(job.passes)} passes of a step")
    if job.config.parallel.shard and sizes.sequence == 1:
        raise ValueError("shard: weights are dealt out to ring x ulysses processes")
    check_sequence(job.size.heads, job.height * job.width // geometry.PATCH**2, sizes.ulysses, sizes.ring)


def forecast(job: Job, cluster: Cluster, sizes: MeshSizes, order: str) -> Forecast:
    """Of a mesh that passes `check`."""
    share, together = -(-max(job.passes) // sizes.guidance), job.batch(sizes.guidance)
    work = forward_work(job.size, job.shape, together, sizes.ring, sizes.ulysses)
    forward, outside = forward_seconds(job, cluster, sizes, work), work.outside / cluster.rate
    exchange = velocity_bytes(job.shape) / cluster.host if sizes.guidance > 1 else 0
    overlap = max(map(job.plan.overlap, range(len(job.plan))))
    edges = 2 * velocity_bytes((overlap, job.height, job.width)) / cluster.host if sizes.windows > 1 else 0
    seconds = torch.tensor([-(-n // sizes.guidance) * forward / together + n * exchange for n in sorted(set(job.passes))])
    rounds, first = busiest(job.plan, order, sizes.windows, job.passes)
    by_round = (rounds @ seconds.double()).amax(1) + edges
    latent, decode_peak = decode_work(job.height, job.width, job.config.memory.vae_tiling)
    decode = latent / cluster.decode_rate
    start = job.plan.stretch(0)
    return Forecast(
        sizes, order, device_bytes(job, sizes, work.peak, decode_peak), forward / together, outside / forward,
        float(by_round.sum()) / len(job.passes), float(by_round.sum()), job.plan.total * decode,
        float(by_round[: first + 1].sum()) + (start.stop - start.start) * decode, step_bytes(job, sizes, order, share),
    )  # fmt: skip


def forward_seconds(job: Job, cluster: Cluster, sizes: MeshSizes, work: Work) -> float:
    """Of a forward with as many passes as run at once.

    Ulysses waits for its messages; a part of the ring, or a block's weights, travels while the block before computes.
    """
    layers, parts = job.size.full["num_layers"], sizes.sequence
    sent = forward_bytes(job.size, job.shape, job.batch(sizes.guidance), sizes.ring, sizes.ulysses)
    near, wide = cluster.bandwidth(sizes.ulysses), cluster.bandwidth(parts)
    block = work.block / cluster.rate
    waiting = copied_bytes(job.size, job.shape, job.batch(sizes.guidance), sizes.ring, sizes.ulysses) / cluster.stream
    waiting += sent.get("ulysses", 0) / layers / near + (2 * cluster.latency if sizes.ulysses > 1 else 0)
    if sizes.ring > 1:
        hop = sent["ring"] / layers / (sizes.ring - 1) / wide + cluster.latency
        waiting += (sizes.ring - 1) * max(0, hop - work.attention / sizes.ring / cluster.rate)
    if job.config.parallel.shard:
        held = weights(job.size)[1] / parts
        fetch = held / cluster.copy if job.config.parallel.offload else 0
        waiting += max(0, fetch + (parts - 1) * held / wide + cluster.latency - block - waiting)
    gather = sent.get("gather", 0) / wide + (cluster.latency if parts > 1 else 0)
    return work.outside / cluster.rate + layers * (block + waiting) + gather


@cache
def busiest(plan: WindowPlan, order: str, ranks: int, passes: tuple[int, ...]) -> tuple[Tensor, int]:
    """Windows that every process brings through a step in every round [rounds, ranks, kinds], by the passes of the step; a
    shorter window counts as a part of a whole one. And the round that finishes the first window."""
    shares, kinds, steps = WindowShares(plan, order, ranks), sorted(set(passes)), len(passes)
    rounds, first = shares.rounds(steps) if ranks > 1 else [[pair] for pair in plan.order(steps, order)], 0
    found = torch.zeros(len(rounds), ranks, len(kinds), dtype=torch.float64)
    for number, pairs in enumerate(rounds):
        for window, step in pairs:
            start, stop = plan.windows[window]
            found[number, shares.owner(window), kinds.index(passes[step])] += (stop - start) / plan.windows[0].stop
            first = number if (window, step) == (0, steps - 1) else first
    return found, first


def device_bytes(job: Job, sizes: MeshSizes, forward: float, decode: float) -> float:
    """On the first GPU at the worst moment of a video: weights, and the larger of what a forward and a decoded frame hold."""
    outside, block = weights(job.size)
    settings, layers = job.config, job.size.full["num_layers"]
    block = block / job.size.dtype.itemsize if settings.memory.fp8 else block
    encoders, whole = dict(job.encoders), outside + layers * block
    if settings.parallel.shard:
        kept = 0 if settings.parallel.offload else 1 / sizes.sequence
        whole, encoders["text_encoder"] = kept * whole + outside + GATHERED_BLOCKS * block, kept * encoders["text_encoder"]
    if settings.memory.mode == "full":
        return RUNTIME + whole + sum(encoders.values()) + max(forward, decode)
    visiting = {"model_offload": whole, "group_offload": outside + GATHERED_BLOCKS * block, "sequential_offload": block}
    one_by_one = settings.memory.mode != "model_offload"
    return RUNTIME + max(0 if one_by_one else max(encoders.values()), visiting[settings.memory.mode] + forward, encoders["vae"] + decode)


def step_bytes(job: Job, sizes: MeshSizes, order: str, passes: int) -> dict[str, float]:
    """That the first process sends in a step with all passes, of which `passes` are its own."""
    shares, steps = WindowShares(job.plan, order, sizes.windows), len(job.passes)
    windows = sum(stop - start for i, (start, stop) in enumerate(job.plan.windows) if not shares.owner(i)) / job.shape[0]
    sent = {kind: windows * passes * count for kind, count in forward_bytes(job.size, job.shape, 1, sizes.ring, sizes.ulysses).items()}
    sent["guidance"] = windows * passes * velocity_bytes(job.shape) * (sizes.guidance - 1)
    sent["windows"] = sum(window_bytes(shares, steps, job.height, job.width).values()) / steps / sizes.windows
    return {kind: count for kind, count in sent.items() if count}


def rank_meshes(job: Job, cluster: Cluster, gpus: int) -> tuple[list[Forecast], Counter[str]]:
    """Forecasts of the meshes of so many GPUs that fit, the fastest first, and why how many others fall out."""
    found, refused = [], Counter()
    for sizes in meshes(gpus):
        try:
            check(job, sizes)
        except ValueError as error:
            refused[str(error)] += 1
            continue
        found.append(best_order(job, cluster, sizes))
    fitting = [each for each in found if each.memory <= cluster.memory]
    refused[f"memory: more than {cluster.memory / GIB:g} GiB on a GPU"] += len(found) - len(fitting)
    return sorted(fitting, key=lambda each: each.video), +refused


def best_order(job: Job, cluster: Cluster, sizes: MeshSizes) -> Forecast:
    """In the faster order of windows where processes share them, else in that of the settings."""
    orders = ORDERS if sizes.windows > 1 else (job.config.windows.order,)
    return min((forecast(job, cluster, sizes, order) for order in orders), key=lambda each: each.video)

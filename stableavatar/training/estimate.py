"""Memory and operations of a run before it starts: what every process holds, and what a step computes.

A plan adds up what is resident at the worst moment of a step, the backward pass. Not in it: the allocator's fragments, and the
frozen encoders' own activations, which are gone by then.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from stableavatar.data.samples import Bucket
from stableavatar.models.checkpoint_files import Checkpoint
from stableavatar.models.dit import AvatarTransformer
from stableavatar.training.config import OptimizerConfig, TrainConfig, parse_lengths, parse_sizes
from stableavatar.training.cost import Precision, step_cost
from stableavatar.training.optimizer import MUON_REGIONS
from stableavatar.training.processes import training_dtype
from stableavatar.training.trainable import is_matrix, region, trained

GIB = 2**30
PUBLISHED_ENCODERS = {"text_encoder": 5_680_910_336, "image_encoder": 632_076_800, "vae": 126_892_531, "audio_encoder": 94_371_712}
"""Parameters of UMT5-XXL's encoder, CLIP's ViT-H/14, Wan2.1's VAE and wav2vec2-base."""
IN_FLOAT32 = ("vae", "audio_encoder")
"""Encoders that compute in float32 whatever `dtype` is."""
RUNTIME = int(1.5 * GIB)
"""Of a GPU's libraries: CUDA's context, workspaces of cuBLAS, buffers of NCCL."""
PARTITIONED = {
    "ddp": (),
    "zero1": ("optimizer",),
    "zero2": ("optimizer", "gradients"),
    "zero3": ("optimizer", "gradients", "weights"),
    "fsdp": ("optimizer", "gradients", "weights", "ema"),
}
"""Strategy -> what every process holds only its part of."""
STATE_BYTES = {"adamw": 8, "adamw8bit": 2, "muon": 4, "came": 4}
"""Of an optimiser, per number of a matrix: two moments in float32, or in a byte each; one; one, the other being factored."""
VECTOR_STATE_BYTES = 8
"""Whatever the optimiser, norms, biases and modulations have two moments in float32."""
GATHERED_BLOCKS = 2
"""Where weights are partitioned: the block at work and the next one, which is fetched meanwhile, are whole."""
REDUCED = {"zero1": 500_000_000, "zero2": 500_000_000}
"""Numbers in a bucket of gradients on their way between processes (DeepSpeed's reduce_bucket_size); there are two of them."""
A100_FLOPS, EXPECTED_SHARE = 312e12, 0.4
COLUMNS = ("weights", "gradients", "optimizer", "ema", "activations", "encoders")


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of one process, and the work of an optimiser step on it.

    Attributes:
        weights: of the transformer. Those that train are in float32, frozen ones in `dtype`; with DeepSpeed all are in `dtype`.
        gradients: in the precision of the weights that train.
        optimizer: its states; with DeepSpeed the float32 copy of the weights too.
        ema: the moving average in float32.
        activations: see `cost.Cost`.
        encoders: the frozen parts that are on the device together: all, the largest one that visits it, or none with a latent cache.
        handover: encoders leave before the transformer runs, so that the larger of both counts.
        model_flops, flops: of an optimiser step, without and with what checkpointing computes again.
    """

    bucket: Bucket
    weights: int
    gradients: int
    optimizer: int
    ema: int
    activations: int
    encoders: int
    handover: bool
    model_flops: float
    flops: float

    @property
    def total(self) -> int:
        """All of it at the worst moment, with what a GPU's libraries take."""
        standing = self.weights + self.gradients + self.optimizer + self.ema + RUNTIME
        return standing + (max(self.encoders, self.activations) if self.handover else self.encoders + self.activations)


def estimate(
    model: AvatarTransformer, config: TrainConfig, processes: int, strategy: str, buckets: Sequence[Bucket] = ()
) -> list[MemoryPlan]:
    """A plan for every bucket.

    Args:
        model: as `step_cost` wants it: ready to train, before accelerate or a compiler has wrapped it.
        processes: how many share what the strategy partitions.
        strategy: a key of PARTITIONED.
        buckets: those of the settings if empty.
    """
    standing, encoders = standing_bytes(model, config, processes, strategy), encoder_bytes(config).values()
    resident = max(encoders, default=0) if config.encoders == "handover" else sum(encoders)
    plans = []
    for bucket in buckets or configured_buckets(config):
        cost = step_cost(model, bucket.latents, config.batch, precision(config, strategy), config.parallel.size)
        flops = (config.accumulation * cost.model_flops, config.accumulation * cost.flops)
        plans.append(MemoryPlan(bucket, **standing, activations=cost.activations, encoders=resident,
                                handover=config.encoders == "handover", model_flops=flops[0], flops=flops[1]))
    return plans


def flops_per_sample(plans: Sequence[MemoryPlan], config: TrainConfig) -> dict[Bucket, float]:
    """Of a forward and backward of one sample on all processes that share it, every product of each once."""
    return {plan.bucket: config.parallel.size * plan.model_flops / (config.batch * config.accumulation) for plan in plans}


def configured_buckets(config: TrainConfig) -> list[Bucket]:
    """Every size with every length."""
    lengths = parse_lengths(config.data.frames)
    return [Bucket(width, height, frames) for width, height in parse_sizes(config.data.sizes) for frames in lengths]


def precision(config: TrainConfig, strategy: str) -> Precision:
    """DeepSpeed turns all weights into `dtype`; otherwise autocast computes in it."""
    own = training_dtype(config)
    return Precision(False, own) if strategy.startswith("zero") else Precision(own == torch.bfloat16)


def standing_bytes(model: nn.Module, config: TrainConfig, processes: int, strategy: str) -> dict[str, int]:
    """What one process holds all the time: weights, gradients, optimizer, ema (see `MemoryPlan`)."""
    training, own = trained(model), precision(config, strategy).weights
    count = sum(p.numel() for p in training.values())
    whole = {
        "weights": weight_bytes(model.parameters(), own),
        "gradients": weight_bytes(training.values(), own),
        "optimizer": state_bytes(training, config.optimizer) + (4 * count if own else 0),
        "ema": 4 * count if config.optimizer.ema else 0,
    }
    partitioned = PARTITIONED[strategy] if processes > 1 else ()
    held = {name: -(-size // processes) if name in partitioned else size for name, size in whole.items()}
    if "weights" in partitioned:
        held["weights"] += GATHERED_BLOCKS * weight_bytes(model.blocks[0].parameters(), own)
    if strategy in REDUCED and processes > 1:
        held["gradients"] += min(REDUCED[strategy] * 2, count) * (own or torch.float32).itemsize
    return held


def weight_bytes(parameters: Iterable[nn.Parameter], dtype: torch.dtype | None) -> int:
    """Of weights in one precision, or in their own."""
    return sum(p.numel() * (dtype or p.dtype).itemsize for p in parameters)


def state_bytes(training: Mapping[str, nn.Parameter], config: OptimizerConfig) -> int:
    """Of an optimiser over weights by name."""

    def each(name: str, parameter: nn.Parameter) -> int:
        plain = not is_matrix(name, parameter) or (config.name == "muon" and region(name) not in MUON_REGIONS)
        return VECTOR_STATE_BYTES if plain else STATE_BYTES[config.name]

    return sum(each(name, parameter) * parameter.numel() for name, parameter in training.items())


def encoder_bytes(config: TrainConfig) -> dict[str, int]:
    """Of the frozen parts by name: of the folder `model`, or as published; none if a latent cache takes their place."""
    if config.data.cache:
        return {}
    return encoder_sizes(config.model, training_dtype(config))


def encoder_sizes(model: str, dtype: torch.dtype) -> dict[str, int]:
    """Bytes of the frozen parts by name: of the folder `model`, or as published if it is empty."""
    counts = PUBLISHED_ENCODERS
    if model:
        counts = {name: sum(map(math.prod, Checkpoint(Path(model) / name).shapes.values())) for name in PUBLISHED_ENCODERS}
    return {name: count * (4 if name in IN_FLOAT32 else dtype.itemsize) for name, count in counts.items()}


def table(plans: Sequence[MemoryPlan], card: float) -> str:
    """The plans in GiB, one line per bucket, and whether they fit a card of so many; a step's operations and seconds on an A100."""
    heads = ("bucket", *COLUMNS, "total", f"{card:g} GiB", "TFLOP/step", "s/step")
    rows = [heads, *(_row(plan, card) for plan in plans)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(heads))]
    return "\n".join("  ".join(text.rjust(width) for text, width in zip(row, widths)) for row in rows)


def _row(plan: MemoryPlan, card: float) -> tuple[str, ...]:
    bucket, seconds = plan.bucket, plan.flops / A100_FLOPS / EXPECTED_SHARE
    sizes = [f"{getattr(plan, name) / GIB:.1f}" for name in (*COLUMNS, "total")]
    fits = "fits" if plan.total <= card * GIB else "too large"
    return f"{bucket.width}x{bucket.height}x{bucket.frames}", *sizes, fits, f"{plan.model_flops / 1e12:.0f}", f"{seconds:.1f}"

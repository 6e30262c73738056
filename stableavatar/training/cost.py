"""What a forward and backward cost, read off the transformer itself: it runs on tensors that have shapes but no memory.

Shapes: F latent frames, h x w latent height and width. A block is like any other, so two and three of them are run and the
figures of the whole model follow in a straight line.
"""

import copy
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from stableavatar.geometry import IMAGE_TOKENS, LATENT_CHANNELS, MIN_SAMPLES, frame_samples, latents_to_frames
from stableavatar.models.dit import AudioFeatures, AvatarTransformer, Conditions
from stableavatar.models.kernels import Attend
from stableavatar.models.layout import Plan, TokenLayout
from stableavatar.models.rope import Rotary, rotary_table
from stableavatar.models.sequence import WholeSequence
from stableavatar.parallel.sequence import as_computed

SAMPLES_PER_TOKEN = 320
"""Stride of wav2vec2's convolutions."""
FEW, MORE = 2, 3
"""Numbers of blocks that are run. The first block alone would tell too little: its input may need no gradient."""

Module = TypeVar("Module", bound=nn.Module)
Shape = tuple[int, int, int]
"""F, h, w of latents."""
aten = torch.ops.aten


def _attention(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(q.shape, k.shape, v.shape)


def _attention_backward(gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> int:
    """Four products instead of two; that flash kernels compute the scores again is their own affair."""
    return 2 * sdpa_flop_count(q.shape, k.shape, v.shape)


FORMULAS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
"""The library's counts, and those of the flash kernel that tensors on the CPU go through."""


class Meter(TorchDispatchMode):
    """Counts floating point operations, and the bytes of tensors that are made within it and still alive.

    Args:
        given: tensors from before, which do not count.

    Attributes:
        flops: so far; peak: the most bytes that were alive at once since `restart`.
    """

    def __init__(self, given: Iterable[Tensor]) -> None:
        super().__init__()
        self.flops = self.peak = self._alive = 0
        self._storages = {id(tensor.untyped_storage()) for tensor in given}

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if formula := FORMULAS.get(func.overloadpacket):
            self.flops += formula(*args, **(kwargs or {}), out_val=out)
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor):
                self._watch(tensor.untyped_storage())
        return out

    def restart(self) -> None:
        """Forgets the peak, but not what is alive."""
        self.peak = self._alive

    def _watch(self, storage: torch.UntypedStorage) -> None:
        if id(storage) not in self._storages:
            self._storages.add(id(storage))
            self._alive += storage.nbytes()
            self.peak = max(self.peak, self._alive)
            weakref.finalize(storage, self._drop, id(storage), storage.nbytes())

    def _drop(self, key: int, size: int) -> None:
        self._storages.discard(key)
        self._alive -= size


@dataclass(frozen=True)
class Reading:
    """Of one forward and backward: operations of the forward and of both; the most bytes alive in either."""

    forward_flops: float
    flops: float
    forward_peak: float
    backward_peak: float

    def extend(self, other: "Reading", steps: int) -> "Reading":
        """This reading and `steps` times what `other` has less than this one."""
        pairs = zip(vars(self).values(), vars(other).values())
        return Reading(*(ours + steps * (ours - theirs) for ours, theirs in pairs))


@dataclass(frozen=True)
class Cost:
    """Of a forward and backward of one process.

    Attributes:
        model_flops: every product once: what shares of a peak refer to.
        flops: with what gradient checkpointing computes again.
        activations: the most bytes alive at once beside weights and gradients: what is kept for the backward pass, the casts of
            weights that autocast keeps, the block that is at work.
    """

    model_flops: float
    flops: float
    activations: float


@dataclass(frozen=True)
class Precision:
    """How a model computes.

    Attributes:
        autocast: in bfloat16 by autocast; otherwise in what its weights are in.
        weights: precision of all weights; None for that of each.
        cast_cache: autocast keeps its casts of the weights that train until the forward ends (the default of torch, not of training here).
        gpu: by autocast's rules for GPUs, where norms give float32.
    """

    autocast: bool
    weights: torch.dtype | None = None
    cast_cache: bool = False
    gpu: bool = True


class PartOfSequence(WholeSequence):
    """What one of several processes that share a sequence computes, and the copies that it makes to exchange the rest.

    What the others would send is taken from its own tokens. A ring is counted as if it exchanged heads as well: it computes as much, and
    holds about as much.
    """

    def __init__(self, processes: int) -> None:
        self.processes, self.tokens = processes, 0

    def shard(self, x: Tensor, layout: TokenLayout, rotary: Rotary) -> tuple[Tensor, TokenLayout, Rotary]:
        """The largest part, S / P rounded up."""
        self.tokens = x.shape[2]
        part = -(-self.tokens // self.processes)
        table = rotary.table.unflatten(0, (len(rotary.positions), -1))[:, :part].flatten(0, 1)
        return x[:, :, :part].contiguous(), layout, replace(rotary, table=table)

    def gather(self, x: Tensor, layout: TokenLayout) -> Tensor:
        """Zeros for the tokens of the others."""
        return functional.pad(x, (0, 0, 0, self.tokens - x.shape[2]))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, plan: Plan = (), *, inner: Attend) -> Tensor:
        """Of all tokens some heads, H / P rounded up: [B, P * L, H / P, d]; and back."""
        batch, length, heads, width = q.shape
        of_all = [batch, 3 * self.processes * length, -(-heads // self.processes), width]
        together = torch.cat([as_computed(x) for x in (q, k, v)], dim=1)
        attended = inner(*_Exchange.apply(together, of_all).chunk(3, dim=1), plan)
        return _Exchange.apply(attended, list(q.shape))


class _Exchange(torch.autograd.Function):
    """The copies that an all-to-all makes: as it leaves, as it arrives, and that put together; so do its gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shape: list[int]) -> Tensor:
        ctx.shape = x.shape
        _leaves, _arrives = torch.empty_like(x), x.new_empty(shape)
        return x.new_zeros(shape)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        _leaves, _arrives = torch.empty_like(gradient), gradient.new_empty(ctx.shape)
        return gradient.new_zeros(ctx.shape), None


def share_sequence(model: AvatarTransformer, processes: int) -> None:
    """Lets a hollow model compute what one of so many processes does."""
    model.sequence = part = PartOfSequence(processes)
    for block in model.blocks:
        block.self_attn.attend = partial(part.attend, inner=block.self_attn.attend)


def step_cost(model: AvatarTransformer, shape: Shape, batch: int, precision: Precision, share: int = 1) -> Cost:
    """The cost of one forward and backward.

    Args:
        model: with or without memory for its weights, with its trainable weights chosen and gradient checkpointing on or off. It is
            not changed.
        shape: latents of a sample.
        batch: samples per forward.
        share: processes that share each sample's sequence.
    """
    few, more = (read(model, blocks, shape, batch, precision, share) for blocks in (FEW, MORE))
    whole = more.extend(few, len(model.blocks) - MORE)
    again = (more.forward_flops - few.forward_flops) * len(model.blocks) if model.gradient_checkpointing else 0
    return Cost(whole.flops - again, whole.flops, max(whole.forward_peak, whole.backward_peak))


def read(model: AvatarTransformer, blocks: int, shape: Shape, batch: int, precision: Precision, share: int = 1) -> Reading:
    """Runs the model, with so many blocks and its part of the sequence, on tensors without memory."""
    with without_memory():
        hollow = hollow_copy(model, blocks, precision.weights)
        if share > 1:
            share_sequence(hollow, share)
        if precision.autocast and precision.gpu:
            norms_in_float32(hollow)
        return measure(hollow, make_inputs(model, shape, batch), precision)


def measure(model: AvatarTransformer, inputs: tuple, precision: Precision) -> Reading:
    """A forward and backward under a meter; gradients of weights are let go as soon as they are there."""
    given = [*model.parameters(), *model.buffers(), *tree_iter([inputs[:2], vars(inputs[2]).values(), vars(inputs[2].audio).values()])]
    hooks = [p.register_post_accumulate_grad_hook(_drop_gradient) for p in model.parameters() if p.requires_grad]
    with Meter([tensor for tensor in given if isinstance(tensor, Tensor)]) as meter:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision.autocast, cache_enabled=precision.cast_cache):
            velocity = model(*inputs)
        forward_flops, forward_peak = meter.flops, meter.peak
        meter.restart()
        velocity.float().square().mean().backward()
    for hook in hooks:
        hook.remove()
    return Reading(forward_flops, meter.flops, forward_peak, meter.peak)


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


@contextmanager
def without_memory() -> Iterator[None]:
    """Tensors made within it have shapes only. The cache of rotary tables neither keeps such nor mixes real ones in."""
    rotary_table.cache_clear()
    try:
        with FakeTensorMode():
            yield
    finally:
        rotary_table.cache_clear()


def hollow_copy(model: AvatarTransformer, blocks: int, dtype: torch.dtype | None) -> AvatarTransformer:
    """A copy for training that shares no weights, with so many of the first block; within `without_memory`."""
    copies = nn.ModuleList(_hollow(model.blocks[0], dtype, {}) for _ in range(blocks))
    return _hollow(model, dtype, {id(model.blocks): copies}).train()


def _hollow(module: Module, dtype: torch.dtype | None, memo: dict[int, Any]) -> Module:
    """A copy whose tensors are new ones of the same shapes, but for the objects in `memo` (id -> copy)."""

    def empty(tensor: Tensor) -> Tensor:
        new = torch.empty(tensor.shape, dtype=dtype or tensor.dtype)
        return nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new

    return copy.deepcopy(module, {id(tensor): empty(tensor) for tensor in [*module.parameters(), *module.buffers()]} | memo)


def norms_in_float32(model: nn.Module) -> None:
    """What autocast does on GPUs and not on the CPU; the numbers that follow are promoted by themselves."""
    for module in model.modules():
        if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
            module.register_forward_pre_hook(lambda module, inputs: (inputs[0].float(),))


def make_inputs(model: AvatarTransformer, shape: Shape, batch: int) -> tuple[Tensor, Tensor, Conditions, TokenLayout]:
    """What `forward` takes, for `batch` samples of a shape; zeros where there is memory."""
    config, frames = model.config, shape[0]

    def zeros(*sizes: int) -> Tensor:
        return torch.zeros(batch, *sizes)

    tokens = (frame_samples(latents_to_frames(frames)) - MIN_SAMPLES) // SAMPLES_PER_TOKEN + 1
    conditions = Conditions(
        text=zeros(config.text_length, config.text_dim),
        image=zeros(IMAGE_TOKENS, config.image_dim),
        reference=zeros(config.in_channels - LATENT_CHANNELS, *shape),
        audio=AudioFeatures(zeros(tokens, config.audio_dim), keep=zeros()),
    )
    return zeros(LATENT_CHANNELS, *shape), zeros(), conditions, TokenLayout.full(frames)

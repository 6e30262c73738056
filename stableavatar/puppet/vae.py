"""A small causal video VAE with the interface of `stableavatar.vae.WanVAE`: 8 x 8 in space, 4 in time, 16 channels, trained on a CPU.

Everything is done frame by frame but two things: a `Block` lets a frame see the one before it, and pairs of frames are folded into
channels twice. The first frame counts as four equal ones, so that every latent is of four frames. Norms are of single pixels, and
what a chunk needs of the past is one frame per `Block`: a stream gives what one pass gives. Beside the network there is a linear
map of every block of pixels to its latent and back, which begins as the principal components of the data; training adds what they lack.
"""

from collections.abc import Iterable, Iterator, Sequence

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn
from torch.nn import functional

from stableavatar.geometry import LATENT_CHANNELS, SPATIAL_STRIDE, TEMPORAL_STRIDE, latents_to_frames
from stableavatar.vae import WanVAE, normalisation, regroup

LOG_VARIANCE = -8.0
"""Where the log-variance of a latent starts: almost certain."""
BLOCK = 3 * TEMPORAL_STRIDE * SPATIAL_STRIDE**2
"""Numbers of the block of pixels that one latent stands for."""


class Memory:
    """The last frame that each `Block` saw, in the order in which they run; empty at the start of a video."""

    def __init__(self) -> None:
        self.frames: list[Tensor] = []
        self._next = 0

    def rewind(self) -> "Memory":
        """Before a chunk: the first `Block` comes next."""
        self._next = 0
        return self

    def before(self, frames: Tensor) -> Tensor:
        """The frames [B, T, H, W, C] one earlier in time; before the first there was one that equals it."""
        if self._next == len(self.frames):
            self.frames.append(frames[:, :1])
        past = torch.cat([self.frames[self._next], frames[:, :-1]], dim=1)
        self.frames[self._next] = frames[:, -1:].detach()
        self._next += 1
        return past

    def equals(self, others: Sequence[Tensor]) -> bool:
        """Whether it holds exactly these frames."""
        return len(others) == len(self.frames) and all(map(torch.equal, self.frames, others))


class Conv(nn.Linear):
    """A 3 x 3 convolution of every frame of [B, T, H, W, C]; its weights are one matrix [out, 3 * 3 * width], as Muon wants them."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__(9 * width, out)
        nn.init.normal_(self.weight, std=(9 * width) ** -0.5)
        nn.init.zeros_(self.bias)

    def forward(self, frames: Tensor) -> Tensor:
        kernel = self.weight.unflatten(1, (3, 3, -1)).permute(0, 3, 1, 2)
        result = functional.conv2d(frames.flatten(0, 1).permute(0, 3, 1, 2), kernel, self.bias, padding=1)
        return result.permute(0, 2, 3, 1).unflatten(0, frames.shape[:2])


def norm(width: int) -> nn.LayerNorm:
    """Of the channels of single pixels, without weights: their gradients are not right in bfloat16."""
    return nn.LayerNorm(width, elementwise_affine=False)


class Block(nn.Module):
    """A residual block in which a quarter of the channels comes from the frame before; it starts as the identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.shifted = width // 4
        self.norm = norm(width)
        self.conv1, self.conv2 = Conv(width, width), Conv(width, width)
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)

    def forward(self, frames: Tensor, memory: Memory) -> Tensor:
        hidden = self.norm(frames)
        hidden = torch.cat([memory.before(hidden[..., : self.shifted]), hidden[..., self.shifted :]], dim=-1)
        return frames + self.conv2(functional.silu(self.conv1(hidden)))


class Resample(nn.Linear):
    """A linear map of every pixel's channels, beside which they go on as they are: averaged to fewer, repeated to more."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__(width, out)
        if max(width, out) % min(width, out):
            raise ValueError(f"the VAE maps {width} channels to {out}; one must be a multiple of the other")
        nn.init.normal_(self.weight, std=width**-0.5)
        nn.init.zeros_(self.bias)

    def forward(self, frames: Tensor) -> Tensor:
        if self.out_features > self.in_features:
            kept = frames.repeat_interleave(self.out_features // self.in_features, dim=-1)
        else:
            kept = frames.unflatten(-1, (self.out_features, -1)).mean(-1)
        return super().forward(frames) + kept


def fold(frames: Tensor, time: int) -> Tensor:
    """Squares of 2 x 2 pixels of `time` frames into channels: [B, T, H, W, C] -> [B, T / time, H / 2, W / 2, 4 time C]."""
    b, t, h, w, c = frames.shape
    split = frames.reshape(b, t // time, time, h // 2, 2, w // 2, 2, c)
    return split.permute(0, 1, 3, 5, 2, 4, 6, 7).reshape(b, t // time, h // 2, w // 2, 4 * time * c)


def unfold(frames: Tensor, time: int) -> Tensor:
    """The inverse of `fold`."""
    b, t, h, w, c = frames.shape
    split = frames.reshape(b, t, h, w, time, 2, 2, c // (4 * time))
    return split.permute(0, 1, 4, 2, 5, 3, 6, 7).reshape(b, t * time, 2 * h, 2 * w, c // (4 * time))


def blocks(frames: Tensor) -> Tensor:
    """Blocks of 8 x 8 pixels of four frames: [B, 4k, H, W, 3] -> [B, k, H / 8, W / 8, 768]."""
    b, t, h, w, c = frames.shape
    split = frames.reshape(b, t // 4, 4, h // 8, 8, w // 8, 8, c)
    return split.permute(0, 1, 3, 5, 2, 4, 6, 7).reshape(b, t // 4, h // 8, w // 8, BLOCK)


def from_blocks(found: Tensor) -> Tensor:
    """The inverse of `blocks`."""
    b, t, h, w, _ = found.shape
    split = found.reshape(b, t, h, w, 4, 8, 8, 3)
    return split.permute(0, 1, 4, 2, 5, 3, 6, 7).reshape(b, 4 * t, 8 * h, 8 * w, 3)


class Encoder(nn.Module):
    """Pixels [B, 4k, H, W, 3] -> mean and log-variance [B, k, H / 8, W / 8, 2 z]."""

    def __init__(self, z_dim: int, widths: Sequence[int], depths: Sequence[int]) -> None:
        super().__init__()
        self.stem = Conv(12, widths[0])
        self.levels = nn.ModuleList(nn.ModuleList(Block(width) for _ in range(depth)) for width, depth in zip(widths, depths))
        self.downs = nn.ModuleList(Resample(8 * width, wider) for width, wider in zip(widths, widths[1:]))
        self.norm, self.head = norm(widths[-1]), Conv(widths[-1], 2 * z_dim)
        self.linear = nn.Linear(BLOCK, z_dim)
        nn.init.zeros_(self.head.weight)

    def forward(self, frames: Tensor, memory: Memory) -> Tensor:
        hidden = self.stem(fold(frames, 1))
        for i, level in enumerate(self.levels):
            hidden = self.downs[i - 1](fold(hidden, 2)) if i else hidden
            for block in level:
                hidden = block(hidden, memory)
        moments = self.head(functional.silu(self.norm(hidden)))
        return moments + functional.pad(self.linear(blocks(frames)), (0, moments.shape[-1] // 2))


class Decoder(nn.Module):
    """Latents [B, k, h, w, z] -> pixels [B, 4k, 8h, 8w, 3]; `widths` and `depths` as the encoder's, from pixels to latents."""

    def __init__(self, z_dim: int, widths: Sequence[int], depths: Sequence[int]) -> None:
        super().__init__()
        widths, depths = widths[::-1], depths[::-1]
        self.stem = Conv(z_dim, widths[0])
        self.levels = nn.ModuleList(nn.ModuleList(Block(width) for _ in range(depth)) for width, depth in zip(widths, depths))
        self.ups = nn.ModuleList(Resample(width, 8 * narrower) for width, narrower in zip(widths, widths[1:]))
        self.norm, self.head = norm(widths[-1]), Conv(widths[-1], 12)
        self.linear = nn.Linear(z_dim, BLOCK)
        nn.init.zeros_(self.head.weight)

    def forward(self, latents: Tensor, memory: Memory) -> Tensor:
        hidden = self.stem(latents)
        for i, level in enumerate(self.levels):
            hidden = unfold(self.ups[i - 1](hidden), 2) if i else hidden
            for block in level:
                hidden = block(hidden, memory)
        return unfold(self.head(functional.silu(self.norm(hidden))), 1) + from_blocks(self.linear(latents))


def _as_four(chunks: Iterable[Tensor]) -> Iterator[Tensor]:
    """The chunks, with the first frame four times instead of once."""
    first = True
    for chunk in chunks:
        if first and chunk.shape[1]:
            yield chunk[:, :1].expand(-1, TEMPORAL_STRIDE - 1, -1, -1)
            first = False
        yield chunk


class PuppetVAE(ModelMixin, ConfigMixin):
    """A causal video VAE in normalised latents, streamed.

    Args:
        z_dim: channels of a latent.
        widths: channels at 1/2, 1/4 and 1/8 of the size (at all frames, a half, a quarter of them).
        encoder_depths, decoder_depths: residual blocks at each of them.
        latents_mean, latents_std: per channel, as measured after training; latents are normalised by them.
        bfloat16: encodes in it, as it was trained; latents are float32.
    """

    @register_to_config
    def __init__(
        self,
        z_dim: int = LATENT_CHANNELS,
        widths: Sequence[int] = (32, 64, 128),
        encoder_depths: Sequence[int] = (1, 2, 3),
        decoder_depths: Sequence[int] = (2, 3, 4),
        latents_mean: Sequence[float] | None = None,
        latents_std: Sequence[float] | None = None,
        bfloat16: bool = False,
    ) -> None:
        super().__init__()
        self.encoder = Encoder(z_dim, widths, encoder_depths)
        self.decoder = Decoder(z_dim, widths, decoder_depths)
        self.set_statistics(latents_mean or [0.0] * z_dim, latents_std or [1.0] * z_dim)

    @torch.no_grad()
    def set_components(self, mean: Tensor, components: Tensor, deviations: Tensor) -> None:
        """Begins the linear maps as principal components, the latents as those of unit variance.

        Args:
            mean: of the blocks of pixels [768]; components: [z, 768], orthonormal; deviations: of the data along them [z].
        """
        encode = components / deviations[:, None]
        self.encoder.linear.weight.copy_(encode)
        self.encoder.linear.bias.copy_(-encode @ mean)
        self.decoder.linear.weight.copy_((components * deviations[:, None]).T)
        self.decoder.linear.bias.copy_(mean)

    def set_statistics(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Writes what latents are normalised by into the config."""
        self.register_to_config(latents_mean=list(mean), latents_std=list(std))

    def enable_tiling(self) -> None:
        """Accepted and of no effect: a group of four frames is all that is ever held."""

    def forward(self, frames: Tensor, noise: Tensor | None = None, jitter: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
        """One pass with gradients, for training.

        Args:
            frames: [B, 1 + 4k, H, W, 3] in [-1, 1].
            noise: normal, [B, 1 + k, H / 8, W / 8, z]: latents leave their mean by it times their standard deviation; None for none.
            jitter: added to that, in standard deviations of the batch's latents: the decoder learns to forgive small errors.

        Returns:
            reconstruction (as `frames`), mean and log-variance of the latents [B, 1 + k, H / 8, W / 8, z]
        """
        padded = torch.cat([frames[:, :1].expand(-1, TEMPORAL_STRIDE - 1, -1, -1, -1), frames], dim=1)
        mean, log_variance = self.moments(padded, Memory())
        spread = jitter * mean.detach().std(dim=(0, 1, 2, 3))
        latents = mean if noise is None else mean + (log_variance.exp() + spread**2).sqrt() * noise
        return self.decoder(latents, Memory())[:, TEMPORAL_STRIDE - 1 :], mean, log_variance

    def moments(self, frames: Tensor, memory: Memory) -> tuple[Tensor, Tensor]:
        """Mean and log-variance [B, k, h, w, z] of frames [B, 4k, H, W, 3]."""
        mean, log_variance = self.encoder(frames, memory).float().chunk(2, dim=-1)
        return mean, (log_variance + LOG_VARIANCE).clamp(-16, 4)

    @apply_forward_hook
    @torch.no_grad()
    def encode_stream(self, frames: Iterable[Tensor]) -> Iterator[Tensor]:
        """Encodes video as it comes.

        Args:
            frames: chunks [3, n, H, W] in [-1, 1], of any n, on the device to run on; 1 + 4k frames in all.

        Yields:
            the mode of each latent frame, normalised, [16, 1, H / 8, W / 8]

        Raises:
            ValueError: another number of frames, or a size that 8 does not divide.
        """
        memory = Memory()
        for group in regroup(_as_four(frames), TEMPORAL_STRIDE, TEMPORAL_STRIDE):
            yield self._encode_group(group, memory)

    @apply_forward_hook
    @torch.no_grad()
    def encode_reference(self, frames: Tensor, latents: int) -> Tensor:
        """What image-to-video is conditioned on: the first frames [3, n, H, W], on the device to run on, followed by zeros.

        Once zeros leave what the network remembers unchanged, all further latents are the same.

        Returns:
            normalised latents [16, latents, H / 8, W / 8]
        """
        blank = torch.zeros_like(frames[:, :1])
        known = min(frames.shape[1], latents_to_frames(latents))
        chunks = (frames[:, i : i + 1] if i < known else blank for i in range(latents_to_frames(latents)))
        memory, found = Memory(), []
        for group in regroup(_as_four(chunks), TEMPORAL_STRIDE, TEMPORAL_STRIDE):
            before = list(memory.frames)
            found.append(self._encode_group(group, memory))
            if latents_to_frames(len(found) - 1) >= known and memory.equals(before):
                break
        return torch.cat(found + found[-1:] * (latents - len(found)), dim=1)

    @apply_forward_hook
    @torch.no_grad()
    def decode_stream(self, latents: Iterable[Tensor]) -> Iterator[Tensor]:
        """Decodes latents as they come.

        Args:
            latents: chunks [16, n, h, w], normalised, of any n, on the device to run on.

        Yields:
            frames [3, 1 or 4, 8h, 8w] in [-1, 1], one frame for the first latent and four for every other
        """
        memory = Memory()
        for latent in regroup(latents, 1, 1):
            first = not memory.frames
            mean, std = normalisation(self, latent.device)
            unnormalised = (latent.float() * std + mean).to(self.dtype)
            frames = self.decoder(unnormalised.permute(1, 2, 3, 0)[None], memory.rewind())[0].float()
            yield frames[TEMPORAL_STRIDE - 1 if first else 0 :].permute(3, 0, 1, 2).clamp(-1, 1)

    def _encode_group(self, group: Tensor, memory: Memory) -> Tensor:
        """Four frames [3, 4, H, W] as one normalised latent [16, 1, h, w]."""
        if group.shape[1] != TEMPORAL_STRIDE:
            raise ValueError(f"the VAE encodes 1 + 4k frames; {group.shape[1]} are left over")
        if any(size % SPATIAL_STRIDE for size in group.shape[-2:]):
            raise ValueError(f"the VAE encodes sizes that {SPATIAL_STRIDE} divides, got {group.shape[-1]}x{group.shape[-2]}")
        with torch.autocast(group.device.type, torch.bfloat16, enabled=self.config.bfloat16):
            moments = self.moments(group.to(self.dtype).permute(1, 2, 3, 0)[None], memory.rewind())
        mean, std = normalisation(self, group.device)
        return (moments[0][0].permute(3, 0, 1, 2) - mean) / std


VideoVAE = WanVAE | PuppetVAE
"""What a pipeline may encode and decode with."""

"""The library's Wan VAE with encode and decode as streams: memory does not grow with the length of the video."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKLWan, ModelMixin  # loading a pipeline looks for ModelMixin beside the class
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor

from stableavatar.geometry import SPATIAL_STRIDE, TEMPORAL_STRIDE, latents_to_frames


@dataclass(frozen=True)
class Tile:
    """A spatial part of a frame with the causal state that its convolutions carry through time."""

    rows: slice
    columns: slice
    state: list


def regroup(chunks: Iterable[Tensor], first: int, size: int) -> Iterator[Tensor]:
    """Cuts [C, n, H, W] chunks along time into one of `first` frames, then `size` frames each (the last may be short)."""
    held, wanted = None, first
    for chunk in chunks:
        held = chunk if held is None else torch.cat([held, chunk], dim=1)
        while held.shape[1] >= wanted:
            yield held[:, :wanted]
            held, wanted = held[:, wanted:], size
    if held is not None and held.shape[1]:
        yield held


def normalisation(vae: ModelMixin, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [16, 1, 1, 1] in float32 that a VAE's latents are normalised by, from its config."""
    return tuple(torch.tensor([vae.config.latents_mean, vae.config.latents_std], device=device).view(2, -1, 1, 1, 1))


class WanVAE(AutoencoderKLWan):
    """`AutoencoderKLWan` in normalised latents, streamed, with optional spatial tiles (`enable_tiling`).

    Latents are normalised per channel by the published mean and standard deviation (the config's `latents_mean`, `latents_std`).
    """

    @apply_forward_hook
    @torch.no_grad()
    def encode_stream(self, frames: Iterable[Tensor]) -> Iterator[Tensor]:
        """Encodes video as it comes.

        Args:
            frames: chunks [3, n, H, W] in [-1, 1], of any n, on the device to run on; 1 + 4k frames in all.

        Yields:
            the mode of each latent frame, normalised, [16, 1, H / 8, W / 8]
        """
        tiles: list[list[Tile]] = []
        for group in regroup(frames, 1, TEMPORAL_STRIDE):
            if tiles and group.shape[1] != TEMPORAL_STRIDE:
                raise ValueError(f"the VAE encodes 1 + 4k frames; {group.shape[1]} are left over")
            tiles = tiles or self._tiles(group, 1, self._cached_conv_counts["encoder"])
            moments = self._blend([[self._encode_tile(group, tile) for tile in row] for row in tiles], SPATIAL_STRIDE)
            mean, std = normalisation(self, group.device)
            yield (moments.chunk(2, dim=1)[0][0] - mean) / std

    def encode_reference(self, frames: Tensor, latents: int) -> Tensor:
        """What image-to-video is conditioned on: the first frames [3, n, H, W], on the device to run on, followed by zeros.

        Returns:
            normalised latents [16, latents, H / 8, W / 8]
        """
        blank = torch.zeros_like(frames[:, :1])
        chunks = (frames[:, i : i + 1] if i < frames.shape[1] else blank for i in range(latents_to_frames(latents)))
        return torch.cat(list(self.encode_stream(chunks)), dim=1)

    @apply_forward_hook
    @torch.no_grad()
    def decode_stream(self, latents: Iterable[Tensor]) -> Iterator[Tensor]:
        """Decodes latents as they come.

        Args:
            latents: chunks [16, n, h, w], normalised, of any n, on the device to run on.

        Yields:
            frames [3, 1 or 4, 8h, 8w] in [-1, 1], one frame for the first latent and four for every other
        """
        tiles: list[list[Tile]] = []
        for latent in regroup(latents, 1, 1):
            first = not tiles
            tiles = tiles or self._tiles(latent, SPATIAL_STRIDE, self._cached_conv_counts["decoder"])
            mean, std = normalisation(self, latent.device)
            latent = (latent.float() * std + mean).to(self.dtype)
            decoded = [[self._decode_tile(latent, tile, first) for tile in row] for row in tiles]
            yield self._blend(decoded, 1)[0].clamp(-1, 1)

    def _encode_tile(self, frames: Tensor, tile: Tile) -> Tensor:
        part = frames[None, :, :, tile.rows, tile.columns].to(self.dtype)
        return self.quant_conv(self.encoder(part, feat_cache=tile.state, feat_idx=[0])).float()

    def _decode_tile(self, latent: Tensor, tile: Tile, first: bool) -> Tensor:
        part = self.post_quant_conv(latent[None, :, :, tile.rows, tile.columns])
        return self.decoder(part, feat_cache=tile.state, feat_idx=[0], first_chunk=first).float()

    def _tiles(self, frames: Tensor, scale: int, convolutions: int) -> list[list[Tile]]:
        """Tiles of a frame, or one that is the whole frame where tiling is off; `scale`: pixels per element of `frames`."""
        height, width = frames.shape[-2:]
        size = (self.tile_sample_min_height // scale, self.tile_sample_min_width // scale)
        stride = (self.tile_sample_stride_height // scale, self.tile_sample_stride_width // scale)
        if not self.use_tiling or (height <= size[0] and width <= size[1]):
            size = stride = (height, width)
        return [
            [Tile(slice(i, i + size[0]), slice(j, j + size[1]), [None] * convolutions) for j in range(0, width, stride[1])]
            for i in range(0, height, stride[0])
        ]

    def _blend(self, rows: list[list[Tensor]], scale: int) -> Tensor:
        """Joins tiles [1, C, n, ., .], fading over their overlap; `scale`: pixels per element of the tiles."""
        if len(rows) == len(rows[0]) == 1:
            return rows[0][0]
        stride = (self.tile_sample_stride_height // scale, self.tile_sample_stride_width // scale)
        fade = (self.tile_sample_min_height // scale - stride[0], self.tile_sample_min_width // scale - stride[1])
        joined = []
        for i, row in enumerate(rows):
            for j, tile in enumerate(row):  # the library's blends write into the tile they return
                if i:
                    self.blend_v(rows[i - 1][j], tile, fade[0])
                if j:
                    self.blend_h(row[j - 1], tile, fade[1])
            joined.append(torch.cat([tile[..., : stride[0], : stride[1]] for tile in row], dim=-1))
        return torch.cat(joined, dim=-2)

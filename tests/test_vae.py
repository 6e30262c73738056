"""The streamed VAE is the library's VAE."""

import pytest
import torch

from stableavatar.vae import WanVAE


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    return WanVAE(base_dim=8).eval()


@pytest.fixture(params=[False, True], ids=["whole", "tiled"])
def tiled(request, vae):
    """Runs a test with and without tiles of 32 pixels."""
    if request.param:
        vae.enable_tiling(32, 32, 24, 16)
    yield request.param
    vae.disable_tiling()


def normalise(vae, latents):
    mean, std = (torch.tensor(v).view(-1, 1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std))
    return (latents - mean) / std, mean, std


@pytest.mark.parametrize("chunk", [1, 3, 9])
def test_encode_stream_is_encode(vae, tiled, chunk):
    video = torch.rand(3, 9, 64, 48) * 2 - 1
    streamed = torch.cat(list(vae.encode_stream(iter(video.split(chunk, dim=1)))), dim=1)
    expected = normalise(vae, vae.encode(video[None]).latent_dist.mode()[0])[0]
    torch.testing.assert_close(streamed, expected)


@pytest.mark.parametrize("chunk", [1, 2, 3])
def test_decode_stream_is_decode(vae, tiled, chunk):
    latents = torch.randn(16, 3, 8, 6)
    parts = list(vae.decode_stream(iter(latents.split(chunk, dim=1))))
    assert [part.shape[1] for part in parts] == [1, 4, 4]
    _, mean, std = normalise(vae, latents)
    with torch.no_grad():
        expected = vae.decode((latents * std + mean)[None]).sample[0]
    torch.testing.assert_close(torch.cat(parts, dim=1), expected)


def test_two_streams_do_not_disturb_each_other(vae):
    latents = torch.randn(2, 16, 3, 4, 4)
    alone = [list(vae.decode_stream([part])) for part in latents]
    for (first, second), *expected in zip(zip(*(vae.decode_stream([p]) for p in latents), strict=True), *alone, strict=True):
        assert torch.equal(first, expected[0]) and torch.equal(second, expected[1])


def test_left_over_frames_are_an_error(vae):
    with pytest.raises(ValueError, match="1 \\+ 4k"):
        list(vae.encode_stream([torch.zeros(3, 7, 16, 16)]))


def test_nothing_in_nothing_out(vae):
    assert list(vae.decode_stream([])) == list(vae.encode_stream([])) == []

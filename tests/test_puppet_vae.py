"""The small VAE: streams, causality, the interface of the library's VAE, and its training."""

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from stableavatar.data.clips import MASKS
from stableavatar.folders import load_model
from stableavatar.puppet import train_vae as recipe
from stableavatar.puppet.train_vae import (
    STATE_FILE,
    ClipStore,
    VAEConfig,
    VAETrainer,
    latent_statistics,
    principal_components,
    psnr,
    train_on,
    train_vae,
    weights,
)  # fmt: skip
from stableavatar.puppet.vae import BLOCK, PuppetVAE, blocks, fold, from_blocks, unfold

TINY = {"widths": (8, 16, 16), "encoder_depths": (1, 1, 1), "decoder_depths": (1, 1, 1)}
SETTINGS = VAEConfig(minutes=0, steps=6, batch=2, frames=5, crop=32, lr=5e-3, warmup=2, dtype="float32", validate_every=3)


def randomised(seed: int = 0) -> PuppetVAE:
    """A tiny VAE in which nothing is zero."""
    generator = torch.Generator().manual_seed(seed)
    vae = PuppetVAE(**TINY, latents_mean=[0.1] * 16, latents_std=[0.7] * 16).eval()
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return vae


def into(output: Path, config: VAEConfig = SETTINGS) -> VAEConfig:
    """The settings, with the folder to write."""
    return replace(config, output=str(output))


def fresh() -> PuppetVAE:
    """A tiny VAE before training."""
    torch.manual_seed(0)
    return PuppetVAE(**TINY)


def video(frames: int, height: int = 16, width: int = 24) -> torch.Tensor:
    return torch.rand(3, frames, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


def clips(count: int, seed: int = 0) -> ClipStore:
    """A bright square that moves, lips and face at once."""
    rng = np.random.default_rng(seed)
    pixels, masks = [], []
    for _ in range(count):
        frames = np.broadcast_to(rng.integers(0, 120, 3), (9, 32, 40, 3)).astype(np.uint8)
        mask = np.zeros((9, 32, 40), np.uint8)
        for frame in range(9):
            mask[frame, 8:16, 4 + 2 * frame : 12 + 2 * frame] = 255
        pixels.append(np.where(mask[..., None], np.uint8(230), frames))
        masks.append(np.stack([mask, mask], -1))
    return ClipStore(pixels, masks)


def encode(vae: PuppetVAE, frames: torch.Tensor, chunk: int) -> torch.Tensor:
    return torch.cat(list(vae.encode_stream(frames.split(chunk, dim=1))), dim=1)


def decode(vae: PuppetVAE, latents: torch.Tensor, chunk: int) -> torch.Tensor:
    return torch.cat(list(vae.decode_stream(latents.split(chunk, dim=1))), dim=1)


@pytest.mark.parametrize("time", [1, 2])
def test_unfold_is_the_inverse_of_fold(time: int) -> None:
    frames = torch.rand(2, 4, 6, 8, 3)
    folded = fold(frames, time)
    assert folded.shape == (2, 4 // time, 3, 4, 12 * time)
    assert torch.equal(unfold(folded, time), frames)


def test_blocks_are_of_four_frames_and_come_back() -> None:
    frames = torch.rand(2, 8, 16, 24, 3)
    found = blocks(frames)
    assert found.shape == (2, 2, 2, 3, BLOCK)
    assert torch.equal(found[1, 1, 0, 2].reshape(4, 8, 8, 3), frames[1, 4:, :8, 16:])
    assert torch.equal(from_blocks(found), frames)


def test_components_are_the_best_linear_ones() -> None:
    """Against the singular values of the same blocks: sizes, a basis, and the error that any such map leaves."""
    config = replace(SETTINGS, lip_weight=0.0, face_weight=0.0)
    data, rng = clips(3), np.random.default_rng([config.seed, 0])
    mean, components, deviations = principal_components(data, config, 8)
    torch.testing.assert_close(components @ components.T, torch.eye(8), atol=1e-5, rtol=0)
    drawn = torch.cat([blocks(data.batch(rng, config)[0][:, 1:]).reshape(-1, BLOCK) for _ in range(recipe.COMPONENT_BATCHES)])
    torch.testing.assert_close(mean, drawn.mean(0), atol=1e-4, rtol=0)
    values = torch.linalg.svdvals((drawn - drawn.mean(0)).double()) / len(drawn) ** 0.5
    torch.testing.assert_close(deviations.double(), values[:8], atol=1e-4, rtol=1e-3)
    weighted = principal_components(data, replace(config, lip_weight=10.0), 8)[0]
    assert weighted.mean() > mean.mean() + 0.1  # lips are the bright square


def test_it_begins_as_the_components_of_its_data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(recipe, "PuppetVAE", lambda: PuppetVAE(**TINY))
    trained = train_on(clips(3), clips(1, seed=1), into(tmp_path, replace(SETTINGS, steps=1, lr=0.0)))
    mean, components, deviations = principal_components(clips(3), SETTINGS, 16)
    torch.testing.assert_close(trained.encoder.linear.weight, components / deviations[:, None])
    frames = torch.from_numpy(clips(1).pixels[0]).float()[None] / 127.5 - 1
    with torch.no_grad():
        result, latents, _ = trained(frames)
    projected = (blocks(frames[:, 1:]) - mean) @ components.T
    torch.testing.assert_close(latents[:, 1:], projected / deviations, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(result[:, 1:], from_blocks(projected @ components + mean), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("chunk", [1, 3, 4, 13])
def test_a_stream_gives_what_one_pass_gives(chunk: int) -> None:
    vae, frames = randomised(), video(13)
    with torch.no_grad():
        result, mean, _ = vae(frames.permute(1, 2, 3, 0)[None])
    latents = encode(vae, frames, chunk)
    assert latents.shape == (16, 4, 2, 3)
    torch.testing.assert_close(latents * 0.7 + 0.1, mean[0].permute(3, 0, 1, 2), atol=1e-5, rtol=0)
    decoded = decode(vae, latents, chunk)
    assert decoded.shape == frames.shape
    torch.testing.assert_close(decoded, result[0].permute(3, 0, 1, 2).clamp(-1, 1), atol=1e-5, rtol=0)


def test_the_future_does_not_change_the_past() -> None:
    vae, frames = randomised(), video(13)
    later = frames.clone()
    later[:, 5:] = -later[:, 5:]
    before, after = encode(vae, frames, 13), encode(vae, later, 13)
    assert torch.equal(before[:, :2], after[:, :2])
    assert not torch.allclose(before[:, 2], after[:, 2])
    assert torch.equal(decode(vae, before, 4)[:, :5], decode(vae, before[:, :2], 2))


def test_the_past_is_seen() -> None:
    vae, frames = randomised(), video(9)
    assert not torch.allclose(encode(vae, frames, 9)[:, 2], encode(vae, torch.cat([-frames[:, :5], frames[:, 5:]], dim=1), 9)[:, 2])


@pytest.mark.parametrize("known", [1, 5, 6])
def test_the_reference_is_a_video_that_goes_on_with_zeros(known: int) -> None:
    vae, frames = randomised(), video(known)
    padded = torch.cat([frames, torch.zeros(3, 61 - known, 16, 24)], dim=1)
    assert torch.equal(vae.encode_reference(frames, 16), encode(vae, padded, 4))


def test_a_reference_is_short_once_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    vae, calls = randomised(), []
    inner = vae._encode_group
    monkeypatch.setattr(vae, "_encode_group", lambda *arguments: calls.append(0) or inner(*arguments))
    assert vae.encode_reference(video(1), 200).shape == (16, 200, 2, 3)
    assert len(calls) < 8


def test_what_cannot_be_encoded() -> None:
    with pytest.raises(ValueError, match="1 \\+ 4k frames; 2 are left over"):
        encode(randomised(), video(7), 7)
    with pytest.raises(ValueError, match="sizes that 8 divides, got 20x16"):
        encode(randomised(), video(5, 16, 20), 5)


def test_saved_and_loaded(tmp_path) -> None:
    vae = randomised()
    vae.save_pretrained(tmp_path)
    loaded = load_model(PuppetVAE, tmp_path, torch.float32)
    assert loaded.config.latents_std == [0.7] * 16 and loaded.config.z_dim == 16
    assert torch.equal(encode(loaded, video(5), 5), encode(vae, video(5), 5))
    vae.enable_tiling()
    assert torch.equal(encode(vae, video(5), 5), encode(loaded, video(5), 5))


def test_it_learns() -> None:
    trainer = VAETrainer(fresh(), replace(SETTINGS, steps=40))
    losses = [trainer.advance(clips(4)) for _ in range(40)]
    assert np.mean(losses[-5:]) < 0.85 * np.mean(losses[:5])


def test_a_stopped_training_goes_on(tmp_path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    data, held_out = clips(3), clips(1, seed=1)
    whole = train_on(data, held_out, into(tmp_path / "whole", SETTINGS), fresh())
    assert "step 3" in caplog.text and "PSNR" in caplog.text
    first = VAETrainer(fresh(), SETTINGS)
    for _ in range(3):
        first.advance(data)
    (tmp_path / "parts").mkdir()
    first.save(tmp_path / "parts" / STATE_FILE)
    parts = train_on(data, held_out, into(tmp_path / "parts", SETTINGS), fresh())
    for one, other in zip(whole.parameters(), parts.parameters()):
        assert torch.equal(one, other)
    with pytest.raises(ValueError, match="training with lr="):
        train_on(data, held_out, into(tmp_path / "parts", replace(SETTINGS, lr=1.0)), fresh())


def test_going_on_measures_no_components(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe, "PuppetVAE", lambda: PuppetVAE(**TINY))
    monkeypatch.setattr(recipe, "principal_components", lambda *_: pytest.fail("the state has all weights"))
    VAETrainer(fresh(), SETTINGS).save(tmp_path / STATE_FILE)
    train_on(clips(3), clips(1), into(tmp_path, replace(SETTINGS, steps=1)))
    assert load_model(PuppetVAE, tmp_path, torch.float32).config.latents_std != [1.0] * 16
    assert {path.name for path in tmp_path.iterdir()} == {STATE_FILE, "config.json", "diffusion_pytorch_model.safetensors"}


def test_a_damaged_state_is_named(tmp_path) -> None:
    path = tmp_path / STATE_FILE
    VAETrainer(fresh(), SETTINGS).save(path)
    whole = path.read_bytes()
    for content in (whole[:-100], b"junk", b""):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"state\.pt is damaged.*remove it") as error:
            VAETrainer(fresh(), SETTINGS).load(path)
        assert "\n" not in str(error.value)
    path.write_bytes(whole)
    with pytest.raises(ValueError, match="of another network"):
        VAETrainer(PuppetVAE(**TINY | {"widths": (16, 16, 16)}), SETTINGS).load(path)


def test_trained_latents_are_normalised(tmp_path) -> None:
    vae = train_on(clips(3), clips(1), into(tmp_path, SETTINGS), fresh())
    loaded = load_model(PuppetVAE, tmp_path, torch.float32)
    videos = [torch.from_numpy(pixels).float().permute(3, 0, 1, 2) / 127.5 - 1 for pixels in clips(3).pixels]
    latents = torch.cat([encode(loaded, frames, 9).flatten(1) for frames in videos], dim=1)
    torch.testing.assert_close(latents.mean(1), torch.zeros(16), atol=1e-3, rtol=0)
    torch.testing.assert_close(latents.std(1), torch.ones(16), atol=1e-3, rtol=0)
    assert loaded.config.latents_mean == latent_statistics(vae, clips(3))[0]
    assert psnr(loaded, clips(1)) == psnr(vae, clips(1))


def test_the_decoder_alone(tmp_path) -> None:
    start, frames = randomised(), video(5)
    before = encode(start, frames, 5)
    vae = train_on(clips(3), clips(1), into(tmp_path, replace(SETTINGS, decoder_only=True)), start)
    assert torch.equal(encode(vae, frames, 5), before)
    assert not torch.allclose(decode(vae, before, 2), decode(randomised(), before, 2))


def test_clips_of_folders(tmp_path) -> None:
    colours = {"images": ("RGB", lambda i: (i, 1, 2)), "lip_masks": ("L", lambda i: 10 * i), "face_masks": ("L", lambda i: 20 * i)}
    for folder, (mode, colour) in colours.items():
        (tmp_path / "a" / folder).mkdir(parents=True)
        for frame in range(5):
            Image.new(mode, (40, 32), colour(frame)).save(tmp_path / "a" / folder / f"frame_{frame}.png")
    (tmp_path / "list.txt").write_text("a\n", encoding="utf-8")
    store = ClipStore.read(str(tmp_path / "list.txt"), 10)
    assert store.pixels[0].shape == (5, 32, 40, 3) and store.masks[0].shape == (5, 32, 40, 2)
    assert store.pixels[0][4, 0, 0].tolist() == [4, 1, 2] and store.masks[0][4, 0, 0].tolist() == [80, 40]
    pixels, masks = store.batch(np.random.default_rng(0), SETTINGS)
    assert pixels.shape == (2, 5, 32, 32, 3) and masks.shape == (2, 5, 32, 32, 2)
    weighted = weights(torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0]]), replace(SETTINGS, face_weight=3.0, lip_weight=10.0))
    assert weighted.flatten().tolist() == [1, 4, 14]
    with pytest.raises(ValueError, match="smaller than 5 crops of 64"):
        store.batch(np.random.default_rng(0), replace(SETTINGS, crop=64))
    with pytest.raises(ValueError, match="smaller than 9 crops of 32"):
        store.batch(np.random.default_rng(0), replace(SETTINGS, frames=9))
    with pytest.raises(ValueError, match="0 clips"):
        ClipStore([], [])
    with pytest.raises(ValueError, match="clip 0 has pictures of"):
        ClipStore(store.pixels, [store.masks[0][:4]])


def test_of_many_clips_some_are_held(tmp_path) -> None:
    for clip in range(7):
        for folder in ("images", "lip_masks", "face_masks"):
            (tmp_path / str(clip) / folder).mkdir(parents=True)
            Image.new("L", (8, 8), clip).save(tmp_path / str(clip) / folder / "frame_0.png")
    (tmp_path / "list.txt").write_text("\n".join(map(str, range(7))), encoding="utf-8")
    held = {most: [int(clip.max()) for clip in ClipStore.read(str(tmp_path / "list.txt"), most).pixels] for most in (3, 7, 10)}
    assert held == {3: [0, 3, 6], 7: [*range(7)], 10: [*range(7)]}


def test_from_folders_to_a_model(tmp_path) -> None:
    for clip, store in enumerate((clips(1), clips(1, seed=1), clips(1, seed=2))):
        for name, frames in (("images", store.pixels[0]), *zip(MASKS, np.moveaxis(store.masks[0], -1, 0))):
            (tmp_path / str(clip) / name).mkdir(parents=True)
            for number, frame in enumerate(frames):
                Image.fromarray(frame).save(tmp_path / str(clip) / name / f"frame_{number}.png")
    (tmp_path / "list.txt").write_text("0\n1\n2\n", encoding="utf-8")
    fresh().save_pretrained(tmp_path / "start")
    config = replace(into(tmp_path / "vae"), lists=str(tmp_path / "list.txt"), start=str(tmp_path / "start"), held_out=1, steps=2)
    train_vae(config)
    assert load_model(PuppetVAE, tmp_path / "vae", torch.float32).config.latents_std != [1.0] * 16
    with pytest.raises(ValueError, match="held_out=3 leaves none of 3 clips"):
        train_vae(replace(config, held_out=3))
    with pytest.raises(ValueError, match="frames must be 1 \\+ 4k"):
        replace(config, frames=6).check()


def test_widths_that_do_not_divide() -> None:
    with pytest.raises(ValueError, match="maps 64 channels to 12"):
        PuppetVAE(widths=(8, 12, 16))

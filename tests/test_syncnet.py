"""SyncNet's network, its inputs and its distances; the weights themselves are not here."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from python_speech_features import mfcc
from torch import Tensor, nn

from stableavatar.evaluation import syncnet
from stableavatar.evaluation.syncnet import GREY, SHIFT, OffsetDistances, SyncNet, face_crops, load_syncnet, measure_sync, mfcc_steps
from stableavatar.media import AudioTrack

LAYERS = {
    "netcnnaud": {0: (64, 1, 3, 3), 4: (192, 64, 3, 3), 8: (384, 192, 3, 3), 11: (256, 384, 3, 3), 14: (256, 256, 3, 3),
                  18: (512, 256, 5, 4)},
    "netcnnlip": {0: (96, 3, 5, 7, 7), 4: (256, 96, 1, 5, 5), 8: (256, 256, 1, 3, 3), 11: (256, 256, 1, 3, 3), 14: (256, 256, 1, 3, 3),
                  18: (512, 256, 1, 6, 6)},
    "netfcaud": {0: (512, 512), 3: (1024, 512)},
    "netfclip": {0: (512, 512), 3: (1024, 512)},
}  # fmt: skip
"""Shapes of the released weights by number of layer; a batch norm follows each but the last of the heads."""


@pytest.fixture(scope="module")
def network() -> SyncNet:
    """Random, with batch norms that are not the identity."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = SyncNet().eval().requires_grad_(False)
    for name, tensor in model.state_dict().items():
        if "running" in name:
            noise = torch.rand(tensor.shape, generator=generator)
            tensor.copy_(0.1 * noise - 0.05 if name.endswith("mean") else 0.1 * noise + 0.1)
    return model


def released_shapes() -> dict[str, tuple[int, ...]]:
    shapes = {}
    for part, layers in LAYERS.items():
        for number, shape in layers.items():
            shapes |= {f"{part}.{number}.weight": shape, f"{part}.{number}.bias": shape[:1]}
            if shape[0] != 1024:
                shapes |= {f"{part}.{number + 1}.{name}": shape[:1] for name in ("weight", "bias", "running_mean", "running_var")}
    return shapes


def write_sound(path: Path, samples: np.ndarray) -> Path:
    soundfile.write(path, samples.astype(np.float32), 16_000, subtype="PCM_16")
    return path


def test_the_released_tensors_load_strictly(tmp_path: Path, network: SyncNet) -> None:
    state = network.state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in state.items() if "num_batches" not in name} == released_shapes()
    old = {name: tensor for name, tensor in state.items() if "num_batches" not in name}  # as PyTorch 0.3 wrote them
    torch.save(old, tmp_path / "syncnet_v2.model", _use_new_zipfile_serialization=False)
    loaded = load_syncnet(tmp_path / "syncnet_v2.model")
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in old.items()) and not loaded.training


def test_wrong_weights_are_named(tmp_path: Path, network: SyncNet) -> None:
    state = dict(network.state_dict())
    state.pop("netfclip.3.bias")
    path = tmp_path / "weights.model"
    for content, words in [(state, "netfclip.3.bias"), (network, "does not hold"), ({"a": 1}, "does not hold")]:
        torch.save(content, path)
        with pytest.raises(ValueError, match=words) as caught:
            load_syncnet(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="weights.model does not hold"):
        load_syncnet(path)
    with pytest.raises(ValueError, match="do not exist"):
        load_syncnet(tmp_path / "none.model")


def test_windows_of_a_run_are_those_taken_one_by_one(network: SyncNet) -> None:
    generator = torch.Generator().manual_seed(1)
    crops = torch.randint(0, 256, (7, 3, 224, 224), generator=generator).float()
    steps = torch.randn(28, 13, generator=generator)
    lips, voices = network.embed_lips(crops), network.embed_voice(steps)
    assert lips.shape == voices.shape == (3, 1024)
    for number in range(3):
        alone = network.embed_lips(crops[number : number + 5]), network.embed_voice(steps[4 * number : 4 * number + 20])
        for one, all_of_them in zip(alone, (lips, voices)):
            apart = (all_of_them[number] - one[0]).abs().max(), (all_of_them[0] - all_of_them[1]).abs().max()
            assert apart[0] < 1e-3 * apart[1], "as far from itself as from another window"


def test_voice_sees_coefficients_down_and_time_across(network: SyncNet) -> None:
    """The network's picture of a window is [13 coefficients, 20 steps], as the authors stack it."""
    steps = torch.randn(20, 13, generator=torch.Generator().manual_seed(2))
    seen = []
    handle = network.netcnnaud.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    network.embed_voice(steps)
    handle.remove()
    assert torch.equal(seen[0], steps.T[None, None])


@pytest.mark.parametrize("delay", [-7, 0, 4, 15])
def test_a_planted_offset_is_found(delay: int) -> None:
    generator = torch.Generator().manual_seed(delay + 50)
    voices = torch.randn(120, 16, generator=generator)
    lips = torch.roll(voices, delay, 0) + 0.1 * torch.randn(120, 16, generator=generator)
    distances = OffsetDistances()
    for first in range(0, 120, 7):
        distances.add(lips[first : first + 7], voices[first : first + 7])
    sync = distances.result()
    means = reference_means(lips.numpy(), voices.numpy())
    assert sync.offset == delay == SHIFT - int(means.argmin()) and sync.windows == 120
    assert sync.distance == pytest.approx(means.min(), rel=1e-4)
    assert sync.confidence == pytest.approx(np.median(means) - means.min(), rel=1e-4) and sync.confidence > 1


def reference_means(lips: np.ndarray, voices: np.ndarray) -> np.ndarray:
    """Means of Euclidean distances at every offset, with zeros beyond the ends of the voice."""
    padded = np.pad(voices, [(SHIFT, SHIFT), (0, 0)])
    pairs = [[np.linalg.norm(lip - padded[number + shift]) for shift in range(2 * SHIFT + 1)] for number, lip in enumerate(lips)]
    return np.mean(pairs, axis=0)


def test_voices_that_fit_nowhere_have_no_confidence() -> None:
    generator = torch.Generator().manual_seed(3)
    distances = OffsetDistances()
    distances.add(torch.randn(300, 16, generator=generator), torch.randn(300, 16, generator=generator))
    assert distances.result().confidence < 0.3


def test_mfcc_in_pieces_is_that_of_the_whole(tmp_path: Path) -> None:
    samples = np.random.default_rng(0).normal(0, 0.1, 16_000)
    path = write_sound(tmp_path / "noise.wav", samples)
    whole = mfcc(soundfile.read(path, dtype="int16")[0], 16_000)
    with AudioTrack(path) as track:
        np.testing.assert_allclose(mfcc_steps(track, 0, 98), whole[:98], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(mfcc_steps(track, 37, 20), whole[37:57], rtol=1e-4, atol=1e-4)


class Loudness(nn.Module):
    """A network whose lips are the brightness of the crops and whose voice is the mean logarithm of the energy.

    For the noise below (standard deviation 0.02 of 16 bits, raised treble) that has a mean of 18.93.
    """

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))

    def embed_lips(self, crops: Tensor) -> Tensor:
        return crops.mean((1, 2, 3)).unfold(0, 5, 1).mean(1, keepdim=True) - 128

    def embed_voice(self, steps: Tensor) -> Tensor:
        return (steps[:, :1].unfold(0, 20, 4).mean(2) - 18.93) * 10


def loud_and_bright(tmp_path: Path, frames: int, delay: int) -> tuple[Path, list[np.ndarray]]:
    """Noise of random loudness in every 40 ms, and crops as bright as the noise was loud `delay` frames before."""
    generator = np.random.default_rng(delay + 100)
    levels = generator.uniform(-1, 1, frames + 40)
    heard = levels[20 : 20 + frames]
    noise = generator.normal(0, 1, frames * 640) * np.repeat(np.exp(heard) * 0.02, 640)
    path = write_sound(tmp_path / f"{delay}.wav", noise)
    seen = levels[20 - delay :][:frames]
    return path, [np.full((224, 224, 3), round(128 + 20 * level), np.uint8) for level in seen]


@pytest.mark.parametrize("delay", [-4, 0, 6])
def test_crops_and_sound_stay_in_step(tmp_path: Path, delay: int) -> None:
    path, crops = loud_and_bright(tmp_path, 150, delay)
    with AudioTrack(path) as track:
        found = [measure_sync(Loudness(), iter(crops), track, batch) for batch in (7, 64, 1000)]
    assert {(sync.offset, sync.windows) for sync in found} == {(delay, 145)}
    assert np.ptp([sync.distance for sync in found]) < 1e-3


def test_colours_reach_the_network_blue_first(tmp_path: Path) -> None:
    class Colours(Loudness):
        def embed_lips(self, crops: Tensor) -> Tensor:
            seen.append(crops[0, :, 0, 0].tolist())
            return super().embed_lips(crops)

    seen: list[list[float]] = []
    path, _ = loud_and_bright(tmp_path, 10, 0)
    with AudioTrack(path) as track:
        measure_sync(Colours(), [np.full((224, 224, 3), (10, 20, 30), np.uint8)] * 10, track)
    assert seen == [[30.0, 20.0, 10.0]]


def test_too_short_to_measure(tmp_path: Path) -> None:
    path, crops = loud_and_bright(tmp_path, 5, 0)
    with AudioTrack(path) as track, pytest.raises(ValueError, match=r"0\.wav .* shorter than 0\.24 s"):
        measure_sync(Loudness(), crops, track)


@pytest.mark.parametrize("crops", range(14))
def test_every_window_comes_once_and_few_are_held(crops: int) -> None:
    taken = 0

    def counted() -> Iterator[int]:
        nonlocal taken
        for taken in range(1, 41):
            yield taken - 1

    starts = []
    for chunk in syncnet._window_chunks(counted(), crops, 3):
        starts += list(chunk)[: len(chunk) - 4]
        assert taken - starts[-1] <= 6, "more than a window and one crop were taken ahead"
    assert starts == list(range(crops - 5)) and taken <= crops


def painted(width: int = 300, height: int = 200) -> np.ndarray:
    """A picture whose red tells the column and whose green tells the row."""
    rows, columns = np.mgrid[0:height, 0:width]
    return np.stack([columns * 255 / width, rows * 255 / height, np.zeros_like(rows)], axis=2).astype(np.uint8)


def test_the_crop_reaches_below_the_face() -> None:
    box = np.array([[100, 60, 160, 140]], np.float32)  # half of the longer side: 40, centre: (130, 100)
    crop = next(face_crops([painted()], box)).astype(float)
    assert crop.shape == (224, 224, 3)
    (left, top), (right, bottom) = crop[0, 0, :2] * (300 / 255, 200 / 255), crop[-1, -1, :2] * (300 / 255, 200 / 255)
    assert left == pytest.approx(130 - 56, abs=2) and right == pytest.approx(130 + 56, abs=2)
    assert top == pytest.approx(100 - 40, abs=2) and bottom == pytest.approx(100 + 72, abs=2)


def test_outside_of_the_picture_is_grey_and_a_jump_is_smoothed() -> None:
    boxes = np.tile(np.array([[0, 0, 80, 80]], np.float32), (30, 1))
    boxes[15] = [200, 100, 280, 180]
    crops = list(face_crops([painted()] * 30, boxes))
    assert (crops[0][:, :10] == GREY).all() and not (crops[0][100, 100] == GREY).all()
    assert np.array_equal(crops[15], crops[0])

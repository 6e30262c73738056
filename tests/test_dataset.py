import logging
import pickle
import shutil
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from clip_files import HEIGHT, LEVEL, WIDTH, make_clip, pictures, rate, record, write_images, write_sound, write_video
from media_files import run_ffmpeg
from PIL import Image
from torch.utils.data import DataLoader

from stableavatar.data.buckets import EpochPlan, RankSampler, assign
from stableavatar.data.clips import Clip, probe
from stableavatar.data.dataset import ClipDataset, Loaded, start_of
from stableavatar.data.frames import read_masks, read_pixels, read_sound, sample_indices
from stableavatar.data.samples import Item, Sample

SIZE = (WIDTH, HEIGHT)
RATES = ["24000/1001", "24", "25", "30000/1001", "30", "50", "60", "12"]


def dataset(clips: list[Clip], lengths: tuple[int, ...] = (21,), fps: float = 25) -> ClipDataset:
    buckets, _ = assign(clips, [SIZE], lengths, fps)
    return ClipDataset(clips, buckets, fps, seed=3)


def order(data: ClipDataset, clip: int = 0, run: int = 0) -> Item:
    bucket = next(bucket for bucket, clips in data.buckets.items() if clip in clips)
    return Item(clip, bucket, run, epoch=run, step=0, slot=0, of=1)


def shown(pixels: torch.Tensor) -> np.ndarray:
    """Numbers of the pictures of a sample."""
    assert (pixels == pixels[:, :1, :1, :1]).all()
    return pixels[:, 0, 0, 0].numpy().astype(int)


@pytest.mark.parametrize("fps", RATES)
def test_any_rate_is_sampled_with_the_sound_in_step(tmp_path: Path, fps: str) -> None:
    """Both tell their time: picture by its brightness, sound by its level."""
    clip = probe(make_clip(tmp_path / "a", int(3 * rate(fps)), fps, "video", masks=False), 1)
    data = dataset([clip])
    for run in range(3):
        sample = data[order(data, run=run)].value
        assert sample.pixels.shape == (21, HEIGHT, WIDTH, 3) and sample.waveform.shape in ((13_440,), (13_439,))
        seen = shown(sample.pixels) / rate(fps)
        heard = sample.waveform[(np.arange(21) * 640).clip(0, len(sample.waveform) - 1)] / LEVEL
        assert np.abs(seen - heard).max() <= 0.5 / rate(fps) + 2 / 16_000


def test_sound_of_other_rates_and_of_the_video_is_in_step(tmp_path: Path) -> None:
    folder = make_clip(tmp_path / "a", 100)
    write_sound(folder / "audio.wav", 4, 44_100, 2)
    make_clip(tmp_path / "b", 100, source="video")
    (tmp_path / "c").mkdir()
    sources = ("-i", str(tmp_path / "b" / "sub_clip.mp4"), "-itsoffset", "0.4", "-i", str(tmp_path / "b" / "audio.wav"))
    maps = ("-map", "0:v", "-map", "1:a", "-c:v", "copy", "-c:a", "alac")
    run_ffmpeg(*sources, *maps, str(tmp_path / "c" / "sub_clip.mp4"))
    for name, late in (("a", 0), ("b", 0), ("c", 0.4)):
        heard = read_sound(probe(tmp_path / name, 25), 30, 21, 25)
        assert len(heard) == 21 * 640
        assert np.abs(heard / LEVEL - (30 / 25 - late + np.arange(len(heard)) / 16_000))[200:-200].max() < 2e-3


def test_nearest_frames() -> None:
    def indices(source: float, start: int, frames: int) -> list[int]:
        return sample_indices(record(fps=source, frames=1000), start, frames, 25)

    assert indices(25, 7, 5) == [7, 8, 9, 10, 11]
    assert indices(50, 3, 4) == [6, 8, 10, 12]
    assert indices(30, 0, 6) == [0, 1, 2, 4, 5, 6]
    assert indices(12.5, 0, 6) == [0, 0, 1, 1, 2, 2], "of two that are equally near the earlier"
    for source in (7, 10, 12, 24_000 / 1001, 25, 29.97, 50, 60):
        for count in range(20, 60):
            clip = record(fps=source, frames=count)
            unused = count - 1 - sample_indices(clip, 0, clip.frames_at(25), 25)[-1]
            assert 0 <= unused <= 2 * source / 25, (source, count)  # less than two grid frames are left over
        found = np.array(indices(source, 100, 200))
        assert np.abs(found / source - np.arange(100, 300) / 25).max() <= 0.5 / source + 1e-9


OPEN_GOP = ("-c:v", "libx264", "-x264-params", "open-gop=1:bframes=3:keyint=15")
MPEG4 = ("-c:v", "mpeg4", "-bf", "2")


@pytest.mark.parametrize("options", [(), OPEN_GOP, MPEG4])
@pytest.mark.parametrize("start", ["whole", "cut", "late"])
def test_frames_of_a_video_are_those_of_a_full_decode(tmp_path: Path, options: tuple[str, ...], start: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (60, 3, 4, 3), np.uint8).repeat(16, 1).repeat(16, 2)
    video = tmp_path / "sub_clip.mp4"
    write_video(tmp_path / "whole.mp4", noise, "30000/1001", *options)
    write_sound(tmp_path / "audio.wav", 2)
    sound = ("-i", str(tmp_path / "audio.wav"), "-map", "1:a", "-map", "0:v", "-c:a", "alac")
    before = {"whole": (), "cut": ("-ss", "0.6"), "late": ("-itsoffset", "0.3")}[start]
    run_ffmpeg(*before, "-i", str(tmp_path / "whole.mp4"), *sound, "-c:v", "copy", str(video))
    raw = run_ffmpeg("-i", str(video), "-fps_mode", "passthrough", "-pix_fmt", "rgb24", "-f", "rawvideo", "-")
    decoded = np.frombuffer(raw, np.uint8).reshape(-1, HEIGHT, WIDTH, 3)
    clip = probe(tmp_path, 25)
    assert len(decoded) == clip.frames
    for first in range(0, clip.frames - 3, 3):
        indices = [first, first + 1, first + 1, first + 3]
        assert np.array_equal(read_pixels(clip, indices, *SIZE), decoded[indices]), first
    last = [clip.frames - 1]
    assert np.array_equal(read_pixels(clip, last, *SIZE), decoded[last])


def test_an_uneven_video_keeps_its_times(tmp_path: Path) -> None:
    drop = ("-vf", "select='not(between(n,20,39))'", "-fps_mode", "vfr", "-c:v", "libx264rgb", "-qp", "0")
    write_video(tmp_path / "sub_clip.mp4", pictures(80), "25", *drop)
    write_sound(tmp_path / "audio.wav", 3.2)
    clip = probe(tmp_path, 25)
    assert not clip.video.even and clip.frames == 80
    assert shown(read_pixels(clip, range(15, 45), *SIZE)).tolist() == [15, 16, 17, 18, *[19] * 21, 40, 41, 42, 43, 44]
    assert shown(read_pixels(clip, [30, 60, 79], *SIZE)).tolist() == [19, 60, 79]


def test_images_equal_the_video(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (50, HEIGHT, WIDTH, 3), np.uint8)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_sound(tmp_path / name / "audio.wav", 2)
        write_video(tmp_path / name / "sub_clip.mp4", noise, "30")
    write_images(tmp_path / "a" / "images", noise)
    clips = [probe(tmp_path / name, 25) for name in ("a", "b")]
    assert clips[0].video is None and clips[1].video is not None
    indices = sample_indices(clips[0], 5, 21, 25)
    for size in (SIZE, (32, 32), (80, 48)):
        images, video = (read_pixels(clip, indices, *size) for clip in clips)
        assert torch.equal(images, video) and images.shape == (21, size[1], size[0], 3)
    assert np.array_equal(read_pixels(clips[0], indices, *SIZE), noise[indices]), "no resampling where the size fits"


def test_odd_pictures_are_read(tmp_path: Path) -> None:
    write_images(tmp_path / "images", pictures(6))
    write_sound(tmp_path / "audio.wav", 1)
    Image.fromarray(pictures(3)[2]).quantize().save(tmp_path / "images" / "frame_2.png")
    Image.fromarray(np.dstack([pictures(4)[3], np.full((HEIGHT, WIDTH), 255, np.uint8)])).save(tmp_path / "images" / "frame_3.png")
    Image.fromarray(np.full((HEIGHT, WIDTH), 4 * 257, np.uint16)).save(tmp_path / "images" / "frame_4.png")
    assert shown(read_pixels(probe(tmp_path, 25), range(6), *SIZE)).tolist() == [0, 1, 2, 3, 4, 5]


def masked_clip(folder: Path, masks: np.ndarray) -> Clip:
    """A clip with these face masks [T, H, W]."""
    write_images(folder / "images", pictures(*masks.shape[:1], masks.shape[2], masks.shape[1]))
    write_images(folder / "face_masks", masks)
    write_sound(folder / "audio.wav", len(masks) / 25)
    return probe(folder, 25)


def test_masks_by_hand(tmp_path: Path) -> None:
    masks = np.random.default_rng(0).integers(0, 256, (9, HEIGHT, WIDTH), np.uint8)
    masks[:5] = 0
    got = read_masks(masked_clip(tmp_path, masks), range(9), *SIZE)
    assert got.shape == (2, 3, HEIGHT // 8, WIDTH // 8) and (got[1] == 1).all()
    four = masks.reshape(9, HEIGHT // 8, 8, WIDTH // 8, 8)[:, :, 3:5, :, 3:5].mean((2, 4)) / 255  # the middle of each 8 x 8
    assert np.allclose(got[0], four[[1, 4, 7]], atol=1e-6), "nine frames to three: the middle of each third"
    whole = torch.from_numpy(masks)[None, None] / 255
    assert torch.allclose(got[0], torch.nn.functional.interpolate(whole, (3, 6, 8), mode="trilinear")[0, 0], atol=1e-6)


def test_masks_are_cut_as_the_pictures(tmp_path: Path) -> None:
    masks = np.zeros((5, 64, 128), np.uint8)
    masks[:, :, 64:96] = 255
    got = read_masks(masked_clip(tmp_path, masks), range(5), 32, 32)[0]
    assert got[0].tolist() == [[0, 0, 1, 1]] * 4


def test_kinds_of_masks(tmp_path: Path) -> None:
    clip = masked_clip(tmp_path, np.zeros((5, 16, 16), np.uint8))
    bright = np.zeros((16, 16), bool)
    bright[:, 8:] = True
    level = np.where(bright, 255, 0).astype(np.uint8)
    files = [clip.folder / "face_masks" / f"frame_{i}.png" for i in range(5)]
    Image.fromarray(bright).save(files[0])
    Image.fromarray(level).quantize().save(files[1])
    Image.fromarray(np.stack([level] * 3, -1)).save(files[2])
    Image.fromarray(np.dstack([np.full((16, 16, 3), 255, np.uint8), level])).save(files[3])
    Image.fromarray(level.astype(np.uint16) * 257).save(files[4])
    for i in range(5):
        assert read_masks(clip, [i], 16, 16)[0].tolist() == [[[0, 1]] * 2], f"kind {i}"


def test_missing_masks_are_ones_with_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    clips = [probe(make_clip(tmp_path / name, masks=name == "a"), 25) for name in "abc"]
    shutil.rmtree(tmp_path / "a" / "lip_masks")
    clips[0] = probe(tmp_path / "a", 25)
    data = dataset(clips)
    masks = [data[order(data, clip, run)].value.masks for clip in range(3) for run in range(2)]
    assert [record.levelno for record in caplog.records] == [logging.WARNING] and "3 of 3 clips lack face_masks" in caplog.text
    assert (masks[0][1] == 1).all() and masks[0][0].min() == 0 and all((mask == 1).all() for mask in masks[2:])
    caplog.clear()
    dataset([probe(make_clip(tmp_path / "d"), 25)])
    assert not caplog.records


def test_starts_are_spread_and_follow_from_the_run() -> None:
    clip = record(frames=50, fps=50)
    starts = [start_of(clip, run, 21, 25, seed=3) for run in range(300)]
    assert set(starts) == set(range(5)) and min(starts.count(start) for start in set(starts)) > 35
    assert starts == [start_of(clip, run, 21, 25, seed=3) for run in range(300)]
    other = [start_of(record(frames=50, fps=50, name="b"), run, 21, 25, seed=3) for run in range(300)]
    assert starts != other != [start_of(clip, run, 21, 25, seed=4) for run in range(300)]
    assert start_of(record(frames=21), 7, 21, 25, seed=3) == 0


def test_a_broken_clip_is_replaced_and_named(tmp_path: Path) -> None:
    clips = [probe(make_clip(tmp_path / name, 22), 25) for name in "abcd"]
    data = dataset(clips)
    (tmp_path / "a" / "images" / "frame_10.png").write_bytes(b"no picture")
    (tmp_path / "b" / "lip_masks" / "frame_11.png").unlink()
    (tmp_path / "d" / "audio.wav").unlink()
    loaded = data[order(data, 0)]
    assert (loaded.value.name, loaded.value.item.weight, loaded.value.item.clip) == (str(tmp_path / "c"), 0, 2)
    assert [Path(folder).name for folder, _ in loaded.broken] == ["a", "b"]
    assert all(word in reason for word, (_, reason) in zip(["frame_10.png: not an image", "frame_11.png"], loaded.broken))
    assert [Path(folder).name for folder, _ in data[order(data, 3)].broken] == ["d", "a", "b"]
    whole = data[order(data, 2)]
    assert whole.broken == () and whole.value.item == order(data, 2)
    shutil.rmtree(tmp_path / "c")
    with pytest.raises(ValueError, match="4 clips in a row cannot be read.*64x48, 21 frames") as error:
        data[order(data, 1)]
    assert "\n" not in str(error.value)


def test_pictures_and_masks_of_another_size_are_refused(tmp_path: Path) -> None:
    clip = probe(make_clip(tmp_path / "a", 6), 25)
    for folder in ("images", "face_masks"):
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "a" / folder / "frame_4.png")
    with pytest.raises(ValueError, match="images/frame_4.png is of 8x8; expected 64x48"):
        read_pixels(clip, range(6), *SIZE)
    with pytest.raises(ValueError, match="face_masks/frame_4.png is of 8x8"):
        read_masks(clip, range(6), *SIZE)


def test_damage_in_a_video_is_not_painted_over(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (40, HEIGHT, WIDTH, 3), np.uint8)
    write_video(tmp_path / "sub_clip.mp4", noise, "25", "-c:v", "libx264", "-qp", "20", "-movflags", "faststart")
    soundfile.write(tmp_path / "audio.wav", np.zeros(30_000), 16_000)
    clip = probe(tmp_path, 25)
    content = bytearray((tmp_path / "sub_clip.mp4").read_bytes())
    middle = len(content) // 2
    content[middle : middle + 20_000] = bytes(20_000)  # more than one frame
    (tmp_path / "sub_clip.mp4").write_bytes(content)
    with pytest.raises(ValueError, match="cannot read frame .* of .*sub_clip.mp4"):
        read_pixels(clip, range(40), *SIZE)
    assert read_pixels(clip, range(3), *SIZE).shape[0] == 3


def same(one: Sample, other: Sample) -> bool:
    alike = (one.item, one.name, one.prompt) == (other.item, other.name, other.prompt) and np.array_equal(one.waveform, other.waveform)
    return alike and torch.equal(one.pixels, other.pixels) and torch.equal(one.masks, other.masks)


def test_workers_give_the_same_samples(tmp_path: Path) -> None:
    kinds = [("a", 30, "25", "images"), ("b", 30, "24", "video"), ("c", 60, "25", "images"), ("d", 40, "30", "video")]
    data = dataset([probe(make_clip(tmp_path / kind[0], *kind[1:]), 25) for kind in kinds], (41, 21))
    plan = EpochPlan(data.buckets, 3, 0, processes=1, batch=2, accumulation=1)

    def load(workers: int) -> list[Loaded]:
        loader = DataLoader(data, batch_sampler=RankSampler(plan, 0), num_workers=workers, collate_fn=list)
        return [loaded for batch in islice(loader, 5) for loaded in batch]

    alone, shared = load(0), load(2)
    assert len({loaded.value.item.epoch for loaded in alone}) > 1
    assert all(same(one.value, other.value) and one.broken == other.broken == () for one, other in zip(alone, shared))
    assert len(pickle.dumps(data)) < 5_000

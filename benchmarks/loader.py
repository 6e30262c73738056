"""Clips a second that one worker process of the training's loader delivers, from pictures, from videos and from a latent cache.

    python benchmarks/loader.py [--width 512] [--height 512] [--frames 81] [--clips 4] [--workers 1] [--cache FOLDER]

It makes its own clips (moving test picture, tone, round masks) in a temporary folder; --cache adds one that scripts/cache_latents.py wrote.
"""

import argparse
import subprocess
import tempfile
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from torch.utils.data import DataLoader

from stableavatar import ffmpeg
from stableavatar.data.buckets import EpochPlan, RankSampler
from stableavatar.data.clips import Clip, probe
from stableavatar.data.dataset import BucketDataset, ClipDataset
from stableavatar.data.samples import Bucket
from stableavatar.geometry import FPS

SPARE = 40
"""Frames of a clip beyond those of a sample, so that runs start anywhere."""
ROUND = "geq=lum='255*lt(hypot(X-W/2,Y-H/2),H/4)':cb=128:cr=128,format=gray"


def write_clip(folder: Path, size: str, frames: int, images: bool, masks: bool) -> Path:
    """A clip folder of pictures or of a video."""
    for name in ("images",) * images + ("face_masks", "lip_masks") * masks:
        (folder / name).mkdir(parents=True)
    folder.mkdir(parents=True, exist_ok=True)
    test, tone = f"testsrc2=s={size}:r={FPS}", f"sine=d={frames / FPS}:r=44100"
    numbered = ["-start_number", "0"]
    picture = [*numbered, str(folder / "images" / "frame_%d.png")] if images else [str(folder / "sub_clip.mp4")]
    calls = [[test, "-frames:v", str(frames), *([] if images else ["-pix_fmt", "yuv420p"]), *picture], [tone, str(folder / "audio.wav")]]
    for name in ("face_masks", "lip_masks") * masks:
        calls.append([f"color=black:s={size}", "-frames:v", str(frames), "-vf", ROUND, *numbered, str(folder / name / "frame_%d.png")])
    for source, *arguments in calls:
        subprocess.run(ffmpeg.command("-f", "lavfi", "-i", source, *arguments), check=True)
    return folder


def clip_dataset(folders: Sequence[Path], bucket: Bucket) -> ClipDataset:
    """Clips that are all of one bucket."""
    return ClipDataset([probe(folder, FPS) for folder in folders], {bucket: range(len(folders))}, FPS, seed=0)


def cached_dataset(folder: Path) -> BucketDataset:
    """The first run of every whole clip of a cache."""
    from stableavatar.data.cache_index import read_index
    from stableavatar.data.latent_cache import CachedDataset

    keys = [key for key, entry in read_index(folder).items() if not entry.broken and key.run == 0]
    clips = [Clip(Path(key.clip), "", key.bucket.width, key.bucket.height, 0, FPS, None, "", 0, 0, (True, True)) for key in keys]
    buckets = {bucket: [i for i, key in enumerate(keys) if key.bucket == bucket] for bucket in {key.bucket for key in keys}}
    return CachedDataset(folder, clips, buckets, 1, {})


def clips_per_second(dataset: BucketDataset, workers: int, seconds: float) -> float:
    """Of one of `workers` worker processes; those they need to start, and to fill their queues, are not counted."""
    plan = EpochPlan(dataset.buckets, seed=0, runs=1, processes=1, batch=1, accumulation=1)
    loader = iter(DataLoader(dataset, batch_sampler=RankSampler(plan, 0), num_workers=workers, collate_fn=list))
    for _ in islice(loader, 3 * workers):
        pass
    count, start = 0, time.perf_counter()
    while (taken := time.perf_counter() - start) < seconds:
        next(loader)
        count += 1
    return count / taken / workers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in [("width", 512), ("height", 512), ("frames", 81), ("clips", 4), ("workers", 1)]:
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--seconds", type=float, default=15.0, help="how long each source is measured")
    parser.add_argument("--cache", type=Path, help="folder that scripts/cache_latents.py wrote")
    options = parser.parse_args()
    bucket, size = Bucket(options.width, options.height, options.frames), f"{options.width}x{options.height}"
    print(f"{size}, {options.frames} frames, {options.workers} workers\n\n| source | clips/s per worker |\n|---|---|")
    kinds = {"PNG frames, masks": (True, True), "mp4, masks": (False, True), "mp4, no masks": (False, False)}
    for number, (kind, parts) in enumerate(kinds.items()):
        with tempfile.TemporaryDirectory() as root:
            folders = [write_clip(Path(root) / f"{number}_{i}", size, options.frames + SPARE, *parts) for i in range(options.clips)]
            print(f"| {kind} | {clips_per_second(clip_dataset(folders, bucket), options.workers, options.seconds):.2f} |", flush=True)
    if options.cache:
        print(f"| latent cache | {clips_per_second(cached_dataset(options.cache), options.workers, options.seconds):.2f} |")


if __name__ == "__main__":
    main()

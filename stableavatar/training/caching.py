"""Writes the latent cache: every clip's fixed runs through the frozen encoders, each process its part."""

import logging
import math
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from stableavatar.data.buckets import assign
from stableavatar.data.cache_index import Key, read_index
from stableavatar.data.clips import one_line
from stableavatar.data.dataset import ClipDataset
from stableavatar.data.latent_cache import CacheWriter
from stableavatar.data.samples import Bucket, Item, Sample
from stableavatar.geometry import IMAGE_TOKENS, LATENT_CHANNELS, frame_samples
from stableavatar.parallel.launch import PATIENCE
from stableavatar.sampling.offload import resolve_device
from stableavatar.training.config import TrainConfig, parse_lengths, parse_sizes
from stableavatar.training.encode import SampleEncoder
from stableavatar.training.parts import check_model, encoding_identity, load_frozen_parts, text_length
from stableavatar.training.processes import on_main
from stableavatar.training.source import ignore_signals, list_clips

logger = logging.getLogger(__name__)

TOGETHER = 4
"""Samples that are encoded in one go: with the hand-over, each model moves once for all of them."""


class Samples(Dataset[Sample | tuple[Item, str]]):
    """Samples of a ClipDataset; of a clip that cannot be read, the order and the reason."""

    def __init__(self, clips: ClipDataset) -> None:
        self.clips = clips

    def __getitem__(self, item: Item) -> Sample | tuple[Item, str]:
        try:
            return self.clips.read(item)
        except (ValueError, OSError) as error:
            return item, one_line(error)


def write_cache(config: TrainConfig) -> None:
    """Adds to the cache what it lacks, and says what is in it.

    Raises:
        ValueError: settings, lists or models that cannot be used, a cache of other settings, too many broken clips.
    """
    if not config.data.cache:
        raise ValueError("data.cache is missing; give data.cache=FOLDER, where the cache is to be written")
    torch.set_flush_denormal(True)  # as in training: the frames after the reference fade to denormals inside the VAE
    check_model(config, transformer=False)
    resolve_device(config.device)
    state = PartialState(cpu=config.device == "cpu", timeout=PATIENCE)
    clips, broken = on_main(state, lambda: list_clips(config.data, config.data.lists, None))
    buckets, short = assign(clips, parse_sizes(config.data.sizes), parse_lengths(config.data.frames), config.data.fps)
    dataset = ClipDataset(clips, buckets, config.data.fps, config.data.seed)
    items = [Item(clip, bucket, run, run, 0, 0, 1) for run in range(config.data.runs) for bucket in buckets for clip in buckets[bucket]]
    with state.main_process_first():
        identity, dtype = encoding_identity(config), getattr(torch, config.data.cache_dtype)
        writer = CacheWriter(Path(config.data.cache), identity, dtype, state.process_index)
    with writer:
        add_samples(writer, dataset, items[state.process_index :: state.num_processes], config, state)
    state.wait_for_everyone()
    if state.is_main_process:
        if short:
            logger.warning("%d clips are shorter than data.frames=%s and were left out", len(short), config.data.frames)
        report(config, [key_of(dataset, item) for item in items], broken)


def key_of(dataset: ClipDataset, item: Item) -> Key:
    """What an order's sample is called in a cache."""
    return Key(dataset.clips[item.clip].name, item.run, item.bucket)


def add_samples(writer: CacheWriter, dataset: ClipDataset, items: Sequence[Item], config: TrainConfig, state: PartialState) -> None:
    """Encodes those of `items` that the cache lacks."""
    todo = [item for item in items if not writer.done(key_of(dataset, item))]
    if not todo:
        return
    parts = load_frozen_parts(config)
    encoder = SampleEncoder(parts, text_length(config), state.device, config.encoders == "handover")
    say_size(todo, len(items), parts, config)
    loader = DataLoader(Samples(dataset), batch_sampler=[todo[i : i + TOGETHER] for i in range(0, len(todo), TOGETHER)], collate_fn=list,
                        num_workers=config.data.workers, worker_init_fn=ignore_signals)
    started = time.perf_counter()
    with tqdm(total=len(todo), desc="encode", unit="sample", disable=not state.is_main_process) as bar:
        for found in loader:
            for sample in encoder.encode([entry for entry in found if isinstance(entry, Sample)]):
                writer.add(sample)
            for item, reason in (entry for entry in found if not isinstance(entry, Sample)):
                writer.add_broken(key_of(dataset, item), reason)
            bar.update(len(found))
    logger.info("process %d: %d samples, %.2f s each", state.process_index, len(todo), (time.perf_counter() - started) / len(todo))


def say_size(todo: Sequence[Item], total: int, parts: Mapping[str, Any], config: TrainConfig) -> None:
    """What this process is about to write, and whether there is room."""
    size = sum(sample_bytes(item.bucket, parts, config) for item in todo)
    free = shutil.disk_usage(config.data.cache).free
    level = logging.WARNING if size > free else logging.INFO
    logger.log(level, "%d of %d samples to encode, about %.3g GB; %.3g GB are free", len(todo), total, size / 1e9, free / 1e9)


def sample_bytes(bucket: Bucket, parts: Mapping[str, Any], config: TrainConfig) -> int:
    """About what a sample takes: latents, reference and masks, image tokens, speech features; a data set's few prompts do not count."""
    image, speech = parts["image_encoder"].config, parts["audio_encoder"].config
    tokens = frame_samples(bucket.frames, config.data.fps) // math.prod(speech.conv_stride)
    numbers = math.prod(bucket.latents) * (2 * LATENT_CHANNELS + 2) + IMAGE_TOKENS * image.hidden_size + tokens * speech.hidden_size
    return numbers * getattr(torch, config.data.cache_dtype).itemsize


def report(config: TrainConfig, keys: Sequence[Key], unusable: Mapping[str, str]) -> None:
    """Says what the cache holds of `keys`. Raises ValueError if more clips are broken than data.max_broken allows."""
    entries = read_index(Path(config.data.cache))
    broken = dict(unusable) | {key.clip: entries[key].broken for key in keys if entries[key].broken}
    size = sum(file.stat().st_size for file in Path(config.data.cache).glob("shard_*"))
    logger.info("%s: %d samples, %.3g GB", config.data.cache, sum(not entries[key].broken for key in keys), size / 1e9)
    for name, reason in broken.items():
        logger.warning("broken clip %s: %s", name, reason)
    clips = len({key.clip for key in keys} | set(unusable))
    if len(broken) > config.data.max_broken * clips:
        raise ValueError(f"{len(broken)} of {clips} clips are broken, more than data.max_broken={config.data.max_broken:g}; mend them or "
                         "take them off the lists")

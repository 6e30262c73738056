"""Encoded samples on disk: a writer that goes on where it was stopped, and a dataset.

    shard_00000_00000.safetensors    `ID.latents`, `ID.reference`, ... of some samples and `text_HASH` of their prompts: process, number

What is whole in the shards stands in an index, see `cache_index`.
"""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from stableavatar.data.cache_index import (
    FORMAT,
    REMEDY,
    Entry,
    Key,
    append,
    check_identity,
    claim,
    digest,
    mend,
    read_index,
    whole_entries,
)
from stableavatar.data.clips import Clip
from stableavatar.data.dataset import BucketDataset
from stableavatar.data.samples import TENSORS, Bucket, EncodedSample, Item
from stableavatar.models.checkpoint_writing import write_state_dict

SHARD_BYTES = 2**29
SHARD_SECONDS = 300.0
"""A shard is written when it is so large, or when its first sample has waited so long: this is what a kill can cost."""


class CacheWriter:
    """Appends encoded samples to a cache, on from where an earlier writer was stopped. Leaving its context writes what it holds.

    Args:
        folder: made if absent.
        identity: what the samples depend on, in JSON's types; a cache of another identity is refused.
        dtype: precision of the stored tensors; narrower ones stay as they are.
        rank: of this process: each writes files of its own.

    Raises:
        ValueError: another identity, a damaged index, a folder that cannot be written.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], dtype: torch.dtype = torch.float32, rank: int = 0) -> None:
        self.folder, self.dtype = Path(folder), dtype
        self._prefix, self._index = f"shard_{rank:05d}_", self.folder / f"index_{rank:05d}.jsonl"
        claim(self.folder, {"format": FORMAT, "stored": str(dtype).removeprefix("torch.")} | dict(identity))
        listed = read_index(self.folder)
        self._entries = whole_entries(self.folder, listed)
        self._texts = {entry.text: entry.text_shard for entry in self._entries.values() if entry.text}
        self._number = self._tidy({name for entry in listed.values() for name in (entry.shard, entry.text_shard)})
        self._tensors: dict[str, Tensor] = {}
        self._waiting: dict[Key, Entry] = {}
        self._since = 0.0

    def __enter__(self) -> "CacheWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.flush()

    def done(self, key: Key) -> bool:
        """Whether a sample is in the cache. A broken clip's is not: it may have been mended."""
        return key in self._entries and not self._entries[key].broken

    def add(self, sample: EncodedSample) -> None:
        """Takes a sample; writes a shard when enough have come together."""
        key, shard = Key(sample.name, sample.item.run, sample.item.bucket), self._shard_name
        tensors = {name: self._stored(getattr(sample, name)) for name in TENSORS}
        text = f"text_{digest(tensors['text'].view(torch.uint8).numpy().tobytes())}"
        own = {f"{key.id}.{name}": tensor for name, tensor in tensors.items() if name != "text"}
        if text not in self._texts:
            self._texts[text], own[text] = shard, tensors["text"]
        self._since = self._since if self._waiting else time.monotonic()
        self._tensors |= own
        self._waiting[key] = Entry(shard, text, self._texts[text])
        size = sum(tensor.nbytes for tensor in self._tensors.values())
        if size >= SHARD_BYTES or time.monotonic() - self._since > SHARD_SECONDS:
            self.flush()

    def add_broken(self, key: Key, reason: str) -> None:
        """Notes a clip that cannot be read."""
        if self._entries.get(key) != Entry(broken=reason):
            append(self._index, {key: Entry(broken=reason)})

    def flush(self) -> None:
        """Writes what has come together: the shard, then, once it is in place, its lines of the index."""
        if self._waiting:
            write_state_dict(self.folder / self._shard_name, self._tensors)
            append(self._index, self._waiting)
            self._entries |= self._waiting
            self._tensors, self._waiting, self._number = {}, {}, self._number + 1

    @property
    def _shard_name(self) -> str:
        """The shard that is being filled."""
        return f"{self._prefix}{self._number:05d}.safetensors"

    def _stored(self, tensor: Tensor) -> Tensor:
        """A contiguous copy on the host."""
        dtype = self.dtype if tensor.dtype.itemsize > self.dtype.itemsize else tensor.dtype
        return torch.empty(tensor.shape, dtype=dtype).copy_(tensor)

    def _tidy(self, listed: set[str]) -> int:
        """Removes what a kill left of this process's files: half a line, shards that no index lists. Gives the next shard's number."""
        mend(self._index)
        for file in self.folder.glob(f"{self._prefix}*"):
            if file.name not in listed:
                file.unlink()
        own = [name.removeprefix(self._prefix).partition(".")[0] for name in listed if name.startswith(self._prefix)]
        return 1 + max(map(int, own), default=-1)


class CachedDataset(BucketDataset):
    """Reads samples from a cache: `dataset[item] -> Loaded`, equal to what encoding the ordered clip gives.

    Args:
        clips: what items count into; buckets: indices of the clips in each bucket.
        runs: of frames per clip that will be asked for.
        identity: what the samples must have been made with, as far as it is known.

    Raises:
        ValueError: no cache, one of another identity, or one that lacks samples.
    """

    def __init__(
        self,
        folder: Path,
        clips: Sequence[Clip],
        buckets: Mapping[Bucket, Sequence[int]],
        runs: int,
        identity: Mapping[str, Any],
    ) -> None:
        super().__init__(clips, buckets)
        self.folder = Path(folder)
        check_identity(self.folder, {"format": FORMAT} | dict(identity))
        entries = whole_entries(self.folder, read_index(self.folder))
        keys = [Key(clips[i].name, run, bucket) for bucket, members in buckets.items() for i in members for run in range(runs)]
        if missing := [key for key in keys if key not in entries]:
            raise ValueError(f"the cache {folder} lacks {len(missing)} of {len(keys)} samples, the first {missing[0]}; {REMEDY}")
        self._entries = {key: entries[key] for key in keys}

    def read(self, item: Item) -> EncodedSample:
        """The sample of an order and of no other clip. Raises ValueError if the clip is broken or the shard damaged."""
        key = Key(self.clips[item.clip].name, item.run, item.bucket)
        entry = self._entries[key]
        if entry.broken:
            raise ValueError(entry.broken)
        names = {name: f"{key.id}.{name}" for name in TENSORS if name != "text"}
        tensors = _read_tensors(self.folder / entry.shard, names) | _read_tensors(self.folder / entry.text_shard, {"text": entry.text})
        return EncodedSample(item, key.clip, **tensors)


def _read_tensors(shard: Path, names: Mapping[str, str]) -> dict[str, Tensor]:
    """Tensors under new names: views of the mapped file. Opening it anew costs nothing beside them, and any process can."""
    try:
        with safe_open(shard, "pt") as file:
            return {new: file.get_tensor(name) for new, name in names.items()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{shard} is damaged ({' '.join(str(error).split())}); remove it: {REMEDY}") from error

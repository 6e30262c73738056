"""A latent cache holds exactly what encoding gives, however its writing was interrupted."""

import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from clip_files import make_clip, record
from safetensors import safe_open
from torch.utils.data import DataLoader

from stableavatar.config import load_config, override
from stableavatar.data import latent_cache
from stableavatar.data.buckets import EpochPlan, assign
from stableavatar.data.cache_index import Key, read_index
from stableavatar.data.clips import Clip, find_clips
from stableavatar.data.dataset import ClipDataset
from stableavatar.data.latent_cache import CachedDataset, CacheWriter
from stableavatar.data.samples import TENSORS, Bucket, EncodedSample, Item
from stableavatar.training.caching import write_cache
from stableavatar.training.config import TrainConfig
from stableavatar.training.encode import SampleEncoder
from stableavatar.training.parts import FROZEN, encoding_identity

ROOT = Path(__file__).parents[1]
BUCKET = Bucket(64, 48, 21)
IDENTITY = {"seed": 3, "vae": ["a 12 ff"]}


def clips(count: int = 4) -> list[Clip]:
    return [record(name=f"{i:05d}") for i in range(count)]


def encoded(clip: int, run: int = 0, seed: int = 0) -> EncodedSample:
    """Random tensors of a sample; clips of even number share a prompt."""
    random = torch.Generator().manual_seed(1000 * seed + 10 * clip + run)

    def tensor(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random)

    text = torch.full((3 + clip % 2, 8), 1.5 + clip % 2, dtype=torch.bfloat16)
    latents, reference, masks = tensor(16, 6, 6, 8), tensor(16, 6, 6, 8), tensor(2, 6, 6, 8)
    item = Item(clip, BUCKET, run, run, 0, 0, 1)
    return EncodedSample(item, clips(clip + 1)[clip].name, latents, reference, tensor(257, 4).bfloat16(), text, tensor(41, 4), masks)


def fill(folder: Path, samples: list[EncodedSample], **changes: object) -> None:
    with CacheWriter(folder, IDENTITY, **changes) as writer:
        for sample in samples:
            writer.add(sample)


def dataset(folder: Path, count: int = 4, runs: int = 1, **identity: object) -> CachedDataset:
    return CachedDataset(folder, clips(count), {BUCKET: range(count)}, runs, identity)


def assert_same(a: EncodedSample, b: EncodedSample, dtype: Callable = lambda tensor: tensor) -> None:
    assert a.item == b.item and a.name == b.name
    for name in TENSORS:
        got, expected = getattr(a, name), dtype(getattr(b, name))
        assert got.dtype == expected.dtype and torch.equal(got, expected), name


def contents(folder: Path) -> dict[Key, dict[str, bytes]]:
    """The bytes of every tensor of every sample that the index knows; none for a broken clip."""
    found = {}
    for key, entry in read_index(folder).items():
        if entry.broken:
            found[key] = {}
            continue
        with safe_open(folder / entry.shard, "pt") as shard, safe_open(folder / entry.text_shard, "pt") as texts:
            tensors = {name: shard.get_tensor(f"{key.id}.{name}") for name in TENSORS if name != "text"}
            tensors["text"] = texts.get_tensor(entry.text)
        found[key] = {name: tensor.view(torch.uint8).numpy().tobytes() for name, tensor in tensors.items()}
    return found


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two samples to a shard."""
    size = sum(getattr(encoded(0), name).nbytes for name in TENSORS)
    monkeypatch.setattr(latent_cache, "SHARD_BYTES", 2 * size - 200)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_goes_in_comes_out(tmp_path: Path, dtype: torch.dtype) -> None:
    samples = [encoded(clip, run) for run in range(2) for clip in range(4)]
    fill(tmp_path, samples, dtype=dtype)
    data = dataset(tmp_path, runs=2, **IDENTITY)
    for sample in samples:
        loaded = data[sample.item]
        assert loaded.broken == ()
        assert_same(loaded.value, sample, lambda tensor: tensor.to(dtype) if dtype == torch.bfloat16 else tensor)


def test_workers_read_the_same(tmp_path: Path, small_shards: None) -> None:
    samples = [encoded(clip) for clip in range(4)]
    fill(tmp_path, samples)
    data = pickle.loads(pickle.dumps(dataset(tmp_path)))
    batches = [[samples[i].item, samples[3 - i].item] for i in range(4)]
    loader = DataLoader(data, batch_sampler=batches, collate_fn=list, num_workers=2)
    for batch, found in zip(batches, loader, strict=True):
        for item, loaded in zip(batch, found, strict=True):
            assert_same(loaded.value, samples[item.clip])


def test_each_prompt_is_stored_once(tmp_path: Path, small_shards: None) -> None:
    for part in (range(4), range(4, 8)):  # the second writer knows what the first has stored
        fill(tmp_path, [encoded(clip) for clip in part])
    names = [name for path in tmp_path.glob("shard_*") for name in safe_open(path, "pt").keys() if name.startswith("text_")]
    assert len(names) == len(set(names)) == 2
    assert len(list(tmp_path.glob("shard_*"))) == 4
    assert_same(dataset(tmp_path, 8)[encoded(6).item].value, encoded(6))


def test_a_writer_that_vanished_leaves_nothing_half_and_is_gone_on_from(tmp_path: Path, small_shards: None) -> None:
    samples = [encoded(clip) for clip in range(7)]
    fill(tmp_path / "whole", samples)
    broken = tmp_path / "broken"
    writer = CacheWriter(broken, IDENTITY)
    for sample in samples[:5]:  # two shards are written, the fifth sample is lost
        writer.add(sample)
    whole = (broken / "index_00000.jsonl").read_bytes()
    (broken / "index_00000.jsonl").write_bytes(whole + whole.splitlines()[0][:40])  # killed in the middle of a line,
    (broken / "shard_00000_00002.safetensors").write_bytes(b"not listed")  # between shard and line,
    (broken / "shard_00000_00002.safetensors.partial").write_bytes(b"half")  # in the middle of a shard
    assert len(read_index(broken)) == 4
    with CacheWriter(broken, IDENTITY) as writer:
        done = [writer.done(Key(sample.name, 0, BUCKET)) for sample in samples]
        for sample in samples[done.index(False) :]:
            writer.add(sample)
    assert done == [True] * 4 + [False] * 3
    assert contents(broken) == contents(tmp_path / "whole") and len(contents(broken)) == 7
    assert sorted(path.name for path in broken.iterdir()) == sorted(path.name for path in (tmp_path / "whole").iterdir())


def test_an_interrupted_writer_keeps_what_is_whole(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), CacheWriter(tmp_path, IDENTITY) as writer:
        writer.add(encoded(0))
        raise KeyboardInterrupt
    assert_same(dataset(tmp_path, 1)[encoded(0).item].value, encoded(0))
    assert not list(tmp_path.glob("*.partial"))


def test_old_samples_do_not_wait_for_a_full_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latent_cache, "SHARD_SECONDS", 0.0)
    writer = CacheWriter(tmp_path, IDENTITY)
    writer.add(encoded(0))
    assert len(read_index(tmp_path)) == 1


def test_processes_write_one_cache(tmp_path: Path) -> None:
    samples = [encoded(clip) for clip in range(4)]
    with CacheWriter(tmp_path, IDENTITY, rank=0) as first, CacheWriter(tmp_path, IDENTITY, rank=1) as second:
        for number, sample in enumerate(samples):
            (first, second)[number % 2].add(sample)
    for sample in samples:
        assert_same(dataset(tmp_path)[sample.item].value, sample)
    assert CacheWriter(tmp_path, IDENTITY).done(Key(samples[1].name, 0, BUCKET))  # of the other process


def test_a_damaged_line_is_told_and_half_a_line_is_not(tmp_path: Path) -> None:
    fill(tmp_path, [encoded(clip) for clip in range(3)])
    index = tmp_path / "index_00000.jsonl"
    lines = index.read_bytes().splitlines(keepends=True)
    index.write_bytes(b"".join(lines)[:-5])
    assert len(read_index(tmp_path)) == 2
    for nonsense in (b"{\n", b"[]\n", b'{"clip": "a"}\n', b'{"clip": "a", "run": 0, "bucket": [1, 2, 3], "other": 1}\n'):
        index.write_bytes(lines[0] + nonsense + lines[2])
        with pytest.raises(ValueError, match=r"^[^\n]*line 2, is no line of an index[^\n]*$"):
            CacheWriter(tmp_path, IDENTITY)


@pytest.mark.parametrize(
    ("change", "named"),
    [({"seed": 4}, "seed is 3 there and 4 here"), ({"vae": ["b 12 ff"]}, "vae is"), ({"data.fps": 24.0}, "data.fps is None there")],
)
def test_another_identity_is_refused_by_name(tmp_path: Path, change: dict, named: str) -> None:
    fill(tmp_path, [encoded(0)])
    before = contents(tmp_path)
    for use in (lambda: CacheWriter(tmp_path, IDENTITY | change), lambda: dataset(tmp_path, 1, **IDENTITY | change)):
        with pytest.raises(ValueError, match=r"^[^\n]+$") as caught:
            use()
        assert named in str(caught.value)
    with pytest.raises(ValueError, match="stored is float32 there and bfloat16 here"):
        CacheWriter(tmp_path, IDENTITY, torch.bfloat16)
    assert contents(tmp_path) == before
    dataset(tmp_path, 1, seed=3)  # what is not known is not compared


def test_a_folder_that_is_no_cache_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no latent cache.*scripts/cache_latents.py writes one"):
        dataset(tmp_path)
    fill(tmp_path, [encoded(0)])
    (tmp_path / "cache.json").unlink()
    with pytest.raises(ValueError, match="no latent cache"):
        CacheWriter(tmp_path, IDENTITY)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="cannot write to the cache"):
        CacheWriter(tmp_path / "file" / "cache", IDENTITY)


def test_what_is_missing_is_told_before_training_and_added(tmp_path: Path, small_shards: None) -> None:
    samples = [encoded(clip) for clip in range(4)]
    fill(tmp_path, samples)
    for wanted in ({"count": 5}, {"runs": 2}):
        with pytest.raises(ValueError, match="lacks (1 of 5|4 of 8) samples.*64x48, 21 frames; scripts/cache_latents.py"):
            dataset(tmp_path, **wanted)
    (tmp_path / "shard_00000_00001.safetensors").unlink()
    with pytest.raises(ValueError, match="lacks 2 of 4 samples.*00002"):
        dataset(tmp_path)
    with CacheWriter(tmp_path, IDENTITY) as writer:
        for sample in samples:
            if not writer.done(Key(sample.name, 0, BUCKET)):
                writer.add(sample)
    for sample in samples:
        assert_same(dataset(tmp_path)[sample.item].value, sample)


def test_a_broken_clip_is_replaced_until_it_is_mended(tmp_path: Path) -> None:
    key = Key(clips()[1].name, 0, BUCKET)
    with CacheWriter(tmp_path, IDENTITY) as writer:
        for sample in map(encoded, (0, 2, 3)):
            writer.add(sample)
        for _ in range(2):
            writer.add_broken(key, "no sound")
    loaded = dataset(tmp_path)[encoded(1).item]
    assert loaded.broken == ((key.clip, "no sound"),)
    assert_same(loaded.value, replace(encoded(2), item=replace(encoded(2).item, weight=0)))
    writer = CacheWriter(tmp_path, IDENTITY)
    assert not writer.done(key)
    lines = (tmp_path / "index_00000.jsonl").read_bytes()
    writer.add_broken(key, "no sound")
    assert (tmp_path / "index_00000.jsonl").read_bytes() == lines
    with writer:
        writer.add(encoded(1))
    assert_same(dataset(tmp_path)[encoded(1).item].value, encoded(1))


def test_a_damaged_shard_counts_as_broken_clips(tmp_path: Path, small_shards: None) -> None:
    fill(tmp_path, [encoded(clip) for clip in range(4)])
    data = dataset(tmp_path)
    (tmp_path / "shard_00000_00001.safetensors").write_bytes(b"junk")
    loaded = data[encoded(2).item]
    assert_same(loaded.value, replace(encoded(0), item=replace(encoded(0).item, weight=0)))
    assert [name for name, _ in loaded.broken] == [clips()[2].name, clips()[3].name]
    assert "shard_00000_00001.safetensors is damaged" in loaded.broken[0][1] and "\n" not in loaded.broken[0][1]


# The whole way: clip folders, the program, and what training reads.


@pytest.fixture(scope="module")
def data_list(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five clips of two buckets; of the last one only the first picture can be read."""
    root = tmp_path_factory.mktemp("data")
    kinds = ["speech", "singing", "speech", "dancing", "speech"]
    folders = [make_clip(root / kind / f"{i:05d}", 12 if i == 3 else 8, masks=i != 1) for i, kind in enumerate(kinds)]
    for frame in range(1, 8):
        (folders[4] / "images" / f"frame_{frame}.png").write_bytes(b"damaged")
    (root / "list.txt").write_text("\n".join(map(str, folders)))
    return root / "list.txt"


@pytest.fixture(scope="module")
def words(data_list: Path, tiny_folder: Path) -> list[str]:
    return [f"model={tiny_folder}", "device=cpu", "dtype=float32", f"data.lists={data_list}", "data.sizes=32x32", "data.frames=9,5",
            "data.runs=2", "data.workers=0", "data.max_broken=0.2"]


def write(words: list[str]) -> TrainConfig:
    """Runs the program in this process."""
    config = load_config(TrainConfig, None, words)
    try:
        write_cache(config)
    finally:
        PartialState._reset_state()
    return config


@pytest.fixture(scope="module")
def whole(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """Settings whose cache was written without interruption."""
    return write([*words, f"data.cache={tmp_path_factory.mktemp('whole') / 'cache'}"])


def test_training_from_the_cache_reads_what_encoding_online_gives(whole: TrainConfig, pipe) -> None:
    config = whole
    found, _ = find_clips(config.data.lists, config.data.source_fps)
    buckets, _ = assign(found, [(32, 32)], [9, 5], config.data.fps)
    assert {bucket.frames: members for bucket, members in buckets.items()} == {5: [0, 1, 2, 4], 9: [3]}
    online = ClipDataset(found, buckets, config.data.fps, config.data.seed)
    cached = CachedDataset(Path(config.data.cache), found, buckets, config.data.runs, encoding_identity(config))
    encoder = SampleEncoder({name: pipe.components[name] for name in FROZEN}, pipe.transformer.config.text_length, torch.device("cpu"))
    plan, reasons = EpochPlan(buckets, config.seed, config.data.runs, processes=1, batch=1, accumulation=1), set()
    for epoch in range(2):
        for item in (item for forward in plan.forwards(epoch, 0, 0) for item in forward):
            a, b = cached[item], online[item]
            assert a.broken == b.broken
            assert_same(a.value, encoder.encode([b.value])[0])
            reasons |= set(a.broken)
    assert {Path(name).name for name, _ in reasons} == {"00004"}
    assert encoding_identity(override(config, {"seed": "7"})) == encoding_identity(config)  # runs of every seed share a cache


def program(words: list[str], before: str = "") -> list[str]:
    script = str(ROOT / "scripts/cache_latents.py")
    start = f"import runpy, sys\n{before}\nsys.argv = {[script, *words]!r}\nrunpy.run_path({script!r}, run_name='__main__')"
    return [sys.executable, "-c", start]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_program_goes_on_where_it_was(words: list[str], whole: TrainConfig, tmp_path: Path, number: signal.Signals) -> None:
    """A shard for each sample; the encoder waits after three, so that the signal arrives in the middle."""
    slow = (
        "import time\nfrom stableavatar.data import latent_cache\nfrom stableavatar.training import caching, encode\n"
        "latent_cache.SHARD_BYTES = 1\ncaching.TOGETHER = 1\nwhole = encode.SampleEncoder.encode\ncalls = []\n"
        "def waits(self, samples):\n    calls.append(0)\n    time.sleep(60 if len(calls) > 3 else 0)\n    return whole(self, samples)\n"
        "encode.SampleEncoder.encode = waits"
    )
    cache = tmp_path / "cache"
    command = program([*words, f"data.cache={cache}"], slow)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 120
        while len(read_index(cache)) < 3 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(number)
        errors = process.communicate()[1]
    assert process.returncode == (130 if number == signal.SIGTERM else -number), errors
    before = {path.name: path.stat().st_mtime_ns for path in cache.glob("shard_*")}
    assert len(before) == 3 and not list(cache.glob("*.partial"))
    write([*words, f"data.cache={cache}"])
    kept = {path.name: path.stat().st_mtime_ns for path in cache.glob("shard_*")}
    assert before.items() <= kept.items()
    assert contents(cache) == contents(Path(whole.data.cache)) and len(contents(cache)) == 10


def test_mistakes_are_told_before_models_load(words: list[str], whole: TrainConfig, tmp_path: Path) -> None:
    new, old = f"data.cache={tmp_path / 'new'}", f"data.cache={whole.data.cache}"
    wrong = {
        "data.cache is missing": ["data.runs=1"],
        "no model is named": [new, "model="],
        "path list": [new, f"data.lists={tmp_path / 'absent.txt'}"],
        "data.seed is 42 there and 1 here": [old, "data.seed=1"],
        "dtype is float32 there and bfloat16 here": [old, "dtype=bfloat16"],
        "1 of 5 clips are broken": [old, "data.max_broken=0.1"],
    }
    for message, changes in wrong.items():
        with pytest.raises(ValueError, match=r"^[^\n]+$") as caught:
            write([*words, *changes])
        assert message in str(caught.value)
    assert not (tmp_path / "new").exists()

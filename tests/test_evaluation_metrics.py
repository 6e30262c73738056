"""The metrics: ideal for the truth itself, worse in the right way for what each is to catch, and made of features that are kept."""

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import soundfile
from clip_files import write_video
from evaluation_files import dino_folder, face_pack, i3d_program, inception_weights, make_pair, openings, talking_head, voice
from PIL import Image
from scipy.linalg import sqrtm
from skimage.color import deltaE_ciede2000

from stableavatar.evaluation import features as features_module
from stableavatar.evaluation.features import Lab, Tools
from stableavatar.evaluation.frechet import Moments, frechet_distance
from stableavatar.evaluation.metrics import METRICS, choose_metrics
from stableavatar.evaluation.pairs import Pair
from stableavatar.evaluation.samples import Faceless
from stableavatar.evaluation.signals import colour_distance, seam_ratio
from stableavatar.evaluation.weights import WeightPaths
from stableavatar.workers import shared_out

RANDOM = np.random.default_rng(0)


def per_video(lab: Lab, pair: Pair, name: str, stretch: tuple[int, int] | None = None) -> float:
    return METRICS[name].value(lab.features(pair, name, stretch))


def of_set(lab: Lab, pairs: Sequence[Pair], name: str, stretch: tuple[int, int] | None = None) -> float:
    metric = METRICS[name]
    return metric.of_set([metric.summary(lab.features(pair, name, stretch)) for pair in pairs])


def rising(values: Sequence[float], by: float = 0.0) -> bool:
    return all(later > value + by for value, later in zip(values, values[1:]))


# The Frechet distance


def with_moments(mean: np.ndarray, covariance: np.ndarray, rows: int = 500) -> np.ndarray:
    """Features with exactly this mean and (unbiased) covariance."""
    noise = np.random.default_rng(1).standard_normal((rows, len(mean)))
    noise -= noise.mean(0)
    white = noise @ np.linalg.inv(np.linalg.cholesky(np.cov(noise, rowvar=False))).T
    return mean + white @ np.linalg.cholesky(covariance).T


def test_frechet_distance_of_gaussians_in_closed_form() -> None:
    means = RANDOM.standard_normal((2, 12))
    spread = RANDOM.uniform(0.1, 4, (2, 12))
    sets = [Moments.of(with_moments(mean, np.diag(values))) for mean, values in zip(means, spread)]
    closed = np.square(means[0] - means[1]).sum() + np.square(np.sqrt(spread[0]) - np.sqrt(spread[1])).sum()
    assert frechet_distance(*sets) == pytest.approx(closed, rel=1e-9)
    mixed = [part @ part.T + 0.1 * np.eye(12) for part in RANDOM.standard_normal((2, 12, 12))]
    general = np.square(means[0] - means[1]).sum() + np.trace(mixed[0] + mixed[1] - 2 * sqrtm(mixed[0] @ mixed[1]).real)
    sets = [Moments.of(with_moments(mean, covariance)) for mean, covariance in zip(means, mixed)]
    assert frechet_distance(*sets) == pytest.approx(general, rel=1e-7) == frechet_distance(*reversed(sets))


def test_frechet_distance_of_few_rows_in_many_dimensions() -> None:
    """Covariances of less than full rank, as those of FVD over few videos are: no eps and no imaginary parts are needed."""
    one, other = RANDOM.standard_normal((2, 8, 40))
    # Where rows are fewer than dimensions the trace is the sum of singular values of a small matrix.
    centred = [rows - rows.mean(0) for rows in (one, other)]
    shared = np.linalg.svd(centred[0] @ centred[1].T, compute_uv=False).sum() / 7
    expected = np.square(one.mean(0) - other.mean(0)).sum() + sum(np.square(rows).sum() / 7 for rows in centred) - 2 * shared
    assert frechet_distance(Moments.of(one), Moments.of(other)) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(Moments.of(one), Moments.of(one)) == pytest.approx(0, abs=1e-5)
    assert np.isnan(frechet_distance(Moments.of(one[:1]), Moments.of(other)))


def test_moments_of_parts_are_those_of_the_whole() -> None:
    rows = RANDOM.standard_normal((30, 6)).astype(np.float32)
    together = Moments.together([Moments.of(rows[:7]), Moments.of(rows[7:7]), Moments.of(rows[7:])])
    assert together.count == 30 and np.allclose(together.mean, rows.mean(0), atol=1e-6)
    assert np.allclose(together.covariance, np.cov(rows, rowvar=False), atol=1e-6)


# Colours


def test_ciede2000_of_the_published_pairs() -> None:
    """The 34 pairs of G. Sharma, W. Wu and E. N. Dalal (2005), table 1; scikit-image does the work."""
    pairs = np.loadtxt(Path(__file__).parent / "ciede2000_pairs.csv", delimiter=",", skiprows=1)
    assert len(pairs) == 34
    assert np.abs(deltaE_ciede2000(pairs[:, :3], pairs[:, 3:6]) - pairs[:, 6]).max() < 1e-4
    assert np.abs(deltaE_ciede2000(pairs[:, 3:6], pairs[:, :3]) - pairs[:, 6]).max() < 1e-4


def test_colours_are_taken_for_srgb() -> None:
    # sRGB's red is Lab (53.24, 80.09, 67.20), its blue (32.30, 79.19, -107.86) under D65; white to black is 100.
    red, blue = np.array([255, 0, 0]), np.array([0, 0, 255])
    expected = float(deltaE_ciede2000(np.array([53.24, 80.09, 67.20]), np.array([32.30, 79.19, -107.86])))
    assert float(colour_distance(red, blue)) == pytest.approx(expected, abs=0.05)
    assert float(colour_distance(np.full(3, 255), np.zeros(3))) == pytest.approx(100, abs=1e-3)


# Videos


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """A lab without weights."""
    return Lab(tmp_path_factory.mktemp("plain"), Tools())


@pytest.fixture(scope="module")
def weighty(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """A lab with random networks of the right shapes."""
    pytest.importorskip("insightface")
    folder = tmp_path_factory.mktemp("weights")
    paths = {"inception": inception_weights(folder / "inception.pth"), "i3d": i3d_program(folder / "i3d.pt"),
             "arcface": face_pack(folder / "buffalo_l"), "dino": dino_folder(folder / "dino")}  # fmt: skip
    return Lab(folder / "features", Tools(WeightPaths(**{name: str(path) for name, path in paths.items()}, any_checksum=True), batch=8))


TRACK = openings(36)


@pytest.fixture(scope="module")
def talking(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A head that talks as its sound and its true video (itself) say."""
    return make_pair(tmp_path_factory.mktemp("talking"), "a", talking_head(TRACK), voice(TRACK))


def scene(frames: int = 20, seed: int = 0) -> np.ndarray:
    """uint8 [T, 96, 128, 3]: coarse coloured patterns that drift, a bright cell in the corner for a face."""
    pattern = np.kron(np.random.default_rng(seed).integers(0, 180, (20, 30, 3), dtype=np.uint8), np.ones((8, 8, 1), np.uint8))
    pictures = np.stack([pattern[number : number + 96, number : number + 128] for number in range(frames)]).copy()
    pictures[:, 32:64, 32:64] = (250, 210, 230)
    return pictures


def noisy(frames: np.ndarray, amount: float) -> np.ndarray:
    noise = np.random.default_rng(5).standard_normal(frames.shape)
    return (frames + amount * noise).clip(0, 255).astype(np.uint8)


def shifted(frames: np.ndarray, amount: float) -> np.ndarray:
    """Redder and less blue."""
    return (frames + amount * np.array([1.0, 0.0, -1.0])).clip(0, 255).astype(np.uint8)


def set_of(folder: Path, change: object = None, count: int = 3, frames: int = 16) -> list[Pair]:
    """Pairs of changed scenes and the scenes themselves."""
    pairs = []
    for seed in range(count):
        truth = make_pair(folder, f"{seed}", scene(frames, seed), np.zeros(16_000))
        if change is None:
            pairs.append(truth)
        else:
            changed = make_pair(folder / "changed", f"{seed}", change(scene(frames, seed)), np.zeros(16_000))
            pairs.append(replace(changed, video=truth.generated))
    return pairs


def test_identical_videos_are_ideal(weighty: Lab, plain: Lab, talking: Pair, tmp_path: Path) -> None:
    assert of_set(weighty, set_of(tmp_path / "clips", count=2), "fvd") == pytest.approx(0, abs=1e-4)
    assert of_set(weighty, set_of(tmp_path / "short", count=2, frames=3), "fid") == pytest.approx(0, abs=1e-2)
    still = make_pair(tmp_path, "still", np.repeat(scene(1), 12, axis=0), np.zeros(16_000))
    assert per_video(weighty, still, "csim") == pytest.approx(1, abs=1e-5) == per_video(weighty, still, "dino")
    assert per_video(plain, still, "ciede") == pytest.approx(0, abs=1e-4) == per_video(plain, still, "colour_drift")
    assert per_video(plain, talking, "lip_correlation") == pytest.approx(1, abs=1e-6)
    assert per_video(plain, talking, "lip_envelope") > 0.95


def test_noise_raises_the_distances_of_sets_monotonically(weighty: Lab, tmp_path: Path) -> None:
    found = {name: [] for name in ("fid", "fvd", "fvd_16")}
    for amount in (0, 10, 40, 120):
        change = partial(noisy, amount=amount)
        for name in found:
            pairs = set_of(tmp_path / name / f"{amount}", change, count=2, frames=3 if name == "fid" else 16)
            found[name].append(of_set(weighty, pairs, name))
    assert all(rising(values) for values in found.values()), found


def test_a_shift_of_colour_is_seen_by_colours_and_pictures(weighty: Lab, plain: Lab, tmp_path: Path) -> None:
    reference = tmp_path / "reference.png"
    Image.fromarray(scene(1)[0]).save(reference)
    found: dict[str, list[float]] = {name: [] for name in ("ciede", "dino", "csim", "fvd")}
    for amount in (0, 8, 25, 60):
        pairs = set_of(tmp_path / f"{amount}", partial(shifted, amount=amount), count=2)
        pair = replace(pairs[0], image=reference)
        for name in ("ciede", "dino", "csim"):
            found[name].append(per_video(weighty, pair, name))
        found["fvd"].append(of_set(weighty, pairs, "fvd"))
    assert rising(found["ciede"], by=0.5) and rising(found["fvd"]), found
    assert rising([-value for value in found["dino"]]) and rising([-value for value in found["csim"]]), found


def test_drift_grows_with_what_drifts(plain: Lab, tmp_path: Path) -> None:
    found = []
    for number, amount in enumerate((0, 5, 20, 60)):
        frames = np.stack([shifted(frame, amount * index / 39) for index, frame in enumerate(np.repeat(scene(1), 40, axis=0))])
        pair = make_pair(tmp_path, f"{number}", frames, np.zeros(25_600))
        found.append(per_video(plain, pair, "colour_drift"))
        if amount:  # a curve over stretches: the further on, the further from the first picture
            curve = [per_video(plain, pair, "ciede", (start, start + 10)) for start in (0, 10, 20, 30)]
            assert rising(curve) and np.mean(curve) == pytest.approx(per_video(plain, pair, "ciede"))
            assert per_video(plain, pair, "colour_drift", (0, 20)) < found[-1]
    assert found[0] == pytest.approx(0, abs=1e-4) and rising(found)
    assert np.isnan(per_video(plain, pair, "ciede", (100, 200))), "the video ends before"


def test_a_late_sound_lowers_the_correlation_with_the_voice(plain: Lab, talking: Pair, tmp_path: Path) -> None:
    found = []
    for frames in (0, 1, 2, 3):
        soundfile.write(tmp_path / f"{frames}.wav", np.concatenate([np.zeros(640 * frames), voice(TRACK)]), 16_000)
        found.append(per_video(plain, replace(talking, audio=tmp_path / f"{frames}.wav"), "lip_envelope"))
    assert rising([-value for value in found], by=0.1), found
    soundfile.write(tmp_path / "silent.wav", np.zeros(24_000), 16_000)
    assert np.isnan(per_video(plain, replace(talking, audio=tmp_path / "silent.wav"), "lip_envelope")), "there is nothing to follow"


def test_shuffled_frames_lose_the_lips_and_change_motion_but_not_colours(weighty: Lab, plain: Lab, talking: Pair, tmp_path: Path) -> None:
    order = np.random.default_rng(3).permutation(len(TRACK))
    mixed = make_pair(tmp_path, "a", talking_head(TRACK)[order], voice(TRACK), truth=talking.generated)
    assert abs(per_video(plain, mixed, "lip_correlation")) < 0.5 and abs(per_video(plain, mixed, "lip_envelope")) < 0.5
    assert per_video(plain, mixed, "ciede") == pytest.approx(per_video(plain, talking, "ciede"), abs=1e-3)
    pairs = set_of(tmp_path / "set", lambda frames: frames[np.random.default_rng(1).permutation(len(frames))], count=2)
    assert of_set(weighty, pairs, "fvd") > 100 * of_set(weighty, set_of(tmp_path / "set", count=2), "fvd") + 1e-6


def test_a_still_mouth_correlates_with_nothing(plain: Lab, talking: Pair, tmp_path: Path) -> None:
    still = make_pair(tmp_path, "still", talking_head(np.full(12, 3.0)), voice(TRACK), truth=talking.generated)
    assert per_video(plain, still, "lip_correlation") == 0 == per_video(plain, still, "lip_envelope")
    assert np.isnan(per_video(plain, replace(talking, video=still.generated), "lip_correlation"))
    assert METRICS["lip_correlation"].lacks(replace(still, video=None)) == "no true video"


def test_seams(plain: Lab, tmp_path: Path) -> None:
    frames = scene(40)
    found = []
    for number, jump in enumerate((0, 10, 60)):
        broken = frames.astype(int)
        broken[21:] += jump
        pair = make_pair(tmp_path, f"{number}", broken.clip(0, 255).astype(np.uint8), np.zeros(16_000))
        found.append(per_video(plain, replace(pair, seams=(21,)), "seam_jitter"))
    assert found[0] == pytest.approx(1, abs=0.2) and rising(found)
    assert METRICS["seam_jitter"].lacks(pair) == "no seams"
    assert np.isnan(per_video(plain, replace(pair, seams=(21,)), "seam_jitter", (0, 20))), "the seam comes later"
    changes = np.ones(30)
    changes[[9, 17]] = 3, 5
    assert seam_ratio(changes, np.arange(30), (9, 17)) == 4 and np.isnan(seam_ratio(changes, np.arange(30), ()))


# Features


def test_order_and_workers_change_nothing(weighty: Lab, tmp_path: Path) -> None:
    pairs = set_of(tmp_path, partial(noisy, amount=30), count=3)
    alone, shared = (replace(weighty, folder=tmp_path / name) for name in ("alone", "shared"))
    names = ["fvd", "colour_drift", "ciede"]
    for _ in map(partial(alone.prepare, names=names), pairs):
        pass
    list(shared_out(partial(shared.prepare, names=names), reversed(pairs), workers=2, chunk=1))
    files = [sorted(path.relative_to(lab.folder) for path in lab.folder.rglob("*.npz")) for lab in (alone, shared)]
    assert files[0] == files[1] and len(files[0]) == 3 * (2 + 1 + 1), "i3d of both videos, colours of one and of a picture"
    assert of_set(alone, pairs, "fvd") == pytest.approx(of_set(shared, pairs[::-1], "fvd"), rel=1e-6)
    assert [per_video(alone, pair, "ciede") for pair in pairs] == [per_video(shared, pair, "ciede") for pair in pairs]


def test_a_file_is_decoded_once_for_all_and_known_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def counted(pictures: object, watchers: Sequence[object]) -> None:
        seen.append((pictures.path.name, len(watchers)))
        original(pictures, watchers)

    original = features_module.watch
    monkeypatch.setattr(features_module, "watch", counted)
    lab, pair = Lab(tmp_path / "features", Tools()), replace(make_pair(tmp_path, "a", scene(30), np.zeros(19_200)), seams=(13,))
    names = ["ciede", "colour_drift", "seam_jitter"]
    lab.prepare(pair, names)
    assert sorted(seen) == [("a.mp4", 1), ("a.mp4", 2)], "all its frames at once, and the first as the reference"
    values = [per_video(lab, pair, name) for name in names]
    moved = tmp_path / "renamed.mp4"
    moved.write_bytes(pair.generated.read_bytes())
    again = replace(pair, generated=moved, video=moved)
    lab.prepare(again, names, (None, (0, 10)))
    assert len(seen) == 2 and [per_video(lab, again, name) for name in names] == values
    kept = sorted((tmp_path / "features").rglob("*.npz"))
    kept[0].write_bytes(kept[0].read_bytes()[:50])
    assert [per_video(lab, pair, name) for name in names] == values and len(seen) == 3, "what was damaged is made anew"
    moved.unlink()
    write_video(moved, shifted(scene(30), 30), "25")
    assert per_video(lab, again, "ciede") != values[0], "another content is another file"


def test_unusable_videos_are_named(plain: Lab, tmp_path: Path) -> None:
    pair = make_pair(tmp_path, "a", scene(12), np.zeros(16_000))
    with pytest.raises(Faceless, match="no face in .*a.mp4"):
        plain.prepare(pair, ["lip_envelope"])
    whole = pair.generated.read_bytes()
    pair.generated.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="a.mp4"):
        plain.prepare(pair, ["ciede"])


def test_costs_are_read_from_the_sidecar(plain: Lab, tmp_path: Path) -> None:
    pair = make_pair(tmp_path, "a", scene(10), np.zeros(16_000))
    names = ("fps", "time_to_first_frame", "minutes", "peak_memory")
    assert {METRICS[name].lacks(pair) for name in names} == {"its sidecar JSON does not tell"}
    record = {"settings": {}, "frames": 80, "timings": {"total_seconds": 40.0, "first_frames_seconds": 3.0},
              "peak_memory": {"host_bytes": 5e9, "device_bytes": 18.4e9}}  # fmt: skip
    (tmp_path / "a.json").write_text(json.dumps(record))
    assert [METRICS[name].lacks(pair) for name in names] == 4 * [""]
    assert [per_video(plain, pair, name) for name in names] == pytest.approx([2.0, 3.25, 40 / 60, 18.4])
    (tmp_path / "a.json").write_text(json.dumps(record | {"timings": {}, "peak_memory": {"host_bytes": 5e9}}))
    assert METRICS["fps"].lacks(pair) and per_video(plain, pair, "peak_memory") == pytest.approx(5)


def test_every_metric_says_what_it_is() -> None:
    for name, metric in METRICS.items():
        assert metric.name == name and metric.label and metric.better in ("higher", "lower") and len(type(metric).__doc__) > 60
    assert len({metric.label for metric in METRICS.values()}) == len(METRICS)
    assert list(choose_metrics("sync_c, fid")) == ["sync_c", "fid"]
    with pytest.raises(ValueError, match="unknown metric 'sync'; the nearest is 'sync_"):
        choose_metrics("sync")

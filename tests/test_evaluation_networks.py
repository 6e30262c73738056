"""The networks behind the metrics: their weights, what they are shown, and what is said where they are not there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from clip_files import write_video
from evaluation_files import (
    dino_folder,
    face_pack,
    i3d_program,
    inception_weights,
    make_pair,
    openings,
    syncnet_weights,
    talking_head,
    voice,
)  # fmt: skip

from stableavatar.data.preparation.faces import whole_track
from stableavatar.data.preparation.pictures import video_pictures
from stableavatar.evaluation.features import Lab, Tools
from stableavatar.evaluation.frechet import Moments, frechet_distance
from stableavatar.evaluation.metrics import METRICS
from stableavatar.evaluation.networks import NETWORKS, build_network, dino, i3d, inception
from stableavatar.evaluation.samples import Faceless, Still, View, first_picture, watch
from stableavatar.evaluation.syncnet import SYNC_FPS, face_crops, load_syncnet, measure_sync
from stableavatar.evaluation.weights import WEIGHTS, WeightPaths
from stableavatar.media import AudioTrack

FIDELITY = Path(os.environ.get("TORCH_FIDELITY", Path(__file__).parents[1] / ".venv" / "fidelity"))
"""torch-fidelity without its dependencies."""
ORACLE = """
import json, sys, types
import numpy, torch
class Absent(types.ModuleType):  # torchvision, which torch-fidelity imports for what is not asked for here
    __path__ = []
    def __getattr__(self, name):
        return sys.modules.get(f"{self.__name__}.{name}") or type(name, (), {})
for name in ("torchvision", "torchvision.datasets", "torchvision.transforms", "torchvision.transforms.functional"):
    sys.modules[name] = Absent(name)
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
folder = sys.argv[1]
given = numpy.load(folder + "/given.npz")
sets = [fid_features_to_statistics(torch.from_numpy(given[name])) for name in ("one", "other")]
distance = fid_statistics_to_metric(*sets, verbose=False)["frechet_inception_distance"]
network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=folder + "/inception.pth")
numpy.savez(folder + "/found.npz", features=network(torch.from_numpy(given["pictures"]))[0].numpy(), distance=distance)
"""


def tools(**paths: object) -> Tools:
    return Tools(WeightPaths(**{name: str(path) for name, path in paths.items()}, any_checksum=True), batch=4)


def see(network: str, with_tools: Tools, pictures: object, known: dict | None = None, span: tuple | None = None) -> dict[str, np.ndarray]:
    """What a network makes of pictures."""
    watcher = build_network(network, with_tools).watch(pictures, known or {}, span)
    watch(pictures, [watcher])
    return watcher.result()


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return inception_weights(tmp_path_factory.mktemp("inception") / "inception.pth")


@pytest.mark.skipif(not (FIDELITY / "torch_fidelity").is_dir(), reason="torch-fidelity is not in a folder of its own")
def test_network_and_distance_are_those_of_torch_fidelity(inception_file: Path) -> None:
    random = np.random.default_rng(0)
    one, other = random.standard_normal((300, 48)) @ random.standard_normal((48, 48)), 1.5 * random.standard_normal((200, 48)) + 0.3
    pictures = random.integers(0, 256, (2, 3, 299, 299), dtype=np.uint8)
    folder = inception_file.parent
    np.savez(folder / "given.npz", one=one, other=other, pictures=pictures)
    environment = {**os.environ, "PYTHONPATH": str(FIDELITY)}
    subprocess.run([sys.executable, "-c", ORACLE, str(folder)], check=True, env=environment)
    with np.load(folder / "found.npz") as found:
        assert frechet_distance(Moments.of(one), Moments.of(other)) == pytest.approx(float(found["distance"]), rel=1e-9)
        model = inception.load_inception(str(inception_file), "cpu")
        with torch.inference_mode():
            ours = model((torch.from_numpy(pictures).float() - 128) / 128).numpy()
        assert np.abs(ours - found["features"]).max() < 1e-4 * np.abs(found["features"]).max()


def test_inception_sees_whole_pictures_stretched(inception_file: Path, tmp_path: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (3, 60, 100, 3), dtype=np.uint8)
    write_video(tmp_path / "a.mp4", frames, "25")
    found = see("inception", tools(inception=inception_file), video_pictures(tmp_path / "a.mp4"))
    pixels = torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 127.5 - 1
    expected = torch.nn.functional.interpolate(pixels, (299, 299), mode="bilinear", align_corners=False)
    with torch.inference_mode():
        features = inception.load_inception(str(inception_file), "cpu")(expected).numpy()
    assert found["feature"].shape == (3, 2048) and np.abs(found["feature"] - features).max() < 1e-4 * np.abs(features).max()
    assert found["frames"].tolist() == [0, 1, 2] and found["times"] == pytest.approx([0, 0.04, 0.08])


def test_wrong_weights_are_refused(inception_file: Path, tmp_path: Path) -> None:
    strict = Tools(WeightPaths(inception=str(inception_file)))
    with pytest.raises(ValueError, match="sha256 .*, expected 6726825d0af5f729.*any_checksum=true"):
        build_network("inception", strict).load()
    with pytest.raises(ValueError, match=r"no weights .*none\.pth; fetch weights-inception"):
        build_network("inception", tools(inception=tmp_path / "none.pth")).load()
    state = torch.load(inception_file, weights_only=True)
    state.pop("Mixed_7c.branch_pool.conv.weight")
    torch.save(state, tmp_path / "less.pth")
    with pytest.raises(ValueError, match="less.pth does not hold Inception's weights .*branch_pool.conv.weight") as caught:
        build_network("inception", tools(inception=tmp_path / "less.pth")).load()
    assert "\n" not in str(caught.value)
    (tmp_path / "cut.pt").write_bytes(b"PK\x03\x04 cut")
    for network, key, words in [("i3d", "i3d", "does not hold I3D"), ("lips", "syncnet", "does not hold SyncNet's weights")]:
        with pytest.raises(ValueError, match=words):
            build_network(network, tools(**{key: tmp_path / "cut.pt"})).load()
    (tmp_path / "empty").mkdir()
    for network, key in [("dino", "dino"), ("arcface", "arcface")]:
        with pytest.raises(ValueError, match="no weights .*; fetch"):
            build_network(network, tools(**{key: tmp_path / "empty"})).load()


def test_absent_weights_are_told_and_never_a_number() -> None:
    absent = {name: metric.absent(Tools()) for name, metric in METRICS.items()}
    without = {name for name, line in absent.items() if not line}
    assert without == {"ciede", "colour_drift", "lip_correlation", "lip_envelope", "seam_jitter", "fps", "time_to_first_frame", "minutes",
                       "peak_memory"}  # fmt: skip
    assert absent["fid"].startswith("absent: give weights.inception=FILE (weights-inception-2015-12-05-6726825d.pth from https://")
    assert absent["csim"].startswith("absent: give weights.arcface=FOLDER (the unpacked buffalo_l.zip: ")
    assert not METRICS["fid"].absent(tools(inception="somewhere"))
    assert {need.network for metric in METRICS.values() for need in metric.needs} == set(NETWORKS), "a network without a metric"
    known = {name for network in NETWORKS for name in build_network(network, Tools()).weights}
    assert known | {"detector"} == set(WEIGHTS)


def test_i3d_sees_the_middle_of_clips(tmp_path: Path) -> None:
    frames = np.zeros((40, 100, 200, 3), np.uint8)
    frames[:, :, 50:150] = 255
    frames[:, :, 50:150, 1] = np.arange(40, dtype=np.uint8)[:, None, None] * 4
    write_video(tmp_path / "a.mp4", frames, "25")
    prepared = i3d._prepare(frames[10])
    assert prepared.shape == (3, 224, 224) and prepared[0, 5:-5, 5:-5].min() > 1 - 1e-5, "none of what is left and right"
    assert float(prepared[1, 100, 100]) == pytest.approx(40 / 127.5 - 1, abs=1e-5)
    with_tools, pictures = tools(i3d=i3d_program(tmp_path / "i3d.pt")), video_pictures(tmp_path / "a.mp4")
    model = torch.jit.load(tmp_path / "i3d.pt")

    def expected(numbers: list[int]) -> np.ndarray:
        clip = torch.stack([i3d._prepare(frames[number]) for number in numbers], 1)[None]
        with torch.inference_mode():
            return model(clip, rescale=False, resize=False, return_features=True).numpy()

    found = {name: see(name, with_tools, pictures)["feature"] for name in ("i3d", "i3d_16", "i3d_tail")}
    assert np.allclose(found["i3d"], expected(list(range(40))), atol=1e-5)
    assert np.allclose(found["i3d_16"], np.concatenate([expected(list(range(16))), expected(list(range(24, 40)))]), atol=1e-5)
    assert np.allclose(found["i3d_tail"], expected(list(range(24, 40))), atol=1e-5)
    stretch = see("i3d", with_tools, pictures, span=(10 / 25, 30 / 25))["feature"]
    assert np.allclose(stretch, expected(list(range(10, 30))), atol=1e-5)
    assert see("i3d", with_tools, pictures, span=(2.0, 3.0)) == {}, "the video ends before"
    write_video(tmp_path / "short.mp4", frames[:9], "25")
    with pytest.raises(ValueError, match="short.mp4 has 9 pictures at 25 a second; FVD needs 10"):
        see("i3d", with_tools, video_pictures(tmp_path / "short.mp4"))


def test_clips_do_not_overlap_and_reach_both_ends() -> None:
    for frames, length, clips in [(40, 16, 16), (16, 16, 16), (500, 16, 16), (257, 16, 16)]:
        starts = i3d.clip_starts(frames, length, clips)
        assert len(starts) == min(clips, frames // length) and starts[0] == 0 and (len(starts) == 1 or starts[-1] == frames - length)
        assert all(later - start >= length for start, later in zip(starts, starts[1:]))


def test_views() -> None:
    pictures = Still(Path("none"), frames=90, fps=30.0)

    def numbers(view: View, span: tuple[float, float] | None = None) -> list[int]:
        grid = view.grid(pictures, span)
        assert np.abs(grid[0] / 30 - grid[1]).max() <= 0.5 / 30 + 1e-9, "nearest in time"
        return grid[0].tolist()

    assert numbers(View()) == list(range(90)) and numbers(View(), (1.0, 2.0)) == list(range(30, 60))
    assert numbers(View(rate=5))[:4] == [0, 6, 12, 18] and len(numbers(View(rate=25))) == 75
    assert numbers(View(rate=25, seconds=16 / 25)) == numbers(View(rate=25))[-16:]
    tail = numbers(View(seconds=2.0, count=16))
    assert len(tail) == 16 and (tail[0], tail[-1]) == (30, 89) and set(np.diff(tail)) <= {3, 4}
    assert numbers(View(count=200)) == list(range(90)) and numbers(View(rate=1)) == [0, 30, 60]


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("insightface")
    return face_pack(tmp_path_factory.mktemp("buffalo_l"))


def test_arcface_embeds_the_largest_face(pack: Path, tmp_path: Path) -> None:
    frames = np.zeros((3, 640, 640, 3), np.uint8)
    frames[0, 64:96, 32:64], frames[1, 320:352, 256:288] = (255, 200, 220), (255, 200, 220)
    write_video(tmp_path / "a.mp4", frames, "5")
    found = see("arcface", tools(arcface=pack), video_pictures(tmp_path / "a.mp4"))["embedding"]
    assert found.shape == (3, 512) and np.isnan(found[2]).all() and np.linalg.norm(found[:2], axis=1) == pytest.approx([1, 1])
    assert found[0] @ found[1] > 0.999, "the face alone counts, not where it is"
    other = np.full((1, 640, 640, 3), 0, np.uint8)
    other[0, 64:80, 32:64], other[0, 80:96, 32:64] = (200, 255, 220), (255, 220, 130)
    write_video(tmp_path / "b.mp4", other, "5")
    assert see("arcface", tools(arcface=pack), first_picture(tmp_path / "b.mp4"))["embedding"][0] @ found[0] < 0.99
    write_video(tmp_path / "dark.mp4", frames[2:], "5")
    with pytest.raises(Faceless, match="no face in .*dark.mp4"):
        see("arcface", tools(arcface=pack), video_pictures(tmp_path / "dark.mp4"))
    (tmp_path / "pack" / "w600k_r50.onnx").parent.mkdir()
    for name in ("w600k_r50.onnx", "det_10g.onnx"):
        (tmp_path / "pack" / name).write_bytes((pack / "det_10g.onnx").read_bytes())
    with pytest.raises(ValueError, match="w600k_r50.onnx is no model for face recognition"):
        build_network("arcface", tools(arcface=tmp_path / "pack")).load()


def test_dino_sees_the_middle_as_its_processor_does(tmp_path: Path) -> None:
    folder = dino_folder(tmp_path / "dino")
    frame = np.zeros((128, 256, 3), np.uint8)
    frame[:, 64:192] = (10, 130, 250)
    prepared = dino._prepare(frame)
    assert prepared.shape == (3, 224, 224)
    expected = (np.array([10, 130, 250]) / 255 - dino.MEAN) / dino.STD
    assert prepared[:, 8:-8, 8:-8].amin((1, 2)).numpy() == pytest.approx(expected, abs=1e-3)
    assert prepared[:, 8:-8, 8:-8].amax((1, 2)).numpy() == pytest.approx(expected, abs=1e-3)
    write_video(tmp_path / "a.mp4", np.stack(6 * [frame]), "25")
    found = see("dino", tools(dino=folder), video_pictures(tmp_path / "a.mp4"))
    model = dino.load_dino(str(folder), "cpu")
    with torch.inference_mode():
        token = model(prepared[None]).last_hidden_state[0, 0]
    assert found["embedding"].shape == (1, 32)
    assert np.allclose(found["embedding"][0], torch.nn.functional.normalize(token, dim=0), atol=1e-4)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(ValueError, match="does not hold DINOv2"):
        dino.load_dino(str(folder) + "/", "cpu")


def test_q_align_tells_of_a_picture_a_second(tiny_align: Path, tmp_path: Path) -> None:
    levels = np.repeat(np.array([50, 200], np.uint8), 25)
    write_video(tmp_path / "a.mp4", np.broadcast_to(levels[:, None, None, None], (50, 32, 32, 3)).copy(), "25")
    weights = WeightPaths(qalign=str(tiny_align), any_checksum=True)
    with pytest.raises(ValueError, match="trust_remote_code=true"):
        build_network("looks", Tools(weights)).load()
    weights.trust_remote_code = True
    found = see("looks", Tools(weights), video_pictures(tmp_path / "a.mp4"))
    assert found["quality"] == pytest.approx(1 + 4 * np.array([50, 200]) / 255, abs=0.02)
    assert found["aesthetics"] == pytest.approx(5 - 4 * np.array([50, 200]) / 255, abs=0.02) and found["times"].tolist() == [0, 1]


def test_sync_metrics_are_those_of_the_face_in_the_video(tmp_path: Path) -> None:
    """Features of both halves, made apart and kept, say the same as SyncNet over the video's crops and sound at once."""
    track = openings(16)
    pair = make_pair(tmp_path, "a", talking_head(track), voice(track))
    path = syncnet_weights(tmp_path / "syncnet_v2.model")
    lab = Lab(tmp_path / "features", tools(syncnet=path))
    found = {name: METRICS[name].value(lab.features(pair, name)) for name in ("sync_c", "sync_d", "sync_offset")}
    known = see("landmarks", Tools(), video_pictures(pair.generated))
    assert known["opening"].std() > 0.01 and not np.isnan(known["opening"]).any()
    crops = face_crops(video_pictures(pair.generated).read(), whole_track(list(known["box"])))
    with AudioTrack(pair.audio, quiet=True) as sound:
        sync = measure_sync(load_syncnet(path), crops, sound)
    assert found["sync_c"] == pytest.approx(sync.confidence, rel=1e-4, abs=1e-6)
    assert found["sync_d"] == pytest.approx(sync.distance, rel=1e-5)
    assert found["sync_offset"] == abs(sync.offset) and sync.windows == 11
    soundfile.write(pair.audio, voice(track)[: 5 * 640], 16_000)
    with pytest.raises(ValueError, match=rf"a.wav is shorter than {6 / SYNC_FPS} s"):
        lab.prepare(pair, ["sync_c"])

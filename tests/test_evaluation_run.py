"""From cases to tables on the tiny model: plumbing, not quality."""

import csv
import json
import shutil
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import soundfile
import torch
from clip_files import write_video
from evaluation_files import i3d_program, openings, talking_head, voice
from face_files import backdrop
from make_tiny_model import tiny_transformer
from media_files import save

from stableavatar import cases
from stableavatar.config import load_config
from stableavatar.evaluation import experiments, run
from stableavatar.evaluation.pairs import find_pairs
from stableavatar.evaluation.sets import Candidate, SetConfig, choose, load_set, read_cases, write_cases
from stableavatar.evaluation.settings import EvaluateConfig

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs" / "evaluation"
FRAMES = 24
SMALL = "steps=2 width=32 height=32 windows.frames=21 windows.overlap=3"
NAMES = ("ada", "bruno")


@pytest.fixture(scope="module")
def reference(tmp_path_factory, tiny_folder):
    """Two cases: true video, portrait, voice, prompt; the model to evaluate lies beside them."""
    folder = tmp_path_factory.mktemp("reference") / "cases"
    folder.mkdir()
    (folder.parent / "model").symlink_to(tiny_folder)
    for number, name in enumerate(NAMES):
        track = openings(FRAMES, number)
        frames = np.stack([cv2.resize(frame, (64, 64)) for frame in talking_head(track)])
        write_video(folder / f"{name}.mp4", frames, "25")
        save(folder / f"{name}.png", frames[0])
        soundfile.write(folder / f"{name}.wav", voice(track), 16_000)
        (folder / f"{name}.txt").write_text("a person is talking\n")
    return folder


@pytest.fixture(scope="module")
def i3d(tmp_path_factory):
    return i3d_program(tmp_path_factory.mktemp("weights") / "i3d.pt")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Adapter -> folder of a random transformer that is built so."""
    folder = tmp_path_factory.mktemp("trained")
    for adapter in ("none", "no_modulation", "random_modulation", "no_cross_attention"):
        torch.manual_seed(0)
        tiny_transformer(adapter=adapter).save_pretrained(folder / adapter)
    return folder


def settings_of(table: str, out: Path, reference: Path, **values: object) -> EvaluateConfig:
    """The settings of a table for the tiny model."""
    own = load_config(EvaluateConfig, CONFIGS / f"{table}.yaml") if table else EvaluateConfig()
    words = {"inference": ROOT / "configs/inference/puppet.yaml", "model": reference.parent / "model", "reference": reference, "out": out}
    words |= {"settings": f"{SMALL} {own.settings}".strip(), "device": "cpu", "workers": 1, "weights.any_checksum": True, "looks": False}
    words |= {"published": ",".join(str(ROOT / path) for path in own.published.split(",") if path)}
    written = [f"{key}={value}" for key, value in (words | values).items()]
    return load_config(EvaluateConfig, CONFIGS / f"{table}.yaml" if table else None, written)


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


OWN_WEIGHTS = {
    "table_2": {"no_adapter": "none", "motion_frame": "none", "sliding_window": "none"},
    "table_3": {"no_adapter": "none", "no_modulation": "no_modulation", "random_modulation": "random_modulation",
                "no_cross_attention": "no_cross_attention"},
    "table_4": {"baseline": "none"},
}  # fmt: skip
RANGES = {"table_4": "1-10,15-24"}


@pytest.mark.parametrize("table", ["table_2", "table_3", "table_4", "table_5", "table_6", "table_8"])
def test_a_table_from_weights_to_latex(table, tmp_path, reference, trained, i3d):
    given = ",".join(f"{variant}={trained / adapter}" for variant, adapter in OWN_WEIGHTS.get(table, {}).items())
    config = settings_of(table, tmp_path, reference, steps="generate evaluate", transformers=given, ranges=RANGES.get(table, ""),
                         metrics="fvd,csim,sync_c,ciede,seam_jitter", resamples=2, **{"weights.i3d": i3d})  # fmt: skip
    assert run.run(config) == 0

    variants, stretches = [variant.name for variant in config.rows()], len(config.stretches())
    found = rows(tmp_path / "table.csv")
    measured = [row for row in found if row["whose"] == "measured"]
    assert [row["variant"] for row in measured if row["metric"] == "fvd"] == [name for name in variants for _ in range(stretches)]
    assert all(np.isfinite(float(row["value"])) for row in measured if row["metric"] in ("fvd", "ciede"))
    assert all(row["value"] == "" and "weights." in row["note"] for row in measured if row["metric"] in ("csim", "sync_c"))
    assert {(row["videos"], row["excluded"]) for row in measured} == {("2", "0")}
    # The switches do something: no two variants of the same weights and windows made the same video.
    videos = [(tmp_path / "videos" / name / "seed_42" / "ada.mp4").read_bytes() for name in variants]
    assert len(set(videos)) == len(videos)

    text, latex = (tmp_path / "table.md").read_text(), (tmp_path / "table.tex").read_text()
    published = [row for row in found if row["whose"] == "published, other weights"]
    assert published and all("StableAvatar, arXiv:2508.08248" in row["source"] for row in published)
    for name in (*variants, *{row["method"] for row in published}):
        assert f"| {name} |" in text or f"| {name} (" in text
    assert "absent: give weights." in text and "| minus " in text
    assert latex.count(r" \\") == text.split("\n\n")[2].count("\n"), "as many rows as the Markdown, which has a line of dashes more"
    assert (tmp_path / "report.html").stat().st_size > 1000


def test_a_killed_run_goes_on_to_the_same_and_changed_settings_are_refused(tmp_path, reference, monkeypatch):
    config = settings_of("table_5", tmp_path / "a", reference, steps="generate", seeds="1,2", limit=1)
    other = settings_of("table_5", tmp_path / "b", reference, steps="generate", seeds="1,2", limit=1)
    make, count = cases.make_video, iter(range(100))

    def killed(*arguments: object) -> None:
        if next(count) == 2:
            raise KeyboardInterrupt
        make(*arguments)

    monkeypatch.setattr(cases, "make_video", killed)
    with pytest.raises(KeyboardInterrupt):
        run.run(config)
    done = sorted((tmp_path / "a/videos").rglob("*.mp4"))
    assert len(done) == 2
    times = [path.stat().st_mtime_ns for path in done]
    monkeypatch.setattr(cases, "make_video", make)
    assert run.run(config) == run.run(other) == 0
    assert [path.stat().st_mtime_ns for path in done] == times
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a/videos").rglob("*.mp4"))
    assert len(files) == 6 and all((tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes() for file in files)
    with pytest.raises(ValueError, match="no_guidance was made with other settings or weights"):
        run.run(settings_of("table_5", tmp_path / "a", reference, steps="generate", settings=f"{SMALL} shift=4", seeds="1,2", limit=1))


def test_a_variant_without_its_weights_is_absent(tmp_path, reference):
    config = settings_of("table_4", tmp_path, reference, limit=1, ranges="", metrics="ciede", steps="generate evaluate")
    assert run.run(config) == 0
    assert sorted(path.name for path in (tmp_path / "videos").iterdir()) == ["adapter", "adapter_guidance"]
    text = (tmp_path / "table.md").read_text()
    assert "| baseline | absent | 0 | 0 | measured |" in text
    assert "baseline: absent: its weights are trained differently; give transformers=baseline=FILE" in text


@pytest.fixture(scope="module")
def faulty(tmp_path_factory):
    """Folders of generated videos and references: a good case and one of each kind that cannot be measured."""
    folder = tmp_path_factory.mktemp("faulty")
    generated, reference = folder / "ours", folder / "reference"
    reference.mkdir()
    generated.mkdir()
    track = openings(FRAMES)
    good = talking_head(track)
    for name in ("broken", "faceless", "fine", "gone", "other", "short", "silent"):
        write_video(reference / f"{name}.mp4", good, "25")
        soundfile.write(reference / f"{name}.wav", voice(track) * (name != "silent"), 16_000)
        frames = np.stack([backdrop(192, 192)] * FRAMES) if name == "faceless" else good[: 10 if name == "short" else FRAMES]
        if name != "gone":
            write_video(generated / f"{name}.mp4", frames, "25")
    write_video(generated / "stranger.mp4", good, "25")
    whole = (generated / "broken.mp4").read_bytes()
    (generated / "broken.mp4").write_bytes(whole[: len(whole) // 2])
    return generated, reference


def test_what_cannot_be_measured_is_named_excluded_and_counted(tmp_path, faulty):
    generated, reference = faulty
    config = settings_of("", tmp_path, reference, generated=generated, metrics="ciede,lip_envelope")
    assert run.run(config) == 0
    reasons = {Path(row["file"]).stem: row["reason"] for row in rows(tmp_path / "problems.csv")}
    assert reasons.keys() == {"broken", "faceless", "gone", "short", "silent", "stranger"}
    for name, words in (("broken", "broken: "), ("faceless", "face"), ("gone", "no such video"), ("short", "10 frames, fewer than 16"),
                        ("silent", "silent"), ("stranger", "holds no stranger")):
        assert words in reasons[name], reasons[name]
    measured = {row["metric"]: row for row in rows(tmp_path / "table.csv")}
    assert {(row["videos"], row["excluded"], row["cases"]) for row in measured.values()} == {("2", "6", "2")}
    assert "| ours |" in (tmp_path / "table.md").read_text() and "## Excluded (6)" in (tmp_path / "table.md").read_text()


def test_workers_and_what_is_stored_change_nothing(tmp_path, reference):
    """Two workers, then one with the features of the two, then one alone."""
    generated = tmp_path / "videos"
    for variant in ("one", "two"):
        shutil.copytree(reference, generated / variant, ignore=shutil.ignore_patterns("*.png", "*.wav", "*.txt"))
    metrics = "ciede,colour_drift"
    for out, workers, cache in (("a", 2, tmp_path / "shared"), ("b", 1, tmp_path / "shared"), ("c", 1, tmp_path / "own")):
        config = settings_of("", tmp_path / out, reference, generated=generated, metrics=metrics, workers=workers, cache=cache)
        assert run.run(config) == 0
    for file in ("table.csv", "table.md", "table.tex", "values.csv"):
        assert len({(tmp_path / out / file).read_bytes() for out in "abc"}) == 1, file
    assert [row["variant"] for row in rows(tmp_path / "a/values.csv")] == ["one"] * 4 + ["two"] * 4


def test_videos_are_matched_by_their_names(tmp_path, reference):
    for place in ("ada.mp4", "theirs/bruno.mp4", "ours/seed_7/ada.mp4", "ours/seed_8/ada.mp4"):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(reference / "ada.mp4", tmp_path / place)
    pairs, problems = find_pairs(tmp_path, reference)
    assert [(pair.variant, pair.name, pair.seed) for pair in pairs] == [
        ("ours", "ada", 7), ("ours", "ada", 8), (tmp_path.name, "ada", 0), ("theirs", "bruno", 0)
    ]  # fmt: skip
    assert all(pair.audio.suffix == ".wav" and pair.image.suffix == ".png" and pair.video.suffix == ".mp4" for pair in pairs)
    assert sorted((problem.variant, problem.path.stem) for problem in problems) == [
        ("ours", "bruno"), ("ours", "bruno"), (tmp_path.name, "bruno"), ("theirs", "ada")
    ]  # fmt: skip
    alone, none = find_pairs(tmp_path)
    assert len(alone) == 4 and not none and all(pair.audio == pair.generated for pair in alone)


def test_seams_are_where_the_record_says_windows_meet(tmp_path, reference):
    config = settings_of("table_8", tmp_path, reference, steps="generate", limit=1)
    assert run.run(config) == 0
    pairs, _ = find_pairs(tmp_path / "videos", reference)
    # 7 latents in windows of 6 that share 3: [0, 6), [3, 7); latent 3 begins with frame 9, latent 6 with frame 21.
    assert {pair.seams for pair in pairs} == {(9, 21)}


def test_a_missing_video_changes_only_its_own_place_in_a_choice(tmp_path, reference):


    stretches = [(source, start) for source in "abcdefghij" for start in range(3)]
    candidates = [Candidate(f"{source}-{start}", source, float(start), f"{source} {start}", {}) for source, start in stretches]
    test_set = SetConfig(name="x", count=5)
    chosen = choose(candidates, test_set)
    assert chosen == choose(candidates[::-1], test_set) and len({one.source for one in chosen}) == 5
    left = choose([one for one in candidates if one.source != chosen[0].source], test_set)
    assert {one.name for one in chosen[1:]} <= {one.name for one in left}
    assert {one.name for one in choose(candidates, SetConfig(name="x", count=5, seed=1))} != {one.name for one in chosen}
    assert len(choose(candidates, SetConfig(name="x", count=0, per_video=2))) == 20


def test_a_set_is_cut_out_of_true_videos(tmp_path):
    """Self-driven: two stretches of the user's own list, cut to 30 frames; the portrait is the first of them."""
    raw, out = tmp_path / "raw", tmp_path / "cases"
    raw.mkdir()
    track = openings(100)
    frames = np.stack([cv2.resize(frame, (96, 96)) for frame in talking_head(track)])
    soundfile.write(tmp_path / "sound.wav", voice(track), 16_000)
    write_video(raw / "talk.mp4", frames, "25", "-i", str(tmp_path / "sound.wav"), "-c:v", "libx264", "-qp", "8", "-c:a", "aac")
    (raw / "talk.txt").write_text("an astronaut is talking")
    (raw / "list.csv").write_text("path,start,end\ntalk.mp4,0,2\ntalk.mp4,2,4\n")
    test_set = SetConfig(name="Tiny", table="list.csv", count=0, per_video=9, min_seconds=1.5, max_seconds=3, frames=30, size="64x64",
                         heads="none", detector="none")  # fmt: skip
    assert write_cases(test_set, raw, out) == 0
    written = read_cases(out)
    assert [(case["start"], case["seconds"]) for case in written["cases"]] == [(0.0, 1.2), (2.0, 1.2)]
    assert written["set"]["fps"] == 25 and written["cases"][0]["prompt"] == "an astronaut is talking"
    name = written["cases"][0]["name"]
    assert cv2.VideoCapture(str(out / f"{name}.mp4")).get(cv2.CAP_PROP_FRAME_COUNT) == 30
    first, portrait = cv2.resize(frames[0], (64, 64))[..., ::-1], cv2.imread(str(out / f"{name}.png"))
    assert portrait.shape == (64, 64, 3) and np.abs(portrait.astype(int) - first).mean() < 6
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    assert write_cases(test_set, raw, out) == 0
    assert before == {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    write_cases(SetConfig(**vars(test_set) | {"count": 1}), raw, out)
    assert len(list(out.glob("*.mp4"))) == 1, "an earlier choice's case is left"


def test_a_set_of_portraits_and_voices_is_taken_as_given(tmp_path, reference):
    test_set = SetConfig(name="Given", protocol="given", count=1, min_seconds=0.5, max_seconds=2)
    assert write_cases(test_set, reference, tmp_path) == 0
    case = read_cases(tmp_path)["cases"][0]
    assert case["name"] in NAMES and case["prompt"] == "a person is talking" and case["seconds"] == pytest.approx(FRAMES / 25)
    assert {path.suffix for path in tmp_path.iterdir()} == {".png", ".wav", ".mp4", ".txt", ".json"}
    with pytest.raises(ValueError, match="nothing in .* fits Given"):
        write_cases(SetConfig(name="Given", protocol="given", min_seconds=5), reference, tmp_path / "none")


@pytest.mark.parametrize("path", sorted((CONFIGS / "sets").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_set_loads(path):
    test_set = load_set(str(path))
    assert test_set.about and path.read_text().startswith("#")
    assert test_set.protocol == "given" or test_set.max_seconds >= 2 * test_set.min_seconds


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_experiment_names_what_is_there(path):
    config = load_config(EvaluateConfig, path)
    metrics = run.choose_metrics(config.metrics)
    test_set = load_set(str(ROOT / config.set)).name if config.set else ""
    published = run.read_published(",".join(str(ROOT / one) for one in config.published.split(",") if one), test_set)
    assert bool(published) == bool(config.published)
    assert {metric for row in published for metric in row.values} <= metrics.keys()
    assert {row.frames for row in published} <= set(config.stretches())
    given = ",".join(f"{row.name}=x" for row in config.rows() if row.needs_weights)
    own = load_config(EvaluateConfig, path, ["reference=x", f"transformers={given}"])
    for variant in own.rows():
        experiments.inference_config(own, variant)


def program(*argv: object) -> int:
    sys.path.insert(0, str(ROOT / "scripts"))
    import evaluate

    return evaluate.main([str(word) for word in argv])


def test_a_mistake_is_one_line(tmp_path, reference, caplog, monkeypatch):
    monkeypatch.chdir(ROOT)
    table = "configs/evaluation/table_5.yaml"
    for words, message in [
        ((table,), "out is not given"),
        ((table, "paint", f"out={tmp_path}"), "there is no step 'paint'"),
        ((table, f"out={tmp_path}", "metrics=fud"), "unknown metric 'fud'"),
        ((table, f"out={tmp_path}", f"generated={tmp_path / 'none'}"), "generated must be a folder of videos"),
        ((table, f"out={tmp_path}", "seeds=1,1"), "seeds must be different whole numbers"),
        ((table, f"out={tmp_path}", "ranges=9-3"), "ranges are written FIRST-LAST"),
        ((table, f"out={tmp_path}", "variants=a b"), "variants has lines"),
        ((table, f"out={tmp_path}", "transformers=cfg=x"), "transformers names cfg"),
        ((table, "generate", f"out={tmp_path}", f"reference={reference}", "settings=stepz=3"), "unknown setting 'stepz'"),
        ((table, "cases", f"data={tmp_path}"), "reference is not given"),
        ((table, "study", f"out={tmp_path}", f"answers={tmp_path}"), "study_key.json"),
    ]:
        caplog.clear()
        assert program(*words) == 2
        assert message in caplog.messages[-1] and "\n" not in caplog.messages[-1]


def test_the_record_of_a_variant_tells_settings_and_weights(tmp_path, reference):
    config = settings_of("table_5", tmp_path, reference, steps="generate", limit=1)
    experiments.check(config)
    record = json.loads((tmp_path / "videos/cfg/variant.json").read_text())
    assert record["settings"]["guidance.name"] == "cfg" and len(record["weights"]) == 16 and "seed" not in record["settings"]

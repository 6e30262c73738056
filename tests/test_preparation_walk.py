"""The whole walk of scripts/prepare_data.py: it can be killed and goes on, sets bad files aside, and training reads what it makes."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import preparation_files as films
import pytest
from media_files import REAL, needs_real_input
from test_preparation import bad_files

from scripts.prepare_data import main
from stableavatar.data.buckets import assign
from stableavatar.data.clips import find_clips
from stableavatar.data.dataset import ClipDataset
from stableavatar.data.preparation.clips import UNFINISHED
from stableavatar.data.preparation.crops import ClipConfig
from stableavatar.data.preparation.faces import FaceFinder
from stableavatar.data.preparation.framing import look
from stableavatar.data.preparation.inventory import inspect
from stableavatar.data.preparation.manifest import read_manifest
from stableavatar.data.preparation.pictures import video_pictures
from stableavatar.data.preparation.records import Segment, Source
from stableavatar.data.preparation.settings import FaceConfig
from stableavatar.data.preparation.state import Store
from stableavatar.data.samples import Item, Sample

ROOT = Path(__file__).parents[1]
QUICK = ["inventory", "cuts", "crop", "voice", "manifest", "clip.heads=none", "clip.buckets=96x96,128x96", "cuts.min_seconds=1",
         "cuts.max_seconds=2", "workers=1"]  # fmt: skip
"""Steps and settings for moving shapes, which have no faces."""
FACES = ["clip.buckets=192x192,256x144", "cuts.min_seconds=1", "cuts.max_seconds=2", "workers=1", "filters.sharpness=none",
         "filters.face_sharpness=none", "filters.voice=none"]  # fmt: skip


@pytest.fixture
def raw(tmp_path) -> Path:
    """Two good videos of two shots each."""
    folder = tmp_path / "raw"
    for name, seed in (("a film.mp4", 0), ("singing/größer.mkv", 10)):
        shots = np.concatenate([films.shapes(1.6, seed=seed), films.shapes(1.6, seed=seed + 1)])
        films.write_film(folder / name, shots, films.speech_like(3.2))
    return folder


def prepared(out: Path) -> dict[str, bytes]:
    """Path -> content of all that is a result."""
    files = [path for path in out.rglob("*") if path.is_file() and ".work" not in path.parts]
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in sorted(files)}


def messages(caplog) -> str:
    return "\n".join(entry.getMessage() for entry in caplog.records)


def test_bad_files_are_set_aside_and_the_rest_goes_on(tmp_path, raw):
    expected, out = bad_files(raw), tmp_path / "out"
    assert main([f"raw={raw}", f"out={out}", *QUICK]) == 0
    told = dict(line.split(": ", 1) for line in (out / "problems.txt").read_text(encoding="utf-8").splitlines())
    assert told.keys() == expected.keys() and all(word in told[name] for name, word in expected.items())
    rows = read_manifest(out)
    assert {row.source for row in rows} == {"a film.mp4", "singing/größer.mkv", "good 1.mp4"} and len(rows) == 5
    assert {row.kind for row in rows if row.source.startswith("singing")} == {"singing"} and all(row.accepted for row in rows)
    assert all(row.bucket == "128x96" and (out / row.folder / "audio.wav").is_file() for row in rows)
    assert not (out / ".work" / UNFINISHED).exists()


def test_a_second_run_does_nothing_and_a_changed_setting_only_what_it_touches(tmp_path, raw, caplog):
    caplog.set_level(logging.INFO, "stableavatar")
    out = tmp_path / "out"
    words = [f"raw={raw}", f"out={out}", *QUICK]
    assert main(words) == 0
    first, times = prepared(out), {path: path.stat().st_mtime_ns for path in out.rglob("*.mp4")}
    caplog.clear()
    assert main(words) == 0
    assert prepared(out) == first and times == {path: path.stat().st_mtime_ns for path in out.rglob("*.mp4")}
    assert "crop: 0 to do, 4 are done" in messages(caplog) and "voice: 0 to do, 4 are done" in messages(caplog)
    caplog.clear()
    assert main([*words, "voice.strictness=3", "faces.masked=all", "split.seed=1"]) == 0
    assert "crop: 0 to do" in messages(caplog) and "voice: 4 to do" in messages(caplog)
    caplog.clear()
    shutil.rmtree(out / read_manifest(out)[0].folder)
    assert main([*words, "voice.strictness=3"]) == 0
    assert "crop: 1 to do" in messages(caplog) and "voice: 1 to do" in messages(caplog)
    assert prepared(out).keys() == first.keys()


def test_a_changed_kind_moves_the_clip(tmp_path, raw):
    out, table = tmp_path / "out", tmp_path / "table.csv"
    assert main([f"raw={raw}", f"out={out}", *QUICK]) == 0
    table.write_text("path,kind,person\na film.mp4,dancing,Ann\n")
    assert main([f"raw={raw}", f"out={out}", *QUICK, f"table={table}"]) == 0
    moved = [row for row in read_manifest(out) if row.source == "a film.mp4"]
    assert {(row.kind, row.person) for row in moved} == {("dancing", "Ann")} and not list((out / "128x96/speech").iterdir())
    assert all((out / row.folder / "sub_clip.mp4").is_file() for row in moved)


def test_two_workers_give_what_one_gives(tmp_path, raw):
    one, two = tmp_path / "one", tmp_path / "two"
    assert main([f"raw={raw}", f"out={one}", *QUICK]) == 0
    assert main([f"raw={raw}", f"out={two}", *QUICK, "workers=2"]) == 0
    assert prepared(one) == prepared(two)


@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_run_goes_on_and_gives_the_same(tmp_path, raw, by):
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert main([f"raw={raw}", f"out={whole}", *QUICK]) == 0
    command = [sys.executable, str(ROOT / "scripts/prepare_data.py"), f"raw={raw}", f"out={out}", *QUICK, "workers=2"]
    process = subprocess.Popen(command, start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            if list(out.glob("128x96/*/*/audio.wav")) and list((out / ".work").glob(f"{UNFINISHED}/*/*")):
                break  # one clip is finished, another half written
            time.sleep(0.005)
        process.send_signal(by)
        process.wait(20)
    finally:
        process.kill()
    assert process.returncode == (130 if by == signal.SIGTERM else -by)
    assert by == signal.SIGKILL or not (out / ".work" / UNFINISHED).exists()
    assert all((path.parent / "audio.wav").is_file() for path in out.glob("128x96/*/*/sub_clip.mp4")), "a folder is whole or not there"
    assert main([f"raw={raw}", f"out={out}", *QUICK]) == 0
    assert prepared(out) == prepared(whole)


def test_workers_end_with_a_killed_parent(tmp_path):
    script = tmp_path / "pool.py"
    script.write_text(
        "import os, sys, time\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from stableavatar.workers import shared_out\n"
        "def work(item):\n    print(os.getpid(), flush=True)\n    time.sleep(60)\n"
        "if __name__ == '__main__':\n    list(shared_out(work, [1, 2], 2, chunk=1))\n"
    )
    process = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    workers = [int(process.stdout.readline()) for _ in range(2)]
    process.kill()
    process.wait()
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A disk of its own with room for about one clip."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=700k", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("a small disk cannot be made here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_is_told_and_the_work_goes_on_when_there_is_room(tmp_path, raw, small_disk):
    out = small_disk / "out"
    words = [f"raw={raw}", f"out={out}", *QUICK, "clip.buckets=480x360", "clip.upsampling=9", "clip.crf=1"]
    assert main([word for word in words if word not in ("voice", "manifest")]) == 1
    told = (out / "problems.txt").read_text(encoding="utf-8").splitlines()
    folders = list(out.glob("480x360/*/*"))
    assert told and all("no space left" in line or "No space left" in line for line in told) and len(told) + len(folders) == 4
    assert all((folder / name).stat().st_size > 1000 for folder in folders for name in ("audio.wav", "sub_clip.mp4"))
    subprocess.run(["mount", "-o", "remount,size=20m", str(small_disk)], check=True)
    assert main(words) == 0
    assert len(read_manifest(out)) == 4 and (out / "problems.txt").read_text() == ""


def test_a_raw_file_that_is_gone_costs_no_clip(tmp_path, raw):
    out = tmp_path / "out"
    words = [f"raw={raw}", f"out={out}", *QUICK]
    assert main(words) == 0
    first = prepared(out)
    (raw / "a film.mp4").unlink()
    assert main([word for word in words if word not in ("inventory", "voice", "manifest")] + ["clip.crf=20"]) == 1
    now, told = prepared(out), (out / "problems.txt").read_text(encoding="utf-8")
    kept = [name for name in first if "a-film" in name and name.endswith("mp4")]
    assert len(kept) == 2 and all(now[name] == first[name] for name in kept) and told.count("there is no file") == 2


def test_a_name_that_is_no_text_is_told(tmp_path, raw):
    out = tmp_path / "out"
    shutil.copy(raw / "a film.mp4", os.path.join(os.fsencode(raw), b"\xff.mp4"))
    assert main([f"raw={raw}", f"out={out}", "inventory", "workers=1"]) == 1
    assert (out / "problems.txt").read_text() == "'\\udcff.mp4': its name is not UTF-8; rename it\n"


def test_what_cannot_be_written_is_told_and_done_in_the_next_run(tmp_path, raw):
    out = tmp_path / "out"
    out.mkdir()
    (out / "128x96").write_text("in the way")
    assert main([f"raw={raw}", f"out={out}", *QUICK]) == 1
    told = (out / "problems.txt").read_text(encoding="utf-8").splitlines()
    assert len(told) == 4 and all("128x96" in line or "exists" in line for line in told) and not list(out.rglob("sub_clip.mp4"))
    (out / "128x96").unlink()
    assert main([f"raw={raw}", f"out={out}", *QUICK]) == 0
    assert len(read_manifest(out)) == 4 and (out / "problems.txt").read_text() == ""


@pytest.mark.parametrize(
    ("words", "said"),
    [(["raw=nowhere", "out=o"], "raw must be a folder of videos, got 'nowhere'"), (["raw=."], "out is not given"),
     (["out=o"], "raw is not given"), (["raw=.", "out=o", "crops"], "no step 'crops'; the steps are"),
     (["out=o", "manifest"], "run the step inventory first"),
     (["raw=.", "out=o", "cuts.max_second=3"], "the nearest is 'cuts.max_seconds'"),
     (["raw=.", "out=o", "cuts.max_seconds=5"], "at least twice"),
     (["raw=.", "out=o", "clip.buckets=10x9"], "even"), (["raw=.", "out=o", "public.name=hdtf"], "needs public.path"),
     (["raw=.", "out=o", "table=none.csv"], "cannot read the table none.csv"),
     (["raw=.", "out=o", "classifier=a:b"], "give module:function"),
     (["raw=.", "out=o", "faces.model=none.task"], "none.task"), (["raw=.", "out=o", "scores.syncnet=none.model"], "none.model"),
     (["raw=.", "out=o", "voice.separator=none.onnx"], "vocal separation needs")],
)  # fmt: skip
def test_mistakes_are_told_in_one_line(tmp_path, monkeypatch, caplog, words, said):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    (error,) = [entry.getMessage() for entry in caplog.records if entry.levelno >= logging.ERROR]
    assert said in error and "\n" not in error


def test_help_names_the_steps_and_every_group(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    text = capsys.readouterr().out
    assert caught.value.code == 0 and "[STEPS ...]" in text
    words = ("inventory", "manifest", "cuts.max_seconds", "clip.buckets", "voice.separator", "faces.model", "filters.faces", "split.by")
    assert all(word in text for word in words)


def test_another_run_in_the_same_folder_is_refused(tmp_path, raw, caplog):
    import fcntl

    store = Store(tmp_path / "out")
    store.work.mkdir(parents=True)
    with (store.work / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert main([f"raw={raw}", f"out={store.out}", *QUICK]) == 2
    assert "another run is at work" in messages(caplog)


def test_a_table_of_stretches_and_a_config_file_are_read(tmp_path, raw):
    (tmp_path / "table.csv").write_text("path,start,end,kind\na film.mp4,0.2,1.4,dancing\n")
    settings = {"raw": str(raw), "out": str(tmp_path / "out"), "table": str(tmp_path / "table.csv"), "steps": "inventory cuts crop"}
    (tmp_path / "own.yaml").write_text(json.dumps(settings))
    settings = [word for word in QUICK if "=" in word]
    assert main([str(tmp_path / "own.yaml"), *settings]) == 0
    assert main([str(tmp_path / "own.yaml"), *settings, "manifest"]) == 0
    rows = [row for row in read_manifest(tmp_path / "out") if row.source == "a film.mp4"]
    assert [(row.start, row.end, row.kind, row.frames) for row in rows] == [(0.2, 1.4, "dancing", 30)]


def test_the_annotations_of_a_public_set_are_followed(tmp_path, raw):
    notes = tmp_path / "avspeech.csv"
    notes.write_text("a film,0.2,1.4,0.5,0.5\na film,0.2,1.4,0.9,0.5\nelsewhere,1,5,0.5,0.5\n")
    words = ["public.name=avspeech", f"public.path={notes}"]
    assert main([f"raw={raw}", f"out={tmp_path / 'out'}", *QUICK, *words]) == 0
    rows = read_manifest(tmp_path / "out")
    assert [(row.source, row.start, row.end, row.kind) for row in rows] == [("a film.mp4", 0.2, 1.4, "speech")] * 2, "two speakers"
    assert "größer.mkv: the annotations of avspeech say nothing of it" in (tmp_path / "out/problems.txt").read_text(encoding="utf-8")


# --- with faces ---


@pytest.fixture(scope="module")
def faces(tmp_path_factory) -> tuple[Path, Path]:
    """Raw videos with one, two and no faces, and what the walk makes of them."""
    folder = tmp_path_factory.mktemp("faces")
    raw, out = folder / "raw", folder / "out"
    films.write_film(raw / "one.mp4", films.people(1.4, places=(0.8,)), films.speech_like(1.4))
    films.write_film(raw / "two.mp4", films.people(1.4, places=(0.1, 0.9)), films.speech_like(1.4))
    films.write_film(raw / "none.mp4", films.shapes(1.4, size=(320, 240)), films.speech_like(1.4))
    boxed = np.pad(films.people(1.4, size=(480, 270), places=(0.3,), side=200), ((0, 0), (45, 45), (80, 80), (0, 0)))
    films.write_film(raw / "boxed.mp4", boxed, films.speech_like(1.4))
    assert main([f"raw={raw}", f"out={out}", *FACES]) == 0
    return raw, out


def test_heads_stay_inside_and_bars_go(faces):
    rows = {row.source: row for row in read_manifest(faces[1])}
    assert rows.keys() == {"one.mp4", "two.mp4", "boxed.mp4"}
    with FaceFinder() as finder:
        for name in ("one.mp4", "boxed.mp4"):
            pixels = list(video_pictures(faces[1] / rows[name].folder / "sub_clip.mp4").read())
            found = [finder.find(frame) for frame in pixels[::6]]
            assert all(len(here) == 1 for here in found)
            boxes = np.stack([here[0].box for here in found])
            height = boxes[:, 3] - boxes[:, 1]
            assert (boxes[:, 1] > 0.2 * height).all() and (boxes[:, :2] > 0).all() and (boxes[:, 2] < pixels[0].shape[1]).all()
            edges = [side.mean() for frame in pixels for side in (frame[0], frame[-1], frame[:, 0], frame[:, -1])]
            assert min(edges) > 40, "no black bars"


@pytest.mark.parametrize("step", ["crop", "masks"])
def test_a_face_model_that_does_not_load_is_no_fault_of_the_clips(faces, tmp_path, caplog, step):
    raw, out = faces[0], shutil.copytree(faces[1], tmp_path / "out")
    before = prepared(out)
    assert main([f"raw={raw}", f"out={out}", *FACES, step, f"faces.model={tmp_path / 'none.task'}"]) == 2
    assert "cannot load the face model" in caplog.text
    assert main([f"raw={raw}", f"out={out}", *FACES]) == 0
    assert prepared(out) == before, "nothing was noted of the clips"


def test_no_face_and_two_faces_are_told(faces):
    out = faces[1]
    assert "none.mp4 0.08-1.32 s: no face" in (out / "problems.txt").read_text()
    rows = {row.source: row for row in read_manifest(out)}
    assert rows["one.mp4"].accepted, rows["one.mp4"].reasons
    seen = rows["two.mp4"].scores["faces"], rows["two.mp4"].reasons
    assert rows["two.mp4"].bucket == "192x192" or (seen[0] == 2 and any("faces 2 > 1" in reason for reason in seen[1]))


@pytest.mark.parametrize(("x", "side"), [(0.2, 0), (0.8, 1)])
def test_an_annotation_says_who_is_meant(faces, x, side):
    path = faces[0] / "two.mp4"
    source = Source(**inspect(path, path.name))
    point = Segment(source.id, 0.0, 1.2, (x, 0.6, x, 0.6))
    left, _, right, _ = look(point, source, path, ClipConfig(looks=2), FaceConfig()).heads
    assert (left + right) / 2 / source.width == pytest.approx((0.22, 0.78)[side], abs=0.12)


def test_training_reads_the_set(faces):
    out = faces[1]
    lists = ",".join(str(path) for path in sorted(out.glob("video_*_path.txt")) if path.read_text().strip())
    clips, broken = find_clips(lists, 25)
    assert clips and not broken and all(clip.masks == (True, True) and clip.frames_at(25) == clip.frames for clip in clips)
    buckets, short = assign(clips, [(192, 192), (256, 144)], (21,), 25)
    data = ClipDataset(clips, buckets, 25, seed=0)
    items = [Item(clip, bucket, 0, 0, 0, 0, 1) for bucket, members in buckets.items() for clip in members]
    assert not short and len(items) == len(clips)
    for item in items:
        sample = data[item].value
        assert isinstance(sample, Sample) and sample.pixels.shape == (21, item.bucket.height, item.bucket.width, 3)
        face, lips = sample.masks
        assert 0.02 < face.mean() < 0.6 and 0 < lips.mean() < face.mean() and len(sample.waveform) == pytest.approx(13_440, abs=1)


@needs_real_input
def test_a_real_talking_head_becomes_a_clip(tmp_path):
    (tmp_path / "raw").mkdir()
    shutil.copy(REAL / "talking_head_15s.mp4", tmp_path / "raw")
    words = [f"raw={tmp_path / 'raw'}", f"out={tmp_path / 'out'}", "clip.buckets=192x192", "cuts.max_seconds=8", "clip.looks=1"]
    assert main([*words, "workers=1", "inventory", "cuts", "crop", "voice", "manifest"]) == 0
    rows = read_manifest(tmp_path / "out")
    assert [row.bucket for row in rows] == ["192x192"] * 2 and all(7 < row.seconds < 8 for row in rows)

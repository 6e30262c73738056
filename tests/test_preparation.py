"""From raw files to clip folders: inventory, cuts, crops, exact sync, labels (the walk over all steps: test_preparation_walk.py)."""

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import preparation_files as films
import pytest
import soundfile
from media_files import save

from stableavatar.data.preparation import crops, labels
from stableavatar.data.preparation.background import Background
from stableavatar.data.preparation.crops import ClipConfig, Crop, choose_crop, content_box
from stableavatar.data.preparation.cuts import CutConfig, divide, find_segments, still_frames
from stableavatar.data.preparation.cutting import cut, extract_sound
from stableavatar.data.preparation.inventory import inspect, list_files, source_id
from stableavatar.data.preparation.records import Segment, Source
from stableavatar.geometry import frame_samples

ROOT = Path(__file__).parents[1]
WHOLE = Crop(0, 0, 160, 120, 160, 120)
FRAME = 1 / 25
CUTS = CutConfig(min_seconds=1.0, max_seconds=4.0)


def look(path: Path) -> Source:
    return Source(**inspect(path, path.name))


def made(path: Path, start: float, end: float, crop: Crop = WHOLE, **settings: object) -> tuple[np.ndarray, np.ndarray, dict]:
    """Pictures, sound and values of a clip."""
    source, folder = look(path), path.with_name(f"{path.stem} {start}")
    folder.mkdir()
    values = cut(Segment(source.id, start, end), source, path, crop, ClipConfig(**settings), folder)
    sound, rate = soundfile.read(folder / "audio.wav")
    assert rate == 16_000 and sound.ndim == 1
    return films.read_video(folder / "sub_clip.mp4"), sound, values


# --- inventory ---


@pytest.mark.parametrize(
    ("ending", "options"),
    [("mp4", ()), ("mkv", ()), ("mov", ()), ("ts", ("-bf", "2")), ("avi", ("-c:v", "mpeg4", "-c:a", "pcm_s16le")), ("flv", ()),
     ("webm", ("-c:v", "libvpx", "-deadline", "realtime", "-cpu-used", "8", "-c:a", "libopus")),
     ("mpg", ("-c:v", "mpeg2video", "-c:a", "mp2"))],
)  # fmt: skip
def test_any_container_is_read_and_cut_in_step(tmp_path, ending, options):
    times = [0.6, 1.2, 3.8, 4.4]
    path = tmp_path / f"größer ' 影片 [a]:b.{ending}"
    films.write_film(path, films.flashes(times, 5.2, 25), films.clicks(times, 5.2, 2), options=options)
    source = look(path)
    assert (source.width, source.height, source.sound_layout) == (160, 120, "stereo") and source.fps == pytest.approx(25)
    assert source.seconds == pytest.approx(5.2, abs=0.05) and source.sound_end == pytest.approx(5.2, abs=0.1)
    for start, end in ((0.2, 2.2), (3.0, 5.0)):  # from the file's beginning, and entered in its middle
        pixels, sound, _ = made(path, start, end)
        assert len(pixels) == 50 and len(sound) == 32_000
        wanted = [time - start for time in times if start < time < end]
        assert films.flash_times(pixels, 25) == pytest.approx(wanted, abs=1e-6)
        assert films.onsets(sound, 16_000) == pytest.approx(wanted, abs=0.002)


def test_ids_are_plain_names_and_follow_the_content(tmp_path):
    assert source_id("a/Großes Kino: Teil 2.mp4", "0123456789abcdef") == "Groes-Kino-Teil-2-01234567"
    assert source_id("影片.mp4", "f" * 64) == "video-ffffffff"
    path = films.talking(tmp_path / "a.mp4", 1)
    assert look(path).id != look(films.talking(tmp_path / "b" / "a.mp4", 1, seed=1)).id


def test_pictures_are_upright_and_of_square_pixels(tmp_path):
    flat = films.talking(tmp_path / "flat.mp4", 1)
    phone = look(films.turned(flat, tmp_path / "phone.mp4"))
    assert (phone.width, phone.height) == (120, 160)
    wide = films.talking(tmp_path / "wide.mp4", 1, options=("-vf", "setsar=2"))
    assert (look(wide).width, look(wide).height) == (320, 120)
    both = look(films.turned(wide, tmp_path / "both.mp4"))
    assert (both.width, both.height) == (60, 160) or (both.width, both.height) == (120, 320)
    tags = "setparams=color_trc=smpte2084:color_primaries=bt2020:colorspace=bt2020nc"
    bright = films.talking(tmp_path / "bright.mp4", 1, options=("-pix_fmt", "yuv420p10le", "-vf", tags))
    striped = films.talking(tmp_path / "striped.mp4", 1, options=("-flags", "+ilme+ildct", "-x264opts", "tff=1"))
    assert "tonemap" in look(bright).filters and "bwdif" in look(striped).filters and look(flat).filters == ""
    assert 60 < made(bright, 0.0, 0.4)[0].mean() < 200 and len(made(striped, 0.0, 0.4)[0]) == 10
    pixels, _, _ = made(tmp_path / "phone.mp4", 0.0, 0.8, Crop(0, 0, 120, 160, 120, 160))
    want = np.rot90(films.read_video(flat), 1 if phone.width == 120 else 0, (1, 2))[: len(pixels)].astype(int)
    assert min(np.abs(pixels - want).mean(), np.abs(pixels - want[:, ::-1, ::-1]).mean()) < 3


def bad_files(folder: Path) -> dict[str, str]:
    """Files that cannot be used -> a word of what is said of them."""
    good = films.talking(folder / "good 1.mp4", 1.6, seed=1)
    (folder / "noise.mp4").write_bytes(np.random.default_rng(0).bytes(5000))
    (folder / "cut short.mp4").write_bytes(good.read_bytes()[:-9000])
    (folder / "empty.mkv").touch()
    (folder / "notes.txt").write_text("this is no video\n" * 30)
    save(folder / "portrait.png", np.zeros((64, 64, 3), np.uint8))
    films.write_film(folder / "mute.mp4", films.shapes(1.6), None)
    films.without_times(good, folder / "timeless.mp4")
    shutil.copy(good, folder / "same again.mp4")
    return {"noise.mp4": "cannot read", "cut short.mp4": "", "empty.mkv": "empty", "notes.txt": "not a video",
            "portrait.png": "not a video", "mute.mp4": "no sound", "timeless.mp4": "frame rate",
            "same again.mp4": "good 1.mp4"}  # fmt: skip


def test_bad_files_are_named_with_what_is_wrong(tmp_path):
    for name, word in bad_files(tmp_path).items():
        if name != "same again.mp4":
            with pytest.raises(ValueError) as caught:
                look(tmp_path / name)
            message = str(caught.value)
            assert name in message and word in message and "\n" not in message


def test_the_listing_is_sorted_and_leaves_out_what_is_made(tmp_path):
    for name in ("b.mp4", "a/z.mp4", "out/x.mp4", ".hidden/y.mp4", ".z", "Ä.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "a/round").symlink_to(tmp_path)
    assert [name for name, _ in list_files(tmp_path, tmp_path / "out")] == ["a/z.mp4", "b.mp4", "Ä.mp4"]


# --- cuts ---


def test_a_clip_holds_one_shot_and_neither_black_nor_still_pictures(tmp_path):
    shots = [films.shapes(2.0, seed=3), films.shapes(2.4, seed=4), np.zeros((20, 120, 160, 3), np.uint8), films.shapes(2.0, seed=5)]
    frozen = np.repeat(films.shapes(1.0, seed=6)[-1:], 60, 0)
    pixels = np.concatenate([*shots, frozen])
    path = films.write_film(tmp_path / "a.mp4", pixels, films.speech_like(len(pixels) / 25))
    found = find_segments(look(path), path, [], 25, CUTS)
    frames = [(round(one["start"] * 25), round(one["end"] * 25)) for one in found["segments"]]
    assert frames == [(2, 48), (52, 108), (132, 178)]
    assert found["dropped"]["black"] > 0.5 and found["dropped"]["still"] > 2 and "no sound" not in found["dropped"]


def test_cuts_are_found_at_the_grid_of_the_clips_for_any_rate(tmp_path):
    fast, slow = films.shapes(2.0, 60, seed=3), films.shapes(2.0, 60, seed=4)
    path = films.write_film(tmp_path / "a.mkv", np.concatenate([fast, slow]), films.speech_like(4), "60")
    found = find_segments(look(path), path, [], 25, replace(CUTS, trim=0))
    assert [one["start"] for one in found["segments"]] == [0.0, 2.0]
    assert found["segments"][1]["end"] == pytest.approx(4.0)


def test_segments_lie_where_there_is_sound_and_in_what_is_annotated(tmp_path):
    path = films.write_film(tmp_path / "a.mp4", films.shapes(6), films.speech_like(4))
    source = look(path)
    found = find_segments(source, path, [], 25, CUTS)
    assert found["segments"][-1]["end"] == pytest.approx(4.0, abs=0.03) and found["dropped"]["no sound"] > 1.8
    wishes = [Segment(source.id, 0.5, 2.0, (0.1, 0.2, 0.3, 0.4), "singing", "Ann"), Segment(source.id, 3.5, 6.0)]
    found = find_segments(source, path, wishes, 25, CUTS)["segments"]
    assert [(one["start"], one["end"], one["person"]) for one in found] == [(0.48, 2.0, "Ann")]
    longer = films.write_film(tmp_path / "b.mp4", films.shapes(2), films.speech_like(5))
    assert [one["end"] for one in find_segments(look(longer), longer, [], 25, CUTS)["segments"]] == [1.92]
    with pytest.raises(ValueError, match=r"a\.mp4 gives no clip: .*no sound"):
        find_segments(source, path, [Segment(source.id, 5.0, 6.0)], 25, CUTS)


def test_a_long_stretch_is_divided_evenly():
    for length in range(1, 200):
        parts = divide(7, 7 + length, 20)
        lengths = [last - first for first, last in parts]
        assert parts[0][0] == 7 and parts[-1][1] == 7 + length and max(lengths) <= 20 and max(lengths) - min(lengths) <= 1
        assert all(before[1] == after[0] for before, after in zip(parts, parts[1:]))


def test_a_picture_is_still_only_for_long_enough():
    change = np.array([np.inf, 9, 0, 0, 0, 9, 0, 9.0])
    assert still_frames(change, 1, 4).tolist() == [False, True, True, True, True, False, False, False]
    assert not still_frames(change, 1, 5).any() and not still_frames(change, 1, 0).any()


# --- crops ---


def test_a_crop_holds_the_heads_and_keeps_the_aspect():
    random = np.random.default_rng(0)
    fitted = 0
    for _ in range(3000):
        width, height = (int(side) for side in random.integers(200, 2000, 2))
        left, top = random.uniform(0, 0.2, 2) * (width, height)
        content = (left, top, width - left, height - top)
        corner = random.uniform(0, 0.8, 2) * (width, height)
        size = random.uniform(0.02, 0.9, 2) * (width, height)
        heads = (*corner, *(corner + size))
        config = ClipConfig(upsampling=float(random.uniform(1, 2)), face_height=float(random.choice([0, 0.2, 0.5])))
        try:
            crop = choose_crop(content, heads, size[1] / 2, config)
        except ValueError as error:
            assert "no bucket fits" in str(error)
            continue
        fitted += 1
        assert all(side % 2 == 0 for side in (crop.x, crop.y, crop.width, crop.height)), crop
        box = crop.x, crop.y, crop.x + crop.width, crop.y + crop.height
        assert box[0] >= left and box[1] >= top and box[2] <= width - left and box[3] <= height - top, (crop, content)
        inside = crops.meet(heads, crops._even(content))
        assert box[0] <= inside[0] and box[1] <= inside[1] and box[2] >= inside[2] and box[3] >= inside[3], (crop, heads)
        assert crop.width * config.upsampling >= crop.to_width - 2 * config.upsampling
        assert abs(crop.width * crop.to_height - crop.height * crop.to_width) <= 2 * (crop.to_width + crop.to_height)
    assert fitted > 300


@pytest.mark.parametrize(
    ("size", "bucket"), [((1920, 1080), "rec"), ((1080, 1920), "vec"), ((1000, 1000), "square"), ((720, 576), "square")]
)
def test_the_bucket_keeps_the_most_of_the_picture(size, bucket):
    crop = choose_crop((0, 0, *size), None, 0, ClipConfig())
    assert crop.bucket == bucket and (crop.width == size[0] or crop.height == size[1])


def test_a_small_face_tightens_the_crop_and_a_wide_group_refuses_it():
    small = choose_crop((0, 0, 1920, 1080), (900, 300, 1000, 420), 60, ClipConfig(buckets="square", face_height=0.1))
    assert small.height == 600
    coarse = choose_crop((0, 0, 1920, 1080), (900, 300, 1000, 420), 60, ClipConfig(buckets="square", face_height=0.5, upsampling=1.0))
    assert coarse.height == 512
    with pytest.raises(ValueError, match="the heads take 1720x200"):
        choose_crop((0, 0, 1920, 1080), (100, 300, 1820, 500), 60, ClipConfig(buckets="square"))
    with pytest.raises(ValueError, match="enlarged 4.00 times"):
        choose_crop((0, 0, 128, 128), None, 0, ClipConfig(buckets="square"))


def test_black_bars_are_found_and_dark_scenes_are_none():
    scene = films.shapes(1, size=(200, 100)).max((0, 3))
    framed = np.zeros((140, 200), np.uint8)
    framed[20:120] = scene
    assert content_box(framed) == (0, 21 / 140, 1, 1 - 21 / 140)
    pillars = np.zeros((100, 300), np.uint8)
    pillars[:, 50:250] = scene
    assert content_box(pillars) == (51 / 300, 0, 1 - 51 / 300, 1)
    assert content_box(scene) == (0, 0, 1, 1) == content_box(np.zeros((20, 20), np.uint8))
    assert content_box(np.pad(scene[:99], ((1, 0), (0, 0)))) == (0, 0, 1, 1), "one dark line is no bar"


@pytest.mark.parametrize("buckets", ["", "squre", "513x512", "8x8", "10x", "x"])
def test_buckets_that_make_no_sense_are_refused(buckets):
    with pytest.raises(ValueError, match="bucket"):
        crops.bucket_sizes(buckets)


def test_buckets_are_named_as_the_layout_has_them():
    assert crops.bucket_sizes("rec, vec,832x480,640x352") == [(832, 480), (480, 832), (640, 352)]
    assert [crops.bucket_name(*size) for size in ((512, 512), (480, 832), (832, 480), (640, 352))] == ["square", "vec", "rec", "640x352"]


# --- cutting ---


@pytest.mark.parametrize("fps", ["25", "24", "30000/1001", "60", "12", "50"])
def test_picture_and_sound_stay_in_step_at_any_rate(tmp_path, fps):
    top, _, bottom = fps.partition("/")
    rate = int(top) / int(bottom or 1)
    times = np.array([round(time * rate) / rate for time in (1.0, 3.4, 5.8, 8.2, 10.6)])
    path = films.write_film(tmp_path / "a.mp4", films.flashes(times, 12, rate), films.clicks(times, 12), fps)
    pixels, sound, values = made(path, 0.4, 11.6)
    assert len(pixels) == values["frames"] == 280 and len(sound) == frame_samples(280, 25)
    seen, heard = films.flash_times(pixels, 25), films.onsets(sound, 16_000)
    assert np.abs(heard - (times - 0.4)).max() < 0.001, "the sound is where it was, to the sample"
    assert np.abs(seen - heard).max() <= FRAME / 2 + 0.001


def test_other_rates_and_sizes_can_be_asked_for(tmp_path):
    times = [1.0, 2.0]
    path = films.write_film(tmp_path / "a.mp4", films.flashes(times, 3, 30), films.clicks(times, 3), "30")
    fps = 30000 / 1001
    pixels, sound, _ = made(path, 0.5, 2.7, Crop(20, 10, 100, 100, 64, 64), fps=fps)
    assert pixels.shape[1:3] == (64, 64) and len(pixels) == round(2.2 * fps) and len(sound) == frame_samples(len(pixels), fps)
    assert np.abs(films.flash_times(pixels, fps) - films.onsets(sound, 16_000)).max() < 1 / 50


def test_uneven_pictures_come_at_their_times(tmp_path):
    times = [1.0, 2.2, 3.0, 4.6]
    kept = np.ones(180, bool)
    kept[[8, 9, 10, 47, 48, 49, 50, 51, 100, 101, 120, 121, 122]] = False
    path = films.uneven(tmp_path / "phone.mp4", 6, kept, 30, times)
    assert not look(path).even
    pixels, sound, _ = made(path, 0.4, 5.6)
    seen, heard = films.flash_times(pixels, 25), films.onsets(sound, 16_000)
    assert len(seen) == len(heard) == 4 and np.abs(seen - heard).max() < FRAME


def test_channels_are_mixed_and_gaps_and_late_sound_keep_their_places(tmp_path):
    surround = films.clicks([1.0, 2.0], 3)
    six = np.zeros((len(surround), 6))
    six[:, 2] = surround[:, 0]
    path = films.write_film(tmp_path / "surround.mkv", films.shapes(3), six, options=("-c:a", "flac"))
    assert look(path).sound_layout.startswith("5.1")
    _, sound, _ = made(path, 0.2, 2.8)
    np.testing.assert_allclose(films.onsets(sound, 16_000), [0.8, 1.8], atol=0.001)
    assert 0.8 / 6 < np.abs(sound).max() < 0.8 / 2, "the middle channel, where voices are, counts more than its share, and nothing clips"
    late = films.write_film(tmp_path / "late.mkv", films.flashes([1.0], 3, 25), films.clicks([1.0], 3),
                            options=("-af", "atrim=start=0.7,asetpts=PTS", "-c:a", "flac"))
    assert look(late).sound_start == pytest.approx(0.7, abs=0.03)
    pixels, sound, _ = made(late, 0.0, 2.8)
    assert films.flash_times(pixels, 25) == pytest.approx(films.onsets(sound, 16_000), abs=0.01) and len(sound) == 2.8 * 16_000
    hole = films.write_film(tmp_path / "hole.mkv", films.flashes([0.6, 2.4], 3, 25), films.clicks([0.6, 2.4], 3),
                            options=("-af", "aselect='lt(t,1)+gt(t,2)'", "-c:a", "flac"))
    pixels, sound, _ = made(hole, 0.2, 2.8)
    assert films.flash_times(pixels, 25) == pytest.approx(films.onsets(sound, 16_000), abs=0.02)


def test_a_sound_that_ends_early_is_followed_by_silence(tmp_path):
    path = films.write_film(tmp_path / "a.mp4", films.shapes(3), films.speech_like(2))
    _, sound, _ = made(path, 0.4, 2.8)
    assert len(sound) == 2.4 * 16_000 and np.abs(sound[27_200:]).max() == 0 and np.abs(sound[:24_000]).max() > 0.1


def test_a_damaged_stretch_is_refused_and_a_full_disk_is_told_apart(tmp_path):
    good = films.talking(tmp_path / "good.mp4", 4, options=("-g", "10"))
    bad = films.damaged(good, tmp_path / "bad.mp4")
    with pytest.raises(ValueError, match=r"bad\.mp4.*damaged"):
        made(bad, 0.4, 3.8)
    full = tmp_path / "full"
    full.mkdir()
    (full / "sub_clip.mp4").symlink_to("/dev/full")
    source = look(good)
    with pytest.raises(OSError, match="no space left"):
        cut(Segment(source.id, 0.4, 2.0), source, good, WHOLE, ClipConfig(), full)


def test_the_same_clip_has_the_same_bytes(tmp_path):
    path = films.talking(tmp_path / "a.mp4", 2)
    first = made(path, 0.4, 1.6)[2]
    shutil.rmtree(tmp_path / "a 0.4")
    assert made(path, 0.4, 1.6)[2] == first


def test_the_sound_of_a_file_is_extracted_in_step_with_its_first_picture(tmp_path):
    script = [sys.executable, str(ROOT / "scripts/extract_audio.py")]
    path = films.write_film(tmp_path / "late picture.mkv", films.flashes([1.0], 3, 25), films.clicks([1.4], 3.4, 2),
                            options=("-vf", "setpts=PTS+0.4/TB"))
    extract_sound(path, tmp_path / "own.wav")
    sound, rate = soundfile.read(tmp_path / "own.wav")
    assert rate == 16_000 and films.onsets(sound, rate) == pytest.approx([1.0], abs=0.002)
    subprocess.run([*script, f"--video_path={path}", f"--saved_audio_path={tmp_path}/new folder/a.wav"], check=True)
    assert (tmp_path / "new folder/a.wav").read_bytes() == (tmp_path / "own.wav").read_bytes()
    mute = films.write_film(tmp_path / "mute.mp4", films.shapes(1), None)
    run = subprocess.run([*script, str(mute), str(path)], capture_output=True, text=True)
    assert run.returncode == 2 and "mute.mp4" in run.stderr and path.with_suffix(".wav").is_file() and not mute.with_suffix(".wav").exists()


# --- labels ---


def test_kinds_and_persons_come_from_table_folder_and_classifier(tmp_path, monkeypatch):
    table = tmp_path / "table.csv"
    rows = ["path,kind,person,start,end,note", "ann/singing/a.mp4,,,,,x", "b.mp4,dancing,Bob,,,", "b.mp4,speech,,1,4.5,"]
    table.write_text("\n".join(rows), encoding="utf-8-sig")
    read = labels.read_table(table)
    a, b = (Source("id", path, "", 1, 1, 25, True, 9, 1, "mono") for path in ("ann/singing/a.mp4", "b.mp4"))
    source, stretches = labels.labelled(a, read, persons=True)
    assert (source.kind, source.person, stretches) == ("singing", "ann", [])
    source, (stretch,) = labels.labelled(b, read, persons=True)
    assert (source.kind, source.person, stretch.start, stretch.end) == ("dancing", "Bob", 1.0, 4.5)
    monkeypatch.chdir(tmp_path)
    Path("my_kinds.py").write_text("def kind(path, start, end):\n    return 'singing' if start > 2 else path\n")
    hook = "my_kinds:kind"
    assert labels.kind_of(stretch, source, Path("b.mp4"), hook, "speech") == "speech"
    assert labels.kind_of(Segment("id", 3, 4), replace(b, kind=None), Path("b.mp4"), hook, "speech") == "singing"
    assert labels.kind_of(Segment("id", 1, 4), b, Path("b.mp4"), "", "dancing") == "dancing"
    with pytest.raises(ValueError, match=r"my_kinds:kind for b\.mp4: a kind is one of speech, singing, dancing, got 'b.mp4'"):
        labels.kind_of(Segment("id", 1, 4), b, Path("b.mp4"), hook, "speech")
    with pytest.raises(ValueError, match="give module:function"):
        labels.load_classifier("my_kinds:none")


@pytest.mark.parametrize(
    ("text", "word"),
    [("file,kind\na,b\n", "lacks the column path"), ("path,kind\na.mp4,talk\n", "line 2: a kind is one of"),
     ("path,start,end\na.mp4,3,2\n", "line 2: start must be"), ("path,start,end\na.mp4,x,2\n", "line 2: start and end are seconds")],
)  # fmt: skip
def test_a_bad_table_is_named_with_its_line(tmp_path, text, word):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(ValueError, match=word):
        labels.read_table(tmp_path / "t.csv")


def test_two_persons_of_one_stretch_are_two_clips():
    one, other = Segment("a", 1.0, 4.0, (0, 0, 0.5, 1)), Segment("a", 1.0, 4.0, (0.5, 0, 1, 1))
    assert Segment("a", 1.5, 4.0).clip_id == "a-00001500" and one.clip_id != other.clip_id


# --- background ---


def test_a_background_that_moves_is_told_from_one_that_stands():
    still, pan = Background((160, 120)), Background((160, 120))
    wide = films.shapes(1, size=(400, 120))[0]
    for number, frame in enumerate(films.shapes(2)):
        still.add(frame.mean(2).astype(np.uint8))
        pan.add(wide[:, 4 * number : 4 * number + 160].mean(2).astype(np.uint8))
    assert still.stillness(WHOLE, (160, 120)) > 0.95 and pan.stillness(WHOLE, (160, 120)) < 0.5
    middle = Crop(120, 100, 160, 120, 64, 48)
    assert still.stillness(middle, (400, 300)) < still.stillness(Crop(0, 0, 400, 300, 64, 48), (400, 300)), "the shape sways there"

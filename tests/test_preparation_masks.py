"""Masks and contact sheets of clips in which a real face talks and moves as the tests choose."""

import json
import os
from pathlib import Path

import cv2
import numpy as np
import pytest
from clip_files import write_images, write_sound, write_video
from extract_masks import main
from face_files import FACE_BOX, SIDE, backdrop, face_at, head, placed
from media_files import REAL, needs_real_input, run_ffmpeg
from PIL import Image

from stableavatar.data import frames as training_frames
from stableavatar.data.clips import MASKS, frame_file, probe
from stableavatar.data.preparation import masks
from stableavatar.data.preparation.faces import FaceFinder, track_faces
from stableavatar.data.preparation.masks import FaceConfig, extract_masks, write_masks
from stableavatar.data.preparation.overlay import TINTS, contact_sheet, spread, tint
from stableavatar.data.preparation.pictures import image_pictures, video_pictures
from stableavatar.data.preparation.records import ClipFolder, Segment, Source

pytest.importorskip("mediapipe")

FRAMES = 20
OPENINGS = [7 * (1 - np.cos(0.9 * number)) for number in range(FRAMES)]
"""Pixels by which the mouth is open."""
HIDDEN = (6, 7, 8)
GONE = (17, 18, 19)


def talking(width: int = SIDE, height: int = SIDE) -> list[np.ndarray]:
    """A head that talks and moves to the right by 2 pixels per frame; it is not there in the frames HIDDEN and GONE."""
    shown = [placed(backdrop(width, height), [(head(opening), 2 * number - 20, 0, 1)]) for number, opening in enumerate(OPENINGS)]
    return [backdrop(width, height) if number in HIDDEN + GONE else picture for number, picture in enumerate(shown)]


def write_clip(folder: Path, pictures: list[np.ndarray]) -> ClipFolder:
    folder.mkdir(parents=True)
    write_video(folder / "sub_clip.mp4", np.stack(pictures), "25")
    write_sound(folder / "audio.wav", len(pictures) / 25)
    height, width = pictures[0].shape[:2]
    source = Source("a", "a.mp4", "", width, height, 25.0, True, len(pictures) / 25, 16_000, "mono")
    return ClipFolder(folder.name, folder, Segment("a", 0, len(pictures) / 25), source, width, height, 25.0, len(pictures))


def read(folder: Path, name: str, count: int = FRAMES) -> np.ndarray:
    """bool [count, H, W]; every mask is checked to be 8-bit grey of 0 and 255."""
    read = []
    for number in range(count):
        with Image.open(frame_file(folder / name, number)) as image:
            assert image.mode == "L"
            read.append(np.asarray(image))
    assert set(np.unique(read)) <= {0, 255}
    return np.stack(read) > 0


def middle(mask: np.ndarray) -> np.ndarray:
    """x, y of the middle of a mask."""
    return np.array(np.nonzero(mask))[::-1].mean(1)


def is_clean(folder: Path) -> bool:
    """Whether there are no masks and nothing that is left of making them."""
    return not [path for path in folder.iterdir() if "mask" in path.name]


@pytest.fixture(scope="module")
def talk(tmp_path_factory):
    """(clip, values) of the talking head with its masks."""
    clip = write_clip(tmp_path_factory.mktemp("talk") / "speech" / "00001", talking())
    return clip, extract_masks(clip, FaceConfig())


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A listener, larger and on the left, and a speaker."""
    pictures = [placed(backdrop(512, 288), [(head(), 0, 0, 1.1), (head(opening), 280, 30, 0.9)]) for opening in OPENINGS[:10]]
    return write_clip(tmp_path_factory.mktemp("two") / "00001", pictures)


def test_masks_follow_the_mouth_and_the_face(talk):
    clip, _ = talk
    face, lips = (read(clip.folder, name) for name in MASKS)
    shown = [number for number in range(FRAMES) if number not in HIDDEN + GONE]
    assert not (lips & ~face).any()
    assert np.corrcoef(lips[shown].sum((1, 2)), np.array(OPENINGS)[shown])[0, 1] > 0.95
    for number in shown:
        shift = 2 * number - 20
        assert np.abs(middle(face[number]) - [128 + shift, 121]).max() < 5
        assert np.abs(middle(lips[number]) - [126 + shift, 147 + OPENINGS[number] / 3]).max() < 4
        assert lips[number][round(151 + OPENINGS[number] / 2), 126 + shift], "what is between the lips belongs to them"
        assert 0.6 < face[number].sum() / (FACE_BOX[2] - FACE_BOX[0]) / (FACE_BOX[3] - FACE_BOX[1]) < 1
        assert 0.04 < lips[number].sum() / face[number].sum() < 0.2


def test_values_of_a_clip(talk):
    clip, values = talk
    assert json.loads(json.dumps(values)) == values
    assert (values["frames"], values["faces_median"], values["faces_max"], values["masked_faces"]) == (20, 1, 1, 1)
    assert (values["missing"], values["missing_share"], values["filled_share"]) == ([[17, 19]], 0.15, 0.15)
    assert values["face_size"] == pytest.approx(109 / SIDE, rel=0.05)
    assert 0.8 < values["confidence_min"] <= values["confidence_mean"] < 1
    assert [number for number, box in enumerate(values["boxes"]) if box is None] == list(GONE)
    assert [number for number, opening in enumerate(values["mouth_opening"]) if opening is None] == list(HIDDEN + GONE)
    assert np.abs(np.array(values["boxes"][0])[:3] + [20, 0, 20] - FACE_BOX[:3]).max() < 5
    seen = [opening for opening in values["mouth_opening"] if opening is not None]
    assert values["mouth_movement"] == pytest.approx(np.std(seen), abs=1e-3)


def test_gaps_are_filled_on_a_straight_line(talk):
    clip, values = talk
    face = read(clip.folder, "face_masks")
    for number in HIDDEN:
        part = (number - 5) / 4
        assert middle(face[number]) == pytest.approx((1 - part) * middle(face[5]) + part * middle(face[9]), abs=1.5)
    assert not face[list(GONE)].any(), "nothing is made up after the last sighting"
    before, first, second, third, after = (values["boxes"][number][0] for number in range(5, 10))
    assert [first, second, third] == pytest.approx(np.linspace(before, after, 5)[1:4], abs=0.1)


def test_a_gap_beyond_the_limit_stays_empty_and_is_reported(talk, tmp_path):
    clip, _ = talk
    values = write_masks(video_pictures(clip.folder / "sub_clip.mp4"), tmp_path, FaceConfig(max_gap=2 / 25))
    assert values["missing"] == [[6, 8], [17, 19]] and values["filled_share"] == 0 and values["missing_share"] == 0.3
    assert not read(tmp_path, "lip_masks")[list(HIDDEN)].any()


def test_the_limit_of_a_gap_counts_the_frames_that_are_missing():
    track, *_ = track_faces([[masks._outline(face_at(90 + number, 90))] if number in (0, 4, 6) else [] for number in range(7)])
    assert list(masks.fill_gaps(track, 3)) == [0, 4, 6, 1, 2, 3, 5]
    assert list(masks.fill_gaps(track, 2)) == [0, 4, 6, 5] and list(masks.fill_gaps(track, 0)) == [0, 4, 6]
    assert masks.fill_gaps(track, 3)[1].box == pytest.approx([41, 40, 141, 140])


def test_training_reads_the_masks(talk):
    folder = talk[0].folder
    clip = probe(folder, 25.0)
    assert clip.masks == (True, True) and clip.frames == FRAMES
    small = training_frames.read_masks(clip, range(5), SIDE, SIDE).numpy()
    face = read(folder, "face_masks", 1)[0].reshape(32, 8, 32, 8).mean((1, 3))
    assert small.shape == (2, 2, 32, 32)
    assert np.abs(small[0, 0] - face).max() < 0.75 and np.corrcoef(small[0, 0].ravel(), face.ravel())[0, 1] > 0.98


def test_no_face_is_an_error_that_names_the_clip(tmp_path):
    clip = write_clip(tmp_path / "empty ü", [backdrop(128, 96)] * 3)
    with pytest.raises(ValueError, match=r"no face in .*empty ü.*sub_clip\.mp4.* 3 pictures") as error:
        extract_masks(clip, FaceConfig())
    assert "\n" not in str(error.value) and is_clean(clip.folder)


@pytest.mark.parametrize(("masked", "left", "right"), [("speaking", False, True), ("main", False, True), ("all", True, True)])
def test_of_two_people_the_speaker_gets_the_masks(two, masked, left, right, tmp_path):
    values = write_masks(video_pictures(two.folder / "sub_clip.mp4"), tmp_path, FaceConfig(masked=masked))
    face, lips = (read(tmp_path, name, 10) for name in MASKS)
    assert values["faces_median"] == 2 and values["masked_faces"] == left + right
    assert [face[:, :, :270].any(), lips[:, :, :270].any()] == [left, left]
    assert [face[:, :, 290:].any(), lips[:, :, 290:].any()] == [right, right]
    assert all(box[0] > 280 for box in values["boxes"]), "the boxes are those of the speaker"
    assert values["mouth_movement"] > 0.02


def test_both_of_a_conversation_get_masks(tmp_path):
    pairs = zip(OPENINGS[:8], OPENINGS[4:12])
    pictures = [placed(backdrop(512, 256), [(head(one), -10, 0, 1), (head(other), 256, 0, 0.9)]) for one, other in pairs]
    write_images(tmp_path / "images", np.stack(pictures))
    values = write_masks(image_pictures(tmp_path / "images", 25.0), tmp_path, FaceConfig())
    assert values["masked_faces"] == 2
    assert read(tmp_path, "lip_masks", 8)[:, :, :256].any((1, 2)).all() and read(tmp_path, "lip_masks", 8)[:, :, 256:].any((1, 2)).all()


def test_the_face_mask_has_no_holes_where_the_oval_crosses_itself():
    with FaceFinder() as finder:
        (face,) = finder.find(head())
    turned = face.landmarks[list(masks.DRAWN)].copy()
    turned[:, 0] = 128 + 0.5 * np.abs(turned[:, 0] - 128)  # folded about the nose, as the far cheek is seen from the side
    mask, _ = masks.draw_masks([turned], SIDE, SIDE)
    outlines, nested = cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    assert len(outlines) == 1 and nested[0, 0, 3] == -1


def test_a_full_disk_leaves_the_old_masks(talk, tmp_path, monkeypatch):
    pictures = video_pictures(talk[0].folder / "sub_clip.mp4")
    for name in MASKS:
        write_images(tmp_path / name, np.zeros((2, 8, 8), np.uint8))
    monkeypatch.setattr(masks, "find_outlines", lambda *_: [[masks._outline(face_at(90, 90))]] * 4)
    save, written = Image.Image.save, []

    def full(self: Image.Image, path: Path, **options: object) -> None:
        written.append(path)
        if len(written) == 5:
            raise OSError(28, "No space left on device")
        save(self, path, **options)

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(ValueError, match=rf"cannot write the masks of {tmp_path}: No space left"):
        write_masks(pictures, tmp_path, FaceConfig())
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(MASKS)
    assert all(len(list((tmp_path / name).iterdir())) == 2 for name in MASKS)


def test_a_killed_run_leaves_no_masks_and_the_next_one_cleans_up(tmp_path, monkeypatch):
    child = os.fork()
    if not child:
        with masks._taking_place(tmp_path, MASKS) as parts:
            for part in parts:
                (part / "frame_0.png").write_bytes(b"half")
            os._exit(9)  # nothing else is run, as after SIGKILL
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert not any((tmp_path / name).exists() for name in MASKS)
    with masks._taking_place(tmp_path, MASKS) as parts:
        assert not any(any(part.iterdir()) for part in parts)
        for part in parts:
            (part / "frame_1.png").write_bytes(b"whole")
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.png")) == [f"{name}/frame_1.png" for name in MASKS]
    assert len(list(tmp_path.iterdir())) == 2
    removed, remove = [], masks.shutil.rmtree
    monkeypatch.setattr(masks.shutil, "rmtree", lambda path, **options: (removed.append(path), remove(path, **options)))
    with masks._taking_place(tmp_path, MASKS):
        pass
    assert all(path.name.startswith(".") for path in removed), "what stands in its place is moved away whole, never emptied there"
    assert list(tmp_path.rglob("*.png")) == [] and len(list(tmp_path.iterdir())) == 2


def test_pictures_are_those_that_training_reads(talk, tmp_path):
    folder = talk[0].folder
    theirs = training_frames.read_pixels(probe(folder, 25.0), range(FRAMES), SIDE, SIDE).numpy()
    pictures = video_pictures(folder / "sub_clip.mp4")
    assert np.array_equal(np.stack(list(pictures.read())), theirs)
    assert np.array_equal(np.stack(list(pictures.read([2, 3, 11]))), theirs[[2, 3, 11]])
    write_images(tmp_path / "images", theirs[:4])
    images = image_pictures(tmp_path / "images", 30.0)
    assert (images.frames, images.fps) == (4, 30.0) and np.array_equal(np.stack(list(images.read([1, 3]))), theirs[[1, 3]])


def test_pictures_that_cannot_be_read_are_named(talk, tmp_path):
    whole = (talk[0].folder / "sub_clip.mp4").read_bytes()
    pictures = video_pictures(talk[0].folder / "sub_clip.mp4")
    with pytest.raises(ValueError, match=r"cannot read frame 20 of .*sub_clip\.mp4: .*expected 25 frames"):
        list(type(pictures)(**vars(pictures) | {"frames": 25}).read())
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"cut\.mp4"):
        video_pictures(tmp_path / "cut.mp4")
    with pytest.raises(ValueError, match=r"no .*frame_0\.png"):
        image_pictures(tmp_path, 25.0)
    write_images(tmp_path / "images", np.zeros((2, 8, 8, 3), np.uint8))
    Image.new("RGB", (9, 8)).save(frame_file(tmp_path / "images", 1))
    with pytest.raises(ValueError, match=r"frame_1\.png is of 9x8; expected 8x8"):
        list(image_pictures(tmp_path / "images", 25.0).read())


def test_a_contact_sheet_shows_frames_and_tints_masks(talk, tmp_path):
    folder = talk[0].folder
    sheet = contact_sheet(folder, frames=4, columns=2, height=SIDE)
    assert sheet.shape == (2 * SIDE + 12, 2 * SIDE + 12, 3) and sheet.dtype == np.uint8
    numbers = spread(FRAMES, 4)
    assert numbers == [2, 7, 12, 17] and spread(3, 8) == [0, 1, 2]
    picture = talking()[2]
    face, lips = (read(folder, name)[2] for name in MASKS)
    cell = sheet[4 : 4 + SIDE, 4 : 4 + SIDE].astype(int)
    changed = cell - picture
    assert np.abs(changed[30:][~face[30:]]).max() <= 1, "outside the masks, below the number, the frame is as it was"
    assert np.abs(cell - tint(picture, [255 * face, 255 * lips]))[30:].max() <= 1
    assert changed[lips][:, 0].mean() > changed[face & ~lips][:, 0].mean() + 10 and changed[face & ~lips][:, 2].mean() > 10
    assert TINTS[0][2] > TINTS[0][0] and TINTS[1][0] > TINTS[1][2]


def test_a_contact_sheet_of_a_clip_without_masks(tmp_path):
    clip = write_clip(tmp_path / "bare", [head()] * 3)
    sheet = contact_sheet(clip.folder, frames=8, columns=4, height=SIDE)
    assert sheet.shape == (SIDE + 8, 3 * SIDE + 16, 3)
    assert np.array_equal(sheet[40:250, 4 : 4 + SIDE], head()[36:246])


def test_the_tool_takes_folders_videos_and_the_released_arguments(tmp_path, capsys):
    root = tmp_path / "rec" / "singing"
    for number in (1, 2, 4):
        write_images(root / f"{number:05d}" / "images", np.stack([head(0), head(6)] if number != 2 else [backdrop(64, 64)] * 2))
    assert main([f"--folder_root={root}", "--start=1", "--end=3"]) == 2
    said = capsys.readouterr()
    assert "00001: 2 frames, 1 masked faces, 0.0% without a face" in said.out
    assert said.err.count("error:") == 1 and "no face in" in said.err and "00002" in said.err
    assert sorted(path.parent.name for path in root.glob("*/lip_masks")) == ["00001"]
    assert main([str(root / "00004"), str(root / "00001"), "max_gap=0"]) == 0
    said = capsys.readouterr().out
    assert "00004: 2 frames" in said and "00001: has masks" in said

    write_video(tmp_path / "a film.mp4", np.stack([head(3)] * 2), "25")
    assert main([str(tmp_path / "a film.mp4")]) == 0 and read(tmp_path / "a film_masks", "lip_masks", 2).any((1, 2)).all()
    before = (root / "00001" / "face_masks" / "frame_1.png").stat().st_mtime_ns
    assert main([str(root / "00001" / "images"), "--redo", "masked=all"]) == 0
    assert (root / "00001" / "face_masks" / "frame_1.png").stat().st_mtime_ns > before
    capsys.readouterr()
    for words, message in [([str(tmp_path / "none")], "no clip in"), ([str(root), "masket=all"], "'masked'"),
                           ([f"--folder_root={root}", "--start=7", "--end=9"], "00007 to 00009")]:
        assert main(words) == 2
        assert message in capsys.readouterr().err
    for words in ([], [str(root), f"--folder_root={root}", "--end=1"], [f"--folder_root={root}"]):
        with pytest.raises(SystemExit) as stop:
            main(words)
        assert stop.value.code == 2


@needs_real_input
def test_masks_of_a_real_talking_head(tmp_path):
    run_ffmpeg("-i", str(REAL / "talking_head_15s.mp4"), "-frames:v", "60", "-qp", "0", "-an", str(tmp_path / "sub_clip.mp4"))
    values = write_masks(video_pictures(tmp_path / "sub_clip.mp4"), tmp_path, FaceConfig())
    face, lips = (read(tmp_path, name, 60) for name in MASKS)
    assert values["missing"] == [] and values["faces_max"] == 1 and values["confidence_mean"] > 0.85
    assert not (lips & ~face).any()
    assert np.corrcoef(lips.sum((1, 2)) / face.sum((1, 2)), values["mouth_opening"])[0, 1] > 0.7

"""Faces found in pictures, through both interfaces of mediapipe, and people followed through clips."""

import os
import sys

import cv2
import numpy as np
import pytest
from face_files import FACE_BOX, SIDE, backdrop, face_at, head, landmarker_task, placed

from stableavatar.data.preparation import face_models
from stableavatar.data.preparation.faces import Face, FaceFinder, speaking_faces, track_faces, track_main_face

pytest.importorskip("mediapipe")


@pytest.fixture(scope="module")
def finder():
    with FaceFinder() as finder:
        yield finder


@pytest.mark.parametrize(("width", "height", "scale"), [(960, 540, 0.5), (832, 480, 0.35), (1280, 720, 0.75), (480, 832, 2)])
def test_small_and_large_faces_are_found_where_they_are(finder, width, height, scale):
    x, y = (width - SIDE * scale) * 0.8, (height - SIDE * scale) / 3
    found = finder.find(placed(backdrop(width, height), [(head(), x, y, scale)]))
    assert len(found) == 1
    assert (found[0].box - [x, y, x, y]) / scale == pytest.approx(FACE_BOX, abs=5)
    assert found[0].confidence > 0.85 and found[0].landmarks.shape == (468, 2)


@pytest.mark.parametrize("degrees", [-40, 25, 90])
def test_turned_faces_are_found(finder, degrees):
    where = cv2.getRotationMatrix2D((SIDE / 2, SIDE / 2), degrees, 1)
    (face,) = finder.find(cv2.warpAffine(head(), where, (SIDE, SIDE), borderMode=cv2.BORDER_REPLICATE))
    (upright,) = finder.find(head())
    assert np.abs(face.landmarks - cv2.transform(upright.landmarks[None], where)[0]).mean() < 3


def test_pictures_without_faces_show_none(finder):
    noise = np.random.default_rng(0).integers(0, 255, (240, 320, 3), dtype=np.uint8)
    assert [finder.find(picture) for picture in (noise, backdrop(640, 480), backdrop(1, 1), backdrop(900, 2))] == [[]] * 4


def test_a_picture_is_seen_on_its_own(finder):
    """What was seen before changes nothing, so workers may begin anywhere."""
    fresh = finder.find(head(6))[0].landmarks
    finder.find(placed(backdrop(SIDE, SIDE), [(head(), 60, 20, 0.8)]))
    assert np.array_equal(finder.find(head(6))[0].landmarks, fresh)


def test_the_largest_faces_come_first_and_no_more_than_asked():
    picture = placed(backdrop(768, 256), [(head(), -10, 0, 0.8), (head(), 246, 0, 1), (head(), 502, 0, 0.6)])
    with FaceFinder(max_faces=2) as finder:
        found = finder.find(picture)
    assert [round(float(face.box[0]), -1) for face in found] == pytest.approx([330, 60], abs=10)


def test_both_interfaces_of_mediapipe_find_the_same(tmp_path, finder):
    picture = placed(backdrop(640, 400), [(head(8), 0, 60, 1), (head(), 320, 100, 1.1)])
    with FaceFinder(str(landmarker_task(tmp_path / "face_landmarker.task"))) as tasks:
        for ours, theirs in zip(finder.find(picture), tasks.find(picture), strict=True):
            assert np.abs(ours.landmarks - theirs.landmarks).mean() < 0.03 * (ours.box[3] - ours.box[1])
            assert theirs.confidence == pytest.approx(ours.confidence, abs=0.1)
        assert [tasks.find(empty) for empty in (backdrop(640, 480), backdrop(1, 1))] == [[], []]
        assert len(tasks.find(placed(backdrop(960, 540), [(head(), 600, 100, 0.5)]))) == 1


def test_models_that_cannot_be_used_are_named_in_one_line(tmp_path, monkeypatch):
    import mediapipe

    damaged, whole = tmp_path / "damaged.task", landmarker_task(tmp_path / "whole.task")
    other = tmp_path / "other.task"
    damaged.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    detector = face_models._detector_of(whole)
    from mediapipe.tasks.python.metadata.metadata_writers.model_asset_bundle_utils import create_model_asset_bundle

    create_model_asset_bundle({face_models.DETECTOR: detector, "other.tflite": detector}, str(other))
    for path in (tmp_path / "missing.task", damaged, other, tmp_path):
        with pytest.raises(ValueError, match=rf"cannot load the face model {path}: .*face_landmarker\.task") as error:
            FaceFinder(str(path))
        assert "\n" not in str(error.value)
    monkeypatch.delattr(mediapipe, "solutions")
    with pytest.raises(ValueError, match=r"brings no face model; .*faces\.model=FILE"):
        FaceFinder()
    FaceFinder(str(whole)).close()
    monkeypatch.setitem(sys.modules, "mediapipe", None)
    with pytest.raises(ValueError, match="pip install mediapipe"):
        FaceFinder()


def test_loading_says_nothing_and_gives_stderr_back(capfd):
    FaceFinder().close()
    os.write(2, b"heard")
    assert capfd.readouterr().err == "heard"


def test_people_are_followed_whatever_the_order_and_when_they_come_back():
    rng = np.random.default_rng(0)
    frames = []
    for number in range(30):
        people = [face_at(100 + 6 * number, 200), face_at(500 - 6 * number, 420, 90)]
        if number in range(10, 15):
            people.pop(0)
        frames.append([people[index] for index in rng.permutation(len(people))])
    first, second = sorted(track_faces(frames), key=lambda track: track.faces[0].box[0])
    assert first.frames == [*range(10), *range(15, 30)] and second.frames == list(range(30))
    assert all(face.box[1] == 150 for face in first.faces) and all(face.box[1] == 375 for face in second.faces)


def test_a_jump_or_another_size_is_another_person():
    assert len(track_faces([[face_at(100, 100)], [face_at(230, 100)]])) == 2
    assert len(track_faces([[face_at(100, 100)], [face_at(100, 100, 20)]])) == 2
    assert len(track_faces([[face_at(100, 100)], [face_at(150, 100, 120)]])) == 1
    assert track_faces([[], []]) == [] and track_main_face([[], []]) is None


def test_the_main_face_is_the_most_prominent_whose_mouth_moves():
    def clip(*people: tuple[float, float, bool]) -> list[list[Face]]:
        return [[face_at(x, 200, size, 0.2 * (number % 2) if moves else 0.01) for x, size, moves in people] for number in range(10)]

    assert track_main_face(clip((100, 120, False), (400, 90, True))).faces[0].box[0] == 355
    assert track_main_face(clip((100, 120, True), (400, 90, True))).faces[0].box[0] == 40
    assert track_main_face(clip((100, 120, False), (400, 20, True))).faces[0].box[0] == 40, "a tiny face's mouth is noise"
    assert track_main_face(clip((100, 80, False), (400, 90, False))).faces[0].box[0] == 355
    assert len(speaking_faces(track_faces(clip((100, 120, True), (400, 90, True), (700, 90, False))))) == 2

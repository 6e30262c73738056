"""Readers of the annotation files of public sets, on the very examples that docs/data_preparation.md shows."""

import json
import re
from pathlib import Path

import pytest

from stableavatar.data.preparation.public_sets import SETS, read_annotations
from stableavatar.data.preparation.records import Segment, Source

DOCS = Path(__file__).parents[1] / "docs/data_preparation.md"
EXAMPLE = re.compile(r"^`([\w./]+)`:\n\n```\w*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
"""How the document shows a file: its path in a line, then its text."""


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """A folder with every file that the document shows."""
    for name, text in EXAMPLE.findall(DOCS.read_text(encoding="utf-8")):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path


def source(path: str, width: int = 1280, height: int = 720, seconds: float = 300.0) -> Source:
    return Source(f"id of {path}", path, "0" * 64, width, height, 25.0, True, seconds, 48_000, "stereo")


def test_the_document_shows_every_set(published):
    assert {path.name for path in published.iterdir()} == {"HDTF_dataset", "avspeech_train.csv", "celebvhq_info.json", "hallo3"}
    assert set(SETS) == {"hdtf", "avspeech", "celebv_hq", "hallo3"}


def test_hdtf(published, caplog):
    sources = [source("Radio11.mp4"), source("sub/Adam [xObrQqUkBSo].webm", 1920, 1080, seconds=150)]
    found = read_annotations("hdtf", published / "HDTF_dataset", sources)
    box = pytest.approx
    assert [(one.source, one.start, one.end, one.kind, one.person) for one in found] == [
        ("id of Radio11.mp4", 30, 60, "speech", None),
        ("id of Radio11.mp4", 90, 150, "speech", None),
        ("id of sub/Adam [xObrQqUkBSo].webm", 40, 80, "speech", "AdamKinzinger"),
        ("id of sub/Adam [xObrQqUkBSo].webm", 120, 150, "speech", "AdamKinzinger"),
    ]
    assert found[0].box == box((412 / 1280, 0, 1011 / 1280, 599 / 720))
    # Measured on 720 lines, used on 1080: it follows the picture.
    assert found[2].box == box((397 / 1280, 0, 910 / 1280, 513 / 720))
    assert "are not here" not in caplog.text
    assert "1 annotated clips start after the end" in caplog.text


def test_hdtf_says_which_videos_are_missing_and_takes_its_own_names(published, caplog):
    found = read_annotations("hdtf", published / "HDTF_dataset", [source("WRA_AdamKinzinger2.mp4")])
    assert len(found) == 3
    assert "hdtf: 1 of 2 annotated videos are not here (Radio11)" in caplog.text


@pytest.mark.parametrize("resolution, crop", [("AdamKinzinger2.mp4 0", "397 513 0 513"), (None, "397 513 0 513"),
                                              ("AdamKinzinger2.mp4 720", "397 913 0 913"), ("AdamKinzinger2.mp4 720", None)])
def test_hdtf_boxes_that_cannot_be_placed_are_left_out(published, resolution, crop):
    folder = published / "HDTF_dataset"
    (folder / "WRA_crop_wh.txt").write_text(f"AdamKinzinger2_0.mp4 {crop}\n" if crop else "")
    (folder / "WRA_resolution.txt").write_text(f"{resolution}\n") if resolution else (folder / "WRA_resolution.txt").unlink()
    assert [one.box for one in read_annotations("hdtf", folder, [source("AdamKinzinger2.mp4")])] == [None] * 3


@pytest.mark.parametrize("line, wrong", [("Radio11.mp4 00:30:01:00", "line 1 must give times as mm:ss-mm:ss, got '00:30:01:00'")])
def test_a_damaged_line_is_named(published, line, wrong):
    (published / "HDTF_dataset/RD_annotion_time.txt").write_text(line)
    with pytest.raises(ValueError, match="RD_annotion_time.txt " + re.escape(wrong)):
        read_annotations("hdtf", published / "HDTF_dataset", [])
    with pytest.raises(ValueError, match="no \\*_annotion_time.txt in .*; give HDTF's folder"):
        read_annotations("hdtf", published, [])


def test_hours_and_bars_between_fields_are_understood(published):
    (published / "HDTF_dataset/RD_annotion_time.txt").write_text("Radio11.mp4 | 00:30-01:00.5 | 1:02:03-1:03:00\n\n")
    found = read_annotations("hdtf", published / "HDTF_dataset", [source("Radio11.mp4", seconds=4000)])
    assert [(one.start, one.end) for one in found] == [(30, 60.5), (3723, 3780)]


def test_avspeech(published, caplog):
    (here,) = read_annotations("avspeech", published / "avspeech_train.csv", [source("-AbCdEfGhIj.mkv", seconds=95)])
    assert here == Segment("id of -AbCdEfGhIj.mkv", 90.0, 95, (0.6, 0.25, 0.6, 0.25), "speech")
    assert "avspeech: 1 of 2 annotated videos are not here (kLmNoPqRsTu)" in caplog.text
    (published / "avspeech_train.csv").write_text("-AbCdEfGhIj,1,2,0.5,0.5\n-AbCdEfGhIj,1,2,0.5\n")
    with pytest.raises(ValueError, match="avspeech_train.csv line 2 must give 4 numbers, got '1 2 0.5'"):
        read_annotations("avspeech", published / "avspeech_train.csv", [])


def test_celebv_hq(published, caplog):
    found = read_annotations("celebv_hq", published / "celebvhq_info.json", [source("M2Ohb0FAaJU.mp4"), source("other.mp4")])
    assert found == [
        Segment("id of M2Ohb0FAaJU.mp4", 81.62, 86.17, (0.1964, 0.0, 0.6922, 0.8815), "speech"),
        Segment("id of M2Ohb0FAaJU.mp4", 90.0, 95.5, (0.1, 0.0, 0.6, 0.9), "singing"),
    ]
    assert "celebv_hq: 1 of 2 annotated videos are not here (_0tf2n3rlJU)" in caplog.text


def test_a_damaged_celebv_hq_names_the_clip(published):
    path = published / "celebvhq_info.json"
    data = json.loads(path.read_text())
    del data["clips"]["M2Ohb0FAaJU_1"]["bbox"]["left"]
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=r"clip M2Ohb0FAaJU_1 in .* is not as published \(at 'left'\)"):
        read_annotations("celebv_hq", path, [])
    for text, wrong in (("{", "is not JSON"), ("[]", 'has no "clips"')):
        path.write_text(text)
        with pytest.raises(ValueError, match=f"celebvhq_info.json {wrong}"):
            read_annotations("celebv_hq", path, [])


def test_hallo3(published, caplog):
    folder = published / "hallo3"
    (folder / "videos").mkdir()
    (folder / "videos/0002.mp4").touch()
    found = read_annotations("hallo3", folder, [source("hallo3/videos/0002.mp4", seconds=7.5), source("unrelated.mp4")])
    assert found == [Segment("id of hallo3/videos/0002.mp4", 0.0, 7.5)]
    assert "hallo3: 1 of 2 annotated videos are not here (0001)" in caplog.text
    with pytest.raises(ValueError, match="no files in .*/videos or .*/caption"):
        read_annotations("hallo3", published, [])


@pytest.mark.parametrize("name", [name for name in SETS if name not in ("hdtf", "hallo3")])
def test_annotations_that_cannot_be_read_give_one_line(tmp_path, name):
    with pytest.raises(ValueError, match=f"cannot read the annotations of {name} in .*: No such file or directory"):
        read_annotations(name, tmp_path / "nothing", [])
    (tmp_path / "latin").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(ValueError, match="it is not UTF-8 text"):
        read_annotations(name, tmp_path / "latin", [])


def test_an_unknown_set_names_those_there_are():
    with pytest.raises(ValueError, match="no reader for the public set 'voxceleb'; choose one of hdtf, avspeech, celebv_hq, hallo3"):
        read_annotations("voxceleb", ".", [])


def test_of_two_files_of_one_name_the_first_is_taken(published):
    found = read_annotations("avspeech", published / "avspeech_train.csv", [source("b/-AbCdEfGhIj.mp4"), source("a/-AbCdEfGhIj.mp4")])
    assert [one.source for one in found] == ["id of a/-AbCdEfGhIj.mp4"]

"""What comes out of data preparation: manifest, lists, splits, report."""

import base64
import io
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from clip_files import make_clip
from html_pages import Page
from PIL import Image

from stableavatar.data.clips import find_clips
from stableavatar.data.preparation import overlay, report
from stableavatar.data.preparation.filters import FilterConfig, limits
from stableavatar.data.preparation.manifest import COLUMNS, Row, read_manifest, write_manifest
from stableavatar.data.preparation.report import write_report
from stableavatar.data.preparation.splits import Origin, SplitConfig, assign_splits

DOCS = Path(__file__).parents[1] / "docs/data_preparation.md"
SCORES = ("sharpness", "sync")
LIMITS = {"sharpness": [("at least", 30.0)], "sync": []}


def row(name: str, bucket: str = "rec", split: str = "train", accepted: bool = True, **changes: object) -> Row:
    reasons = () if accepted else ("sharpness 12.1 < 30",)
    place, times, sizes = f"{bucket}/speech/{name}", (1.5, 3.1), (25.0, 40, 64, 48)
    values = Row(name, place, "a file.mp4", "0" * 64, *times, *sizes, bucket, "speech", None, split, accepted, reasons, "1" * 64, "2" * 64,
                 "The protagonist is talking", {"sharpness": 12.1, "sync": None})
    return replace(values, **changes)


ROWS = [row("b", person="Zoë"), row("a"), row("c", accepted=False), row("d", "vec", "test"), row("e", "640x352", "validation")]


def lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def test_the_manifest_reads_back_and_its_bytes_do_not_depend_on_the_order(tmp_path):
    for name, rows in (("one", ROWS), ("two", ROWS[::-1])):
        (tmp_path / name).mkdir()
        write_manifest(tmp_path / name, rows, SCORES)
    assert read_manifest(tmp_path / "one") == sorted(ROWS, key=lambda row: row.id)
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "two").iterdir()) and not [name for name in files if "partial" in name]
    assert all((tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes() for name in files)


def test_an_empty_manifest_has_the_columns_of_a_full_one(tmp_path):
    write_manifest(tmp_path, [], SCORES)
    empty = pq.read_schema(tmp_path / "manifest.parquet")
    write_manifest(tmp_path, ROWS, SCORES)
    full = pq.read_schema(tmp_path / "manifest.parquet")
    assert empty.equals(full)
    assert full.field("sync").type == full.field("sharpness").type == "double"
    table = pq.read_table(tmp_path / "manifest.parquet")
    assert table["sync"].null_count == len(ROWS) and table["person"].null_count == len(ROWS) - 1


def test_lists_name_the_accepted_clips_of_each_bucket_and_split(tmp_path):
    write_manifest(tmp_path, ROWS, SCORES)
    named = {path.name: lines(path) for path in tmp_path.glob("*.txt")}
    assert {name: folders for name, folders in named.items() if folders} == {
        "video_rec_path.txt": ["rec/speech/a", "rec/speech/b"],
        "test_video_vec_path.txt": ["vec/speech/d"],
        "validation_video_640x352_path.txt": ["640x352/speech/e"],
    }
    assert {"video_square_path.txt", "validation_video_rec_path.txt", "test_video_square_path.txt"} <= set(named)


def test_a_list_that_has_lost_its_clips_is_emptied_but_a_users_own_list_is_left_alone(tmp_path):
    (tmp_path / "640x352").mkdir()
    (tmp_path / "video_mine_path.txt").write_text("somewhere\n")
    write_manifest(tmp_path, ROWS, SCORES)
    write_manifest(tmp_path, ROWS[:2], SCORES)
    assert lines(tmp_path / "validation_video_640x352_path.txt") == lines(tmp_path / "test_video_vec_path.txt") == []
    assert lines(tmp_path / "video_mine_path.txt") == ["somewhere"]


def test_training_reads_the_lists_wherever_the_set_is_moved(tmp_path, monkeypatch):
    (tmp_path / "made").mkdir()
    for name in ("a", "b"):
        make_clip(tmp_path / "made/rec/speech" / name, source="video")
    write_manifest(tmp_path / "made", ROWS[:2], SCORES)
    (tmp_path / "made").rename(tmp_path / "moved")
    for directory in (Path("/"), tmp_path / "moved"):
        monkeypatch.chdir(directory)
        clips, broken = find_clips(str(tmp_path / "moved/video_rec_path.txt"), 25)
        assert [clip.folder for clip in clips] == [tmp_path / "moved/rec/speech" / name for name in ("a", "b")] and not broken
    assert clips[0].frames == 40 and clips[0].masks == (True, True)


def test_what_is_no_manifest_gives_one_line(tmp_path):
    (tmp_path / "manifest.parquet").write_text("not parquet")
    with pytest.raises(ValueError, match="cannot read the manifest .*manifest.parquet") as error:
        read_manifest(tmp_path)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="cannot read the manifest"):
        read_manifest(tmp_path / "nothing.parquet")


def test_a_manifest_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    write_manifest(tmp_path, ROWS[:1], SCORES)
    before = (tmp_path / "manifest.parquet").read_bytes()

    def full(table: object, path: Path, **options: object) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq, "write_table", full)
    with pytest.raises(ValueError, match="manifest.parquet: No space left on device"):
        write_manifest(tmp_path, ROWS, SCORES)
    assert (tmp_path / "manifest.parquet").read_bytes() == before and not list(tmp_path.glob("*.partial"))


# Splits


def test_no_person_is_in_two_splits_not_even_through_shared_sources():
    chain = [Origin("1", "Ann"), Origin("2", "Ann"), Origin("2", "Bob"), Origin("3", "bob "), Origin("3", None), Origin("4", "Zoë"),
             Origin("5", "Zoe\u0308")]
    seen = Counter()
    for seed in range(60):
        splits = assign_splits(chain, SplitConfig(validation=0.3, test=0.3, seed=seed))
        assert len({splits[origin] for origin in chain[:5]}) == 1
        assert splits[chain[5]] == splits[chain[6]]
        seen[splits[chain[0]], splits[chain[5]]] += 1
    assert len(seen) == 9, "the two groups are drawn apart"


def test_by_source_only_the_file_counts():
    origins = [Origin(str(source), "Ann") for source in range(50)]
    assert len(set(assign_splits(origins, SplitConfig(0.3, 0.3, "source")).values())) == 3
    assert len(set(assign_splits(origins, SplitConfig(0.3, 0.3, "person")).values())) == 1
    both = [Origin("1", "Ann"), Origin("1", "Bob"), Origin("1", None)]
    assert all(len(set(assign_splits(both, SplitConfig(0.4, 0.4, "source", seed)).values())) == 1 for seed in range(20))


def test_clips_that_come_later_do_not_move_the_old_ones():
    old = [Origin(str(number), f"person {number % 70}" if number % 3 else None) for number in range(200)]
    config = SplitConfig(0.2, 0.2)
    before = assign_splits(old, config)
    after = assign_splits([Origin(f"new {number}", f"person {number}") for number in range(300)] + old[::-1], config)
    assert {origin: after[origin] for origin in old} == before
    assert set(before.values()) == {"train", "validation", "test"}


def test_a_larger_share_only_takes_from_training():
    origins = [Origin(str(number), None) for number in range(500)]
    small, large = (assign_splits(origins, SplitConfig(share, share)) for share in (0.1, 0.3))
    assert all(large[origin] == split for origin, split in small.items() if split != "train")


def test_the_draw_has_its_shares_and_never_changes():
    origins = [Origin(str(number), None) for number in range(4000)]
    counts = Counter(assign_splits(origins, SplitConfig(validation=0.1, test=0.2)).values())
    assert abs(counts["validation"] / 4000 - 0.1) < 0.015 and abs(counts["test"] / 4000 - 0.2) < 0.02
    assert set(assign_splits(origins, SplitConfig(0, 0)).values()) == {"train"}
    fixed = assign_splits([Origin("a", None), Origin("b", "Ann"), Origin("d", None), Origin("g", None)], SplitConfig(0.3, 0.3))
    assert {origin.source: split for origin, split in fixed.items()} == {"a": "train", "b": "test", "d": "train", "g": "validation"}


def test_shares_that_leave_nothing_are_told(caplog):
    with pytest.raises(ValueError, match="must not exceed 1 together, got 0.6 and 0.5"):
        assign_splits([Origin("1", None)], SplitConfig(0.6, 0.5))
    assign_splits([Origin("1", None)], SplitConfig(1e-9, 0))
    assert "no clip is in the validation split: the draw left it none of 1 groups" in caplog.text


# The report


def clip_rows(out: Path) -> list[Row]:
    rows = [row("a"), row("b", accepted=False, source='<i>"odd" & one.mp4'), row("gone", accepted=False)]
    for clip in rows[:2]:
        make_clip(out / clip.folder, source="video")
    return rows


def test_the_report_is_whole_without_scripts_or_network(tmp_path):
    rows = clip_rows(tmp_path)
    write_report(tmp_path, rows, LIMITS, {"broken <1>.mp4": "no pictures"}, {"clip.fps": 25.0})
    page = Page(tmp_path / "report.html")
    assert {"script", "link", "iframe"}.isdisjoint(tag for tag, _ in page.elements)
    assert page.all("html") == [{"lang": "en"}] and len(page.all("h1")) == 1
    ids = {attributes["id"] for _, attributes in page.elements if "id" in attributes}
    links = [attributes["href"] for attributes in page.all("a")]
    assert all(link[1:] in ids if link[0] == "#" else re.fullmatch(r"rec/speech/\w+/sub_clip.mp4", link) for link in links)
    assert all(picture["alt"] and picture["src"].startswith("data:image/jpeg;base64,") for picture in page.all("img"))
    said = ["3 clips, 0.1 min", "1 accepted", "2 rejected", '<i>"odd" & one.mp4', "sharpness 12.1 < 30", "broken <1>.mp4", "no pictures",
            "clip.fps"]
    assert [words for words in said if words not in page.words] == []
    assert "Not taken of any clip, so they filter nothing: sync." in page.words
    assert "No picture:" in page.words, "the clip whose folder is gone"


def test_contact_sheets_show_the_frames_with_their_masks(tmp_path):
    write_report(tmp_path, clip_rows(tmp_path), LIMITS, {}, {})
    sheets = [picture["src"] for picture in Page(tmp_path / "report.html").all("img")]
    assert len(sheets) == 2
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(sheets[0].partition(",")[2]))).convert("RGB")).astype(int)
    frames = np.array_split(pixels, report.SHEET_FRAMES, axis=1)
    assert all(np.ptp(frame, axis=2).max() > 40 for frame in frames), "the frames are grey: what has a colour is a mask"
    assert [frame.mean() for frame in frames] == sorted(frame.mean() for frame in frames), "the frames grow brighter"


def test_a_histogram_counts_every_clip_and_has_its_threshold_where_it_belongs(tmp_path):
    values = [10, 10, 20, 70]
    rows = [row(str(value) + str(index), accepted=False, scores={"sharpness": value, "sync": None}) for index, value in enumerate(values)]
    write_report(tmp_path, rows, {"sharpness": [("at least", 25.0)], "sync": []}, {}, {})
    page = Page(tmp_path / "report.html")
    (drawing,), (line,), bars = page.all("svg"), page.all("line"), page.all("rect")
    assert "sharpness over 4 clips, from 10 to 70, median 15" in drawing["aria-label"]
    assert float(line["x1"]) == report.CHART_WIDTH * (25 - 10) / (70 - 10)
    assert [float(bar["height"]) for bar in bars] == [report.CHART_HEIGHT, report.CHART_HEIGHT / 2, report.CHART_HEIGHT / 2]
    assert [float(bar["x"]) for bar in bars] == [0, 50, 290]


def test_a_report_of_ten_thousand_clips_stays_small_and_says_what_it_leaves_out(tmp_path, monkeypatch):
    noise = np.random.default_rng(0).integers(0, 256, (150, 1060, 3), np.uint8)
    monkeypatch.setattr(overlay, "contact_sheet", lambda *arguments: noise)
    rows = [row(f"{number:05d}", accepted=number % 4 > 0) for number in range(10_000)]
    rows += [row(f"x{number}", accepted=False, reasons=(f"no face in x{number}",)) for number in range(3)]
    write_report(tmp_path, rows, LIMITS, {}, {})
    page = Page(tmp_path / "report.html")
    assert len(page.all("img")) <= 2 * report.SHEETS
    assert (tmp_path / "report.html").stat().st_size < 16e6, "noise is the worst that a JPEG can hold"
    assert "of the 2503 rejected clips, of every reason" in page.words and f"A sample of {report.SHEETS} of the 7500 accepted" in page.words
    shown = {word for picture in page.all("img") for word in picture["alt"].split()}
    assert {"x0", "x1", "x2"} <= shown, "a rare reason is in the sample"
    assert page.words.count("sharpness 12.1 < 30") >= 2500, "the table has all rejections"
    assert "10003 clips, 4.4 h: 7500 accepted" in page.words
    assert "sharpness 2500" in page.words and "set aside 3" in page.words


def test_an_empty_set_has_a_report_and_the_same_set_the_same_report(tmp_path):
    write_report(tmp_path, [], LIMITS, {}, {})
    assert "0 clips" in Page(tmp_path / "report.html").words
    rows = clip_rows(tmp_path)
    write_report(tmp_path, rows, LIMITS, {}, {})
    first = (tmp_path / "report.html").read_bytes()
    write_report(tmp_path, rows[::-1], LIMITS, {}, {})
    assert (tmp_path / "report.html").read_bytes() == first


# The document


def test_the_document_tells_every_score_with_its_threshold():
    table = re.findall(r"^\| `(\w+)` \| [^|]+ \| ((?:none|at (?:least|most))[^|]*) \|$", DOCS.read_text(encoding="utf-8"), re.MULTILINE)
    written = {name: ", ".join(f"{side} {value:g}" for side, value in bounds) or "none" for name, bounds in limits(FilterConfig()).items()}
    assert dict(table) == written and len(table) == len(written)


def test_the_document_tells_every_column_of_the_manifest():
    told = DOCS.read_text(encoding="utf-8")
    assert [column.name for column in COLUMNS if f"`{column.name}`" not in told] == []

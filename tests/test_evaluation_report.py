"""The report of an evaluation and its side-by-side videos: what people look at is right and complete."""

import base64
import io
import os
import re
import tracemalloc
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from html_pages import Page
from looked_at import HEIGHT, STEP, WIDTH, decode, make_pairs, write_video
from PIL import Image

from stableavatar import ffmpeg
from stableavatar.data.preparation.pictures import video_pictures
from stableavatar.evaluation import side_by_side
from stableavatar.evaluation.case_sheets import MOMENTS, frame_at
from stableavatar.evaluation.findings import Findings
from stableavatar.evaluation.pairs import Pair, Problem, Result
from stableavatar.evaluation.published import PublishedRow
from stableavatar.evaluation.report import write_report
from stableavatar.evaluation.side_by_side import LABEL, by_case, write_side_by_side, write_videos
from stableavatar.evaluation.statistics import Interval
from stableavatar.sheets import GUTTER, fit_cell, label_strip


@dataclass(frozen=True)
class Quality:
    """How good it is: <b>this</b> & that."""

    label: str
    better: str = "higher"
    unit: str = ""


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> list[Pair]:
    return make_pairs(tmp_path_factory.mktemp("cases"))


# Side by side


def levels(frames: np.ndarray, panel: int, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """Mean colour of a panel in the first row of a side-by-side video, [frames, 3]."""
    left, top = GUTTER + panel * (width + GUTTER), GUTTER + LABEL
    return frames[:, top + 4 : top + height - 4, left + 12 : left + width - 12].mean(axis=(1, 2))


def test_all_videos_run_side_by_side_with_the_sound_and_those_that_end_hold_their_last_frame(pairs, tmp_path):
    write_side_by_side(tmp_path / "out.mp4", [pair for pair in pairs if pair.name == "one"], HEIGHT)
    video, frames = ffmpeg.probe_video(tmp_path / "out.mp4"), decode(tmp_path / "out.mp4")
    assert (video.frames, video.fps) == (30, 25), "as long as the longest that was generated"
    span = ffmpeg.clock_span(tmp_path / "out.mp4", "a:0")
    assert span[1] - span[0] == pytest.approx(1.2, abs=0.05)
    reference, long, short, truth = (levels(frames, panel) for panel in range(4))
    times = np.arange(30)
    assert np.allclose(reference, (200, 30, 30), atol=8)
    assert np.allclose(long, 20 + STEP * times[:, None], atol=4)
    assert np.allclose(short, 20 + STEP * np.minimum(times, 19)[:, None], atol=4)
    assert np.allclose(truth, 40 + STEP * times[:, None], atol=4), "of a video of 50 frames a second every second one"
    strips = [frames[:, GUTTER : GUTTER + LABEL, GUTTER + panel * (WIDTH + GUTTER) :][:, :, :WIDTH].astype(int) for panel in (1, 2)]
    changes = [np.abs(strip[25] - strip[10]).mean() for strip in strips]
    assert changes[0] < 2 < 5 < changes[1], "the name of the one that ended says so"
    assert all(np.ptp(strip[10]) > 100 for strip in strips)


def test_more_pictures_than_fit_go_into_another_row_and_the_first_true_frame_stands_for_a_missing_image(pairs, tmp_path, monkeypatch):
    monkeypatch.setattr(side_by_side, "WIDEST", 3 * (WIDTH + GUTTER))
    write_side_by_side(tmp_path / "out.mp4", [pair for pair in pairs if pair.name == "two"], HEIGHT)
    frames = decode(tmp_path / "out.mp4")
    assert frames.shape[1:3] == (2 * (HEIGHT + LABEL + GUTTER) + GUTTER, 2 * (WIDTH + GUTTER) + GUTTER)
    assert np.allclose(levels(frames, 0), 40, atol=4)


def test_a_long_video_needs_no_more_memory_than_a_short_one(tmp_path, pairs):
    peaks = []
    for frames in (20, 200):
        video = write_video(tmp_path / f"{frames}.mp4", frames)
        tracemalloc.start()
        write_side_by_side(tmp_path / "out.mp4", [replace(pairs[0], generated=video)], HEIGHT)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 20 * WIDTH * HEIGHT * 3


def test_videos_are_made_once_and_anew_when_a_part_of_them_changed(pairs, tmp_path):
    own = write_video(tmp_path / "in/one.mp4", 5)
    group = [replace(pairs[0], generated=own), pairs[2]]
    videos = write_videos(tmp_path / "out", group)
    assert videos == {"one": tmp_path / "out/one.mp4"}
    first = videos["one"].stat().st_mtime_ns
    write_videos(tmp_path / "out", group)
    assert videos["one"].stat().st_mtime_ns == first
    os.utime(own, ns=(1, 1))
    write_videos(tmp_path / "out", group)
    assert videos["one"].stat().st_mtime_ns > first
    write_videos(tmp_path / "out", group[:1])
    assert decode(videos["one"]).shape[0] == 5


def test_of_every_variant_the_lowest_seed_is_shown(pairs):
    seeds = [replace(pair, seed=seed) for seed in (3, 1, 2) for pair in pairs if pair.variant == "long"]
    assert [[(pair.name, pair.variant, pair.seed) for pair in group] for group in by_case(seeds + pairs[2:])] == [
        [("one", "long", 1), ("one", "short", 0)], [("two", "long", 1), ("two", "short", 0)],
    ]  # fmt: skip


def test_labels_fit_their_strips_and_pictures_their_cells():
    strip = label_strip("a very long name of a variant " * 5, 80, 28)
    assert strip.shape == (28, 80, 3) and np.ptp(strip[:, 4:-4]) > 100 and np.ptp(strip[:, :2]) == np.ptp(strip[:, -2:]) == 0
    cell = fit_cell(np.full((100, 50, 3), 255, np.uint8), 60, 40)
    assert cell.shape == (40, 60, 3) and (cell[:, 20:40] == 255).all() and (cell[:, :19] < 50).all() and (cell[:, 41:] < 50).all()


def test_a_frame_is_found_by_its_time(pairs):
    video = video_pictures(pairs[0].video)
    for seconds, frame in ((0, 0), (0.02, 1), (0.709, 35), (1.58, 79), (99, 79)):
        assert frame_at(video, seconds).mean() == pytest.approx(40 + STEP / 2 * frame, abs=4)
    with pytest.raises(ValueError, match="cannot read frame 0 of .*x.mp4"):
        frame_at(replace(video, path=video.path.with_name("gone") / "x.mp4"), 0)


# The report


def findings(pairs: list[Pair]) -> Findings:
    """Two metrics of videos, one of them over the frames, one of the set, one that is absent."""
    results = [Result("csim", pair.variant, {"long": 0.9, "short": 0.5}[pair.variant] + 0.01 * len(pair.name + pair.name[0] * place), pair)
               for place, pair in enumerate(pairs)]
    results += [replace(found, frames=(start, start + 10), value=found.value - start / 100) for found in results for start in (0, 10)]
    results += [Result("jitter", pair.variant, float("nan") if pair.variant == "short" else 1.5, pair) for pair in pairs]
    metrics = {"fvd": Quality("FVD", "lower"), "csim": Quality("CSIM"), "jitter": Quality("Jitter", "lower", "levels")}
    return Findings(
        "Table <2>", "Ten cases & more.", metrics | {"iqa": Quality("IQA")}, results, pairs, reference="long",
        sets={("long", "fvd", None): Interval(532.25, 500.5, 564.25, 2), ("short", "fvd", None): Interval(700, 650, 750, 2)},
        absent={"iqa": "give weights.qalign=..."},
        problems=[Problem(Path("out/<odd>.mp4"), "no face in 30 of 30 frames", "short")],
        published=[PublishedRow("Ours", {"csim": 0.85}, {"csim": "0.850"}, "StableAvatar, table 2", "published, other weights")],
        missing={"random": "give variants.random.transformer"},
        videos={"one": Path("anywhere/side by side/one.mp4")}, settings={"metrics": "fvd,csim"}, versions={"torch": "2.9"},
    )  # fmt: skip


@pytest.fixture(scope="module")
def report(pairs, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("report")
    return write_report(out, replace(findings(pairs), videos={"one": out / "side by side/one.mp4"}))


def test_the_report_tells_everything_and_fetches_nothing(report):
    page = Page(report)
    assert page.all("html") == [{"lang": "en"}] and len(page.all("h1")) == 1
    ids = {attributes["id"] for _, attributes in page.elements if "id" in attributes}
    links = [attributes["href"] for attributes in page.all("a")]
    assert {link for link in links if link[0] != "#"} == {"side%20by%20side/one.mp4"}
    assert {link[1:] for link in links if link[0] == "#"} <= ids
    assert not page.all("link") and all("src" not in script for script in page.all("script"))
    assert all(image["alt"] and image["src"].startswith("data:image/") for image in page.all("img"))
    said = [
        *("Table <2>", "Ten cases & more.", "4 videos measured, 1 excluded", "FVD ↓", "Jitter (levels) ↓", "1–10", "11–20"),
        "Ours – 0.850 – – – – published, other weights: StableAvatar, table 2",
        *("long 532.2 (500.5 .. 564.2) 0.9", "1.500 (1.500 .. 1.500) absent 2 0 measured", "iqa give weights.qalign=..."),
        *("random give variants.random.transformer", "out/<odd>.mp4 short no face in 30 of 30 frames"),
        *("csim How good it is: <b>this</b> & that.", "metrics fvd,csim", "torch 2.9"),
    ]
    assert [words for words in said if words not in page.words] == []
    assert "nan" not in page.words and "http" not in re.sub(r'"data:[^"]+"', "", report.read_text())


def test_the_report_compares_by_case_and_sorts_by_numbers(report):
    page = Page(report)
    assert re.search(r"short -0\.\d+ \(-0\.\d+ \.\. -0\.\d+\)p = 0\.5, 2 cases", page.words), "two cases cannot tell more"
    assert "short (11–20) -0." in page.words
    values = [cell["data-value"] for cell in page.all("td") if "data-value" in cell]
    rows = [values[start : start + 5] for start in range(0, len(values), 5)]
    stretches = [[variant, "0", start] for variant in ("long", "short") for start in ("-1", "0", "10")]
    assert [row[:3] for row in rows] == stretches * 2
    assert all(float(row[3]) > 0.3 and (row[4] == "1.5") == (row[:3] == stretches[0]) for row in rows), "the set's FVD has no column"
    assert len([button for button in page.all("button") if button == {"type": "button"}]) == 6


def test_plots_show_every_case_and_say_what_they_show(report):
    page = Page(report)
    plots = [image for image in page.all("img") if image["src"].startswith("data:image/svg")]
    assert [image["alt"].partition(",")[0] for image in plots] == [
        "FVD by variant", "CSIM by variant", "Jitter by variant", "CSIM over the frames"
    ]  # fmt: skip
    assert "short 700.0 (650.0 .. 750.0)" in plots[0]["alt"] and re.search(r"long 0\.\d+ .* in 1–10, 0\.\d+ .* in 11–20", plots[3]["alt"])
    drawings = [base64.b64decode(image["src"].partition(",")[2]).decode() for image in plots]
    dots = [len(re.findall("<use [^>]*fill-opacity: 0.5", drawing)) for drawing in drawings]
    assert dots[:3] == [0, 4, 2], "CSIM has a dot for each of two cases of two variants, FVD none"
    assert all(">long<" in drawing and (">short<" in drawing) != (number == 2) for number, drawing in enumerate(drawings))
    assert ">1–10<" in drawings[3] and ">11–20<" in drawings[3]


def test_contact_sheets_show_all_videos_at_the_same_times(report):
    page = Page(report)
    sheets = {image["alt"]: image["src"] for image in page.all("img") if image["src"].startswith("data:image/jpeg")}
    assert list(sheets)[:4] == ["Reference image of case one", "Frames of long of case one", "Frames of short of case one",
                                "Frames of ground truth of case one"]  # fmt: skip
    assert len(sheets) == 8
    rows = {name: np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).convert("RGB")).astype(float)
            for name, uri in sheets.items()}  # fmt: skip
    del rows["Reference image of case one"], rows["Reference image of case two"]
    cells = {name: [part[30:-30, 30:-30].mean() for part in np.array_split(row, MOMENTS, axis=1)] for name, row in rows.items()}
    times = (np.arange(MOMENTS) + 0.5) * 0.8 / MOMENTS
    assert cells["Frames of long of case one"] == pytest.approx(20 + STEP * 25 * times, abs=5)
    assert cells["Frames of short of case one"] == pytest.approx(20 + STEP * 25 * times, abs=5)
    assert cells["Frames of ground truth of case one"] == pytest.approx(40 + STEP * 25 * times, abs=5)
    assert "At 0.07, 0.20, 0.33, 0.47, 0.60, 0.73 s." in page.words and "2 of 2 cases" in page.words


def test_the_report_does_not_depend_on_the_order_of_the_results(pairs, report):
    first = report.read_bytes()
    found = findings(pairs)
    turned = replace(found, results=found.results[::-1], videos={"one": report.parent / "side by side/one.mp4"})
    assert write_report(report.parent, turned).read_bytes() == first


def test_a_video_that_cannot_be_read_costs_its_sheet_only(pairs, tmp_path):
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(pairs[0].generated.read_bytes()[:300])
    found = replace(findings(pairs), pairs=[replace(pairs[0], generated=broken), *pairs[1:]])
    page = Page(write_report(tmp_path, found))
    assert "No pictures: no pictures in" in page.words and "Frames of long of case two" in {image["alt"] for image in page.all("img")}
    with pytest.raises(ValueError, match="cannot write .*gone"):
        write_report(tmp_path / "gone", found)

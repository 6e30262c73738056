"""The blind user study: pages tell participants nothing that they should not know, and answers become the right percentages."""

import csv
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from html_pages import Page
from looked_at import decode, make_pairs
from media_files import run_ffmpeg

from stableavatar import ffmpeg
from stableavatar.evaluation import study
from stableavatar.evaluation.answers import count_answers
from stableavatar.evaluation.pairs import Pair
from stableavatar.evaluation.study import write_study


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> list[Pair]:
    return make_pairs(tmp_path_factory.mktemp("cases"))


@pytest.fixture(scope="module")
def written(pairs, tmp_path_factory) -> Path:
    """Folder of a study with two cases and two competitors."""
    out = tmp_path_factory.mktemp("study")
    others = [replace(pair, variant="rival") for pair in pairs if pair.variant == "short"]
    write_study(out, "long", pairs + others, seed=1)
    return out


def content(out: Path) -> dict:
    page = (out / "study/study.html").read_text(encoding="utf-8")
    return json.loads(re.search(r'<script type="application/json" id="study">(.*?)</script>', page, re.DOTALL)[1])


def test_the_page_asks_the_papers_questions_about_every_pair(written):
    page, about, key = Page(written / "study/study.html"), content(written), json.loads((written / "study_key.json").read_text())
    assert about["questions"] == study.QUESTIONS and len(page.all("fieldset")) == 4
    assert all(text in page.words for text in study.QUESTIONS.values())
    compared = {(key["cases"][trial["case"]], trial["competitor"]) for trial in key["trials"]}
    assert compared == {(case, rival) for case in ("one", "two") for rival in ("short", "rival")} and len(key["trials"]) == 4
    media = {file for trial in about["trials"].values() for file in trial.values()}
    clips = {clip for form in about["forms"] for _, *both in form for clip in both}
    assert media | clips | {"study.html"} == {path.name for path in (written / "study").iterdir()}


def test_every_form_has_all_trials_once_and_both_sides_are_as_frequent(written):
    forms, key = content(written)["forms"], json.loads((written / "study_key.json").read_text())
    ours = {trial["name"]: trial["ours"] for trial in key["trials"]}
    clips = {trial["name"]: {trial["ours"], trial["other"]} for trial in key["trials"]}
    assert len(forms) == study.FORMS
    for form in forms:
        assert sorted(trial for trial, *_ in form) == sorted(ours) and all({left, right} == clips[trial] for trial, left, right in form)
    for first, second in zip(forms[::2], forms[1::2]):
        sides = [{trial: left == ours[trial] for trial, left, _ in form} for form in (first, second)]
        assert all(sides[0][trial] != sides[1][trial] for trial in ours)
    assert len({str(form) for form in forms}) > study.FORMS // 2, "orders differ"


def test_nothing_that_participants_get_tells_the_models_apart(written, pairs):
    texts = [path.name for path in (written / "study").iterdir()] + [(written / "study/study.html").read_text()]
    assert not any(re.search(r"\blong\b|\bshort\b|\brival\b|\bone\b.mp4|/tmp", text) for text in texts)
    key = json.loads((written / "study_key.json").read_text())
    trial = next(trial for trial in key["trials"] if trial["competitor"] == "short")
    headers = []
    for clip, source in ((trial["ours"], pairs[0]), (trial["other"], pairs[2])):
        path = written / "study" / clip
        assert (decode(path) == decode(source.generated)).all(), "the pictures are the same, not encoded again"
        assert "Audio: aac" in ffmpeg.header(path, "video"), "a video without sound has that of the case"
        headers.append(re.findall(r"comment|variant|title", ffmpeg.header(path, "video")))
    assert headers == [[], []]


def test_the_seed_decides_the_study(pairs, tmp_path, monkeypatch):
    monkeypatch.setattr(study, "_write_case", lambda *arguments: None)
    for name, seed in (("a", 0), ("b", 0), ("c", 3)):
        write_study(tmp_path / name, "long", pairs, seed)
    read = [(tmp_path / name / "study_key.json").read_text() + str(content(tmp_path / name)) for name in "abc"]
    assert read[0] == read[1] != read[2]
    write_study(tmp_path / "few", "long", pairs, videos=1)
    assert len(content(tmp_path / "few")["trials"]) == 1
    with pytest.raises(ValueError, match="no case has a video of 'best' and one of another variant; got .*long"):
        write_study(tmp_path / "none", "best", pairs)


def test_a_video_that_browsers_do_not_play_is_refused(pairs, tmp_path):
    odd = tmp_path / "odd.mp4"
    run_ffmpeg("-i", str(pairs[0].generated), "-c:v", "mpeg4", str(odd))
    with pytest.raises(ValueError, match="odd.mp4 is not H.264"):
        write_study(tmp_path / "out", "long", [replace(pairs[0], generated=odd), pairs[2]])
    assert not (tmp_path / "out/study").exists() and not (tmp_path / "out/study_key.json").exists()


def answers_of(out: Path, participant: str, prefer: dict[str, float]) -> dict:
    """What the page exports for a participant who prefers ours to each competitor in a part of the trials."""
    key = json.loads((out / "study_key.json").read_text())
    answers = []
    for competitor, part in prefer.items():
        asked = [(trial, question) for trial in key["trials"] if trial["competitor"] == competitor for question in key["questions"]]
        for place, (trial, question) in enumerate(sorted(asked, key=lambda item: item[1])):
            choice = trial["ours"] if place < part * len(asked) else trial["other"]
            answers.append({"trial": trial["name"], "question": question, "choice": choice})
    return {"study": key["study"], "participant": participant, "form": 0, "answers": answers}


def export(folder: Path, exported: dict, kind: str = "json") -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / f"{exported['participant']}.{kind}"
    if kind == "json":
        path.write_text(json.dumps(exported))
    else:
        rows = [[exported["study"], exported["participant"], *answer.values()] for answer in exported["answers"]]
        with path.open("w", newline="") as file:
            csv.writer(file, quoting=csv.QUOTE_ALL).writerows([["study", "participant", "trial", "question", "choice"], *rows])
    return path


def test_answers_become_percentages(written, tmp_path):
    export(tmp_path / "in", answers_of(written, "Ann", {"short": 1, "rival": 0.5}))
    export(tmp_path / "in", answers_of(written, "Ann", {"short": 1}), "csv")  # saved before she was done
    export(tmp_path / "in", answers_of(written, 'B, "ob"', {"short": 1, "rival": 0}), "csv")
    export(tmp_path / "in", answers_of(written, "Zoë", {"short": 0}))
    counted = count_answers(tmp_path / "in", written / "study_key.json", tmp_path / "out")
    found = {(item.competitor, item.question): item for item in counted}
    assert {key: (item.share.mean, item.share.count, item.participants) for key, item in found.items()} == {
        **{("short", question): (pytest.approx(2 / 3), 6, 3) for question in study.QUESTIONS},
        **{("rival", question): (0.5 * (question in ("A-A", "B-A")), 4, 2) for question in study.QUESTIONS},
    }
    assert all(0 <= item.share.low <= item.share.mean <= item.share.high <= 1 for item in found.values())
    table = (tmp_path / "out/preferences.md").read_text()
    assert table.startswith("| preferred to | L-A | A-A | B-A | I-A |\n")
    assert "| short | 66.7 % (" in table and "up to 3 participants" in table
    rows = list(csv.DictReader((tmp_path / "out/preferences.csv").open()))
    assert len(rows) == 8 and rows[0]["percent"] == "66.7" and rows[0]["participants"] == "3"


def test_answers_that_cannot_be_counted_are_named(written, tmp_path):
    key, good = written / "study_key.json", answers_of(written, "Ann", {"short": 1})

    def count(name: str, *exports: dict) -> None:
        for number, exported in enumerate(exports):
            export(tmp_path / name, exported).rename(tmp_path / name / f"{number}.json")
        count_answers(tmp_path / name, key, tmp_path)

    with pytest.raises(ValueError, match="0.json answers study 'other'"):
        count("study", good | {"study": "other"})
    with pytest.raises(ValueError, match="participant 'Ann' answered .-A of .* differently in .*0.json and .*1.json"):
        count("twice", good, answers_of(written, "Ann", {"short": 0}))
    with pytest.raises(ValueError, match="which the study does not have"):
        count("clip", good | {"answers": [good["answers"][0] | {"choice": "clip_999.mp4"}]})
    with pytest.raises(ValueError, match="an answer of nobody"):
        count("nobody", good | {"participant": ""})
    with pytest.raises(ValueError, match="cannot read answers from .*0.json"):
        count("odd", {"participant": "Ann"})
    with pytest.raises(ValueError, match="no answers in"):
        count_answers(tmp_path / "empty", key, tmp_path)
    with pytest.raises(ValueError, match="is not the key of a study"):
        count_answers(tmp_path / "study", export(tmp_path / "key", {"participant": "x"}), tmp_path)

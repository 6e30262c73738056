"""Published rows as they were printed, and the tables that show them beside what was measured."""

import csv
import io
from dataclasses import replace
from pathlib import Path

import pytest

from stableavatar.evaluation.findings import Findings
from stableavatar.evaluation.metrics import METRICS
from stableavatar.evaluation.pairs import Pair, Problem, Result
from stableavatar.evaluation.published import PublishedRow, read_published
from stableavatar.evaluation.statistics import Interval
from stableavatar.evaluation.tables import table_rows, write_tables

PUBLISHED = Path(__file__).parents[1] / "configs" / "evaluation" / "published"


def table(name: str, test_set: str = "") -> dict[str, PublishedRow]:
    return {row.name: row for row in read_published(str(PUBLISHED / f"{name}.yaml"), test_set)}


def test_the_tables_agree_with_each_other_as_they_do_in_the_paper():
    long, others = table("stableavatar_table_1", "Long100"), table("stableavatar_table_9")
    for name, row in others.items():
        assert {metric: row.values[metric] for metric in ("csim", "sync_c", "sync_d")} == {
            metric: long[name].values[metric] for metric in ("csim", "sync_c", "sync_d")}  # fmt: skip
    two, three = table("stableavatar_table_2"), table("stableavatar_table_3")
    assert two["w/o Audio Adapter"].values == three["w/o Audio Adapter"].values
    assert two["StableAvatar"].values == three["StableAvatar"].values == {
        metric: value for metric, value in long["StableAvatar"].values.items() if metric != "fid"}  # fmt: skip
    ours = [table(f"stableavatar_table_{number}")["StableAvatar"].values for number in (5, 6, 8)]
    assert ours[0] == ours[1] == ours[2] != two["StableAvatar"].values
    assert two["w/o Guidance"].values == table("stableavatar_table_5")["w/o Guidance"].values


def test_the_gains_that_the_papers_state_follow_from_their_rows():
    """StableAvatar against OmniAvatar: 80.3 % and 85.2 % more CSIM and Sync-C on Long100 (4.2), half the memory, a tenth of the time."""
    rows = table("stableavatar_table_1", "Long100")
    for metric, gain in (("csim", 80.3), ("sync_c", 85.2)):
        assert 100 * (rows["StableAvatar"].values[metric] / rows["OmniAvatar"].values[metric] - 1) == pytest.approx(gain, abs=0.06)
    nine = table("stableavatar_table_9")
    assert nine["StableAvatar"].values["peak_memory"] / nine["OmniAvatar"].values["peak_memory"] == pytest.approx(0.5, abs=0.06)
    assert nine["OmniAvatar"].values["minutes"] / nine["StableAvatar"].values["minutes"] == pytest.approx(10, rel=0.15)


def test_whose_figures_a_row_has_is_said():
    for path in PUBLISHED.glob("stableavatar_*.yaml"):
        assert {row.note for row in read_published(str(path))} == {"published, other weights"}, path
    for name in ("live_avatar_table_2", "live_avatar_table_8"):
        notes = {row.name: row.note for row in read_published(str(PUBLISHED / f"{name}.yaml"))}
        assert notes.pop("StableAvatar") == "published, the released weights measured by others"
        assert set(notes.values()) == {"published, another model"}
    assert len(table("stableavatar_table_1", "HDTF")) == 10 and len(read_published(str(PUBLISHED / "longcat_table_1.yaml"), "EMTD")) == 5


@pytest.mark.parametrize("path", sorted(PUBLISHED.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_published_file_names_known_metrics_and_its_source(path):
    for row in read_published(str(path)):
        assert row.source and row.note and row.values and row.values.keys() <= METRICS.keys()
        assert all(float(row.texts[metric]) == value for metric, value in row.values.items())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{name: a, values: 1 2 3}", "must have a name and 2 values"),
        ("{values: 1 2}", "must have a name and 2 values"),
        ("{name: a, values: 1 2, colour: red}", "must have a name and 2 values"),
        ("{name: a, values: 1 two}", "must have numbers"),
        ("{name: a, values: 1 2, frames: 9-3}", "ranges are written"),
    ],
)
def test_a_wrong_row_is_named(tmp_path, text, message):
    path = tmp_path / "a.yaml"
    path.write_text(f"source: s\nnote: n\ncolumns: fid fvd\nrows:\n  - {text}\n")
    with pytest.raises(ValueError, match=message):
        read_published(str(path))


def pair(name: str, variant: str) -> Pair:
    return Pair(name, variant, 0, Path(f"{variant}/{name}.mp4"), Path(f"{name}.wav"), None, None, ())


@pytest.fixture
def findings():
    pairs = [pair(name, variant) for variant in ("cfg", "ours") for name in "abc"]
    results = [Result("csim", one.variant, 0.5 + 0.1 * number, one) for number, one in enumerate(pairs)]
    metrics = {name: METRICS[name] for name in ("fvd", "csim", "iqa")}
    sets = {(variant, "fvd", None): Interval(504.0, 480.0, 528.0, 3) for variant in ("cfg", "ours")}
    return Findings(title="T_1 & 50 %", about="About.", metrics=metrics, results=results, pairs=pairs, reference="cfg", sets=sets,
                    absent={"iqa": "absent: give weights.qalign=FOLDER"}, problems=[Problem(Path("ours/d.mp4"), "short: 3 frames", "ours")],
                    published=ROWS, missing={"trained": "absent: give transformers=trained=FILE"})  # fmt: skip


ROWS = [
    PublishedRow("Paper's", {"fvd": 504.0}, {"fvd": "504"}, "P, table 1", "published, other weights", variant="ours"),
    PublishedRow("Other | system", {"csim": 0.8}, {"csim": "0.80"}, "P, table 1", "published, other weights"),
]


def test_rows_published_digits_counts_and_what_is_absent(findings):
    rows = table_rows(findings)
    assert [row.name for row in rows] == ["Other | system", "cfg", "Paper's", "ours", "trained"]
    assert rows[0].cells == {"fvd": "–", "csim": "0.80", "iqa": "–"} and rows[2].cells["fvd"] == "504"
    assert rows[3].cells["fvd"].startswith("504.0 (480.0 .. 528.0)") and rows[3].cells["iqa"] == "absent"
    assert (rows[3].videos, rows[3].excluded) == (3, 1) and set(rows[4].cells.values()) == {"absent"}


def test_the_files_say_the_same(findings, tmp_path):
    write_tables(tmp_path, findings)
    text, latex = (tmp_path / "table.md").read_text(), (tmp_path / "table.tex").read_text()
    assert r"| Other \| system | – | 0.80 | – |" in text and "published, other weights [1]" in text and "[1] P, table 1" in text
    assert "| ours | CSIM | +0.300 (+0.300 .. +0.300) | 3 |" in text
    assert "- iqa: absent: give weights.qalign" in text and "- ours/d.mp4: short: 3 frames" in text
    assert r"T\_1 \& 50 \%" in latex and r"FVD $\downarrow$" in latex and r"\toprule" in latex and "_1" not in latex.replace(r"\_1", "")
    lines = list(csv.DictReader(io.StringIO((tmp_path / "table.csv").read_text())))
    values = {(line["method"], line["metric"]): line["value"] for line in lines}
    assert float(values["ours", "csim"]) == pytest.approx(0.9) and float(values["Paper's", "fvd"]) == 504 and values["ours", "iqa"] == ""
    assert len((tmp_path / "values.csv").read_text().splitlines()) == 1 + 6


def test_stretches_are_rows_of_their_own(findings):
    one = findings.pairs[0]
    results = [Result("csim", "cfg", 0.9, one, (0, 200)), Result("csim", "cfg", 0.7, one, (3499, 3700))]
    published = [PublishedRow("Baseline", {"csim": 0.836}, {"csim": "0.836"}, "P", "published", frames=(0, 200), variant="cfg")]
    own = {"results": results, "sets": {}, "pairs": [one], "problems": [], "missing": {}, "published": published}
    rows = table_rows(replace(findings, **own))
    cells = [(row.name, row.cells["csim"]) for row in rows]
    assert cells == [("Baseline (1–200)", "0.836"), ("cfg (1–200)", "0.900"), ("cfg (3500–3700)", "0.700")]

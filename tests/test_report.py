"""The line of a step, the files of a run's figures, the peak of a device, and the picture of a loss curve."""

import json
import logging
import math
import re
import time

import plot_run
import pytest
import torch
from PIL import Image

from stableavatar.data.samples import Bucket
from stableavatar.machine import DATA_SHEET, MEASURED, SET, Peak, data_sheet_tflops, peak_bytes, peak_of
from stableavatar.training import report as module
from stableavatar.training.config import LogConfig
from stableavatar.training.report import METRICS_FILE, Report, Workers, format_step, read_metrics

CPU = torch.device("cpu")
BUCKET = Bucket(64, 64, 9)
LOSSES = {"loss": 0.1234, "velocity": 0.1, "masked": 0.14}


@pytest.fixture
def make_report(tmp_path):
    """make(first, **settings of the log) for a run of 3000 steps by two processes."""
    reports = []

    def make(first=0, folder=tmp_path, **changes):
        config = LogConfig(**{"tensorboard": False, "peak_tflops": 312.0} | changes)
        reports.append(Report(config, folder, {BUCKET: 7e12}, Workers(CPU, torch.bfloat16, 2), first, 3000))
        return reports[-1]

    yield make
    for report in reports:
        report.close()


def tell(report, step, **losses):
    report.step(step, 0, LOSSES | losses, 0.32, 1e-5, tokens=14_200, flops=2.42e14)


def test_a_line_says_all_that_matters():
    values = {"epoch": 0, **LOSSES, "gradient_norm": 0.32, "lr": 1e-5, "seconds": 2.0, "seconds_per_step": 2.31}
    values |= {"tokens_per_second": 14_183.0, "tflops": 121.4, "share_of_peak": 0.389, "memory_gib": 41.23}
    line = format_step(120, 3000, values, DATA_SHEET)
    assert line == (
        "step 120/3000  loss 0.1234 (velocity 0.1, masked 0.14)  grad 0.32  lr 1.0e-05  2.31 s/step  14.2k tok/s"
        "  121 TFLOP/s (39 %)  41.2 GiB  left 1:50:53"
    )
    assert "(39 % of measured matmul rate)" in format_step(120, 3000, values, MEASURED)


def test_lines_appear_as_often_as_asked_and_figures_at_every_step(make_report, caplog, tmp_path):
    caplog.set_level(logging.INFO)
    report = make_report(every=2)
    for step in range(1, 6):
        tell(report, step)
    assert re.findall(r"step (\d+)/3000", caplog.text) == ["2", "4"]
    assert [line["step"] for line in read_metrics(tmp_path / METRICS_FILE)] == [1, 2, 3, 4, 5]


def test_rates_are_of_the_time_between_steps(make_report, tmp_path):
    report = make_report()
    time.sleep(0.2)
    with report.paused():
        time.sleep(0.5)
    tell(report, 1)
    line = read_metrics(tmp_path / METRICS_FILE)[0]
    assert 0.2 <= line["seconds"] < 0.45
    assert line["tokens_per_second"] == pytest.approx(14_200 / line["seconds"])
    assert line["tflops"] == pytest.approx(121 / line["seconds"])  # of one of two processes
    assert line["share_of_peak"] == pytest.approx(line["tflops"] / 312)
    assert line["memory_gib"] == pytest.approx(peak_bytes(CPU) / 2**30, rel=0.1)


def test_speed_is_the_mean_of_recent_steps(make_report, monkeypatch, tmp_path):
    clock = iter([0.0, 100.0, *(100.0 + n for n in range(1, 21))])
    monkeypatch.setattr(module.time, "perf_counter", lambda: next(clock))
    report = make_report()
    for step in range(1, 22):
        tell(report, step)
    means = [line["seconds_per_step"] for line in read_metrics(tmp_path / METRICS_FILE)]
    assert means[0] == 100 and means[1] == 50.5 and means[-1] == 1


def test_going_on_drops_what_was_written_of_later_steps(make_report, tmp_path):
    path, third = tmp_path / METRICS_FILE, 1 / 3
    report = make_report()
    for step in range(1, 6):
        tell(report, step, loss=third * step)
    report.validation(3, 0.25)
    report.close()
    with path.open("a") as file:
        file.write('{"step": 6, "lo')  # killed while it wrote
    tell(make_report(first=3), 4, loss=math.pi)
    lines = read_metrics(path)
    assert [line["step"] for line in lines] == [1, 2, 3, 3, 4]
    assert [line.get("loss") for line in lines] == [third, third * 2, third * 3, None, math.pi]
    assert lines[3] == {"step": 3, "validation_loss": 0.25}
    make_report(first=0)
    assert read_metrics(path) == [] and list(tmp_path.iterdir()) == [path]


def test_other_processes_write_nothing(make_report, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    report = make_report(folder=None, tensorboard=True)
    tell(report, 1)
    report.validation(1, 0.5)
    assert report.flops(BUCKET) == 7e12
    assert caplog.text == "" and list(tmp_path.iterdir()) == []


def test_tensorboard_has_the_same_figures(make_report, tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    report = make_report(tensorboard=True)
    tell(report, 1)
    tell(report, 2, loss=0.5)
    report.close()
    curves = events.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in curves.Scalars("loss")] == [(1, pytest.approx(0.1234)), (2, 0.5)]
    assert "velocity" in curves.Tags()["scalars"]


def test_a_missing_tensorboard_is_a_warning_and_a_missing_wandb_a_mistake(make_report, monkeypatch, caplog, tmp_path):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    tell(make_report(tensorboard=True), 1)
    assert caplog.text.count("tensorboard is not installed") == 1
    assert [path.name for path in tmp_path.iterdir()] == [METRICS_FILE]
    with pytest.raises(ValueError, match="log.wandb=avatars needs wandb"):
        make_report(wandb="avatars")


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H200", 989),
        ("NVIDIA H20", 148), ("NVIDIA L40S", 362), ("NVIDIA L40", 181),
        ("NVIDIA GeForce RTX 4090", 165), ("NVIDIA A10", 125), ("Tesla T4", None), ("", None),
    ],
)  # fmt: skip
def test_data_sheets(name, tflops):
    assert data_sheet_tflops(name) == tflops


def test_the_peak_is_set_or_measured():
    assert peak_of(CPU, torch.float32, 5.0) == Peak(5e12, SET)
    measured = peak_of(CPU, torch.float32)
    assert measured.source == MEASURED and 1e8 < measured.flops < 1e14


def test_a_picture_of_two_runs(tmp_path, capsys):
    for name, shift in (("first", 0.0), ("second", 0.2)):
        (tmp_path / name).mkdir()
        lines = [{"step": step, "loss": 1 / step + shift} for step in range(1, 30)] + [{"step": 29, "validation_loss": 0.3}]
        (tmp_path / name / METRICS_FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))
    out = tmp_path / "out.png"
    assert plot_run.main([str(tmp_path / "first"), str(tmp_path / "second" / METRICS_FILE), str(out)]) == 0
    with Image.open(out) as picture:
        assert picture.width > 500
        assert len(picture.convert("RGB").getcolors(10**6)) > 10
    assert plot_run.main([str(tmp_path / "first"), str(out), "--key", "lss"]) == 2
    assert "it has loss, validation_loss" in capsys.readouterr().err
    assert plot_run.main([str(tmp_path / "first"), str(tmp_path / "second")]) == 2


def test_smoothing_keeps_a_constant_and_starts_at_the_first_value():
    assert plot_run.smoothed([2.0, 2.0, 2.0], 0.9) == pytest.approx([2.0, 2.0, 2.0])
    assert plot_run.smoothed([1.0, 3.0], 0.5) == pytest.approx([1.0, 7 / 3])
    assert plot_run.smoothed([1.0, 3.0], 0.0) == [1.0, 3.0]

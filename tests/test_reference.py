"""The reference vectors pass, and the tool that runs them notices what does not."""

import json
import math
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT.parent / "shared" / "reference"

sys.path.insert(0, str(ROOT / "scripts"))

from verify_reference import check_folder, main, relative_error  # noqa: E402

needs_folder = pytest.mark.skipif(not FOLDER.is_dir(), reason="reference folder is absent")


@needs_folder
def test_every_vector_is_reproduced() -> None:
    with torch.no_grad():
        rows = dict(check_folder(FOLDER))
    assert {row.split(".")[0] for row in rows} == json.loads((FOLDER / "cases.json").read_text()).keys()
    assert {row: error for row, error in rows.items() if not error <= 1e-5} == {}


def part_of(folder: Path, name: str) -> dict:
    """Copies one model's files to a folder; gives its entry of cases.json."""
    for file in FOLDER.glob(f"{name}.*"):
        shutil.copyfile(file, folder / file.name)
    return json.loads((FOLDER / "cases.json").read_text())[name]


@needs_folder
def test_a_folder_may_hold_any_part_and_a_wrong_number_gives_exit_code_1(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    spec = part_of(tmp_path, "transformer_14b") | {"cases": {"base": {}}}
    (tmp_path / "cases.json").write_text(json.dumps({"transformer_14b": spec}))
    assert main([str(tmp_path)]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [
        *(f"transformer_14b.base.{tensor}" for tensor in ("output", "audio_tokens", "audio_lens")),
        "worst",
    ]
    io = load_file(tmp_path / "transformer_14b.io.safetensors")
    io["base.output"][0, 0, 0, 0, 0] += 1e-3 * io["base.output"].abs().max()
    save_file(io, tmp_path / "transformer_14b.io.safetensors")
    assert main([str(tmp_path)]) == 1
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines() if "FAILED" in line] == ["transformer_14b.base.output"]


@needs_folder
def test_missing_and_damaged_files_are_one_line_and_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    spec = part_of(tmp_path, "umt5")
    cases = tmp_path / "cases.json"
    contents = [None, "{", "{}", "[]", '{"other": {}}', '{"vae": {}}']
    for content in contents:
        if content:
            cases.write_text(content)
        assert refusal(tmp_path, capsys)
    cases.write_text(json.dumps({"umt5": spec}))
    io = load_file(tmp_path / "umt5.io.safetensors")
    save_file({name: tensor for name, tensor in io.items() if name != "output"}, tmp_path / "umt5.io.safetensors")
    assert "no tensor 'output'" in refusal(tmp_path, capsys)
    weights = tmp_path / "umt5.weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    assert "truncated" in refusal(tmp_path, capsys)


def refusal(folder: Path, capsys: pytest.CaptureFixture) -> str:
    """The one line that the tool says of a bad folder."""
    assert main([str(folder)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_relative_error_never_hides_a_difference() -> None:
    ones = torch.ones(3)
    assert relative_error(ones * 2.5, ones * 2) == 0.25
    assert relative_error(ones, torch.ones(2)) == math.inf
    assert math.isnan(relative_error(ones * math.nan, ones))
    assert relative_error(ones, torch.zeros(3)) > 1e30
    assert relative_error(torch.zeros(3), torch.zeros(3)) == 0

"""Files and folders that are there whole or not at all."""

import json

import pytest

from stableavatar.files import filling, write_json


def test_a_folder_is_filled_once_all_is_written(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "state.pt").write_text("kept")
    (folder / "config.json").write_text("old")
    with pytest.raises(RuntimeError, match="stopped"), filling(folder) as part:
        (part / "config.json").write_text("new")
        raise RuntimeError("stopped")
    assert (folder / "config.json").read_text() == "old" and list(tmp_path.iterdir()) == [folder]
    (tmp_path / "model.partial").mkdir()
    (tmp_path / "model.partial/leftover").write_text("of a killed run")
    with filling(folder) as part:
        for name in ("config.json", "weights"):
            (part / name).write_text("new")
        assert (folder / "config.json").read_text() == "old"
    assert {path.name: path.read_text() for path in folder.iterdir()} == {"state.pt": "kept", "config.json": "new", "weights": "new"}
    assert list(tmp_path.iterdir()) == [folder]


def test_a_new_folder_is_made(tmp_path):
    with filling(tmp_path / "a/model") as part:
        write_json(part / "figures.json", {"one": None})
    write_json(tmp_path / "b/figures.json", [1])
    assert json.loads((tmp_path / "a/model/figures.json").read_text()) == {"one": None}
    assert json.loads((tmp_path / "b/figures.json").read_text()) == [1]

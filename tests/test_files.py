"""Files and folders that are there whole or not at all."""

import json
import shutil
import signal
from pathlib import Path

import pytest

from stableavatar.files import filling, replacing, write_json


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


@pytest.mark.parametrize("writing", [replacing, filling])
def test_a_signal_waits_until_all_is_tidied(tmp_path, monkeypatch, writing):
    """As when a process has failed and is told to end before it has cleaned up."""
    remove = {replacing: (Path, "unlink"), filling: (shutil, "rmtree")}[writing]
    with pytest.raises(KeyboardInterrupt), writing(tmp_path / "out") as part:
        (part / "weights" if writing is filling else part).write_text("half")
        monkeypatch.setattr(*remove, interrupted(getattr(*remove)))
        raise RuntimeError("another process has ended")
    monkeypatch.undo()
    assert not list(tmp_path.iterdir())
    with pytest.raises(KeyboardInterrupt):  # as before
        signal.raise_signal(signal.SIGINT)


def interrupted(call):
    """`call`, reached by a signal before it has done anything."""

    def signalled(*args, **options):
        signal.raise_signal(signal.SIGINT)
        return call(*args, **options)

    return signalled

"""Files that are there whole, or not at all."""

from __future__ import annotations

import os
import pathlib

import pytest

from jax_privacy_kernels._files import write_whole


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "report.json"
    for data in (b"first", b"", b"second"):
        write_whole(path, data)
        assert path.read_bytes() == data
    assert os.listdir(tmp_path) == ["report.json"]


@pytest.mark.parametrize("failing", ["write_bytes", "replace"])
def test_an_interrupt_leaves_what_was_there(tmp_path, monkeypatch, failing):
    path = tmp_path / "report.json"
    path.write_bytes(b"before")

    def interrupted(self, data):
        if failing == "write_bytes":
            with self.open("wb") as file:
                file.write(data[:2])
        raise KeyboardInterrupt

    monkeypatch.setattr(pathlib.Path, failing, interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_whole(path, b"after")
    monkeypatch.undo()
    assert path.read_bytes() == b"before"
    assert os.listdir(tmp_path) == ["report.json"]


def test_links_stay(tmp_path):
    (tmp_path / "real.png").write_bytes(b"before")
    link = tmp_path / "link.png"
    link.symlink_to("real.png")
    write_whole(link, b"after")
    assert link.is_symlink()
    assert (tmp_path / "real.png").read_bytes() == b"after"


def test_devices_are_written_to():
    write_whole(pathlib.Path(os.devnull), b"nothing")
    assert not pathlib.Path(os.devnull).is_file()


def test_a_folder_that_is_missing_is_told(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_whole(tmp_path / "missing" / "report.json", b"")

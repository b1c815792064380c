"""Files that are written whole: what a killed process left behind goes, what others write stays."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pathcli.data import outputs
from pathcli.data.outputs import whole


def test_temporaries_of_dead_processes_go_and_those_of_others_stay(tmp_path: Path) -> None:
    path, here = tmp_path / "a[1].json", outputs._HERE
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    left = tmp_path / f".a[1].json.{here}-{dead.pid}.part"
    alive = tmp_path / f".a[1].json.{here}-{os.getppid()}.part"
    elsewhere = tmp_path / f".a[1].json.another-{dead.pid}.part"
    stale = tmp_path / f".a[1].json.another-{os.getpid()}.part"
    other = tmp_path / f".b.json.{here}-{dead.pid}.part"
    for each in (left, alive, elsewhere, stale, other):
        each.touch()
    os.utime(stale, (0, 0))
    with whole(path) as part:
        part.write_text("x")
    assert {*tmp_path.iterdir()} == {path, alive, elsewhere, other}
    assert path.read_text() == "x"


def test_a_folder_that_was_left_goes_too(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    left = tmp_path / f".shards.{outputs._HERE}-{dead.pid}.part"
    left.mkdir()
    (left / "000000.tar").touch()
    with pytest.raises(ValueError, match="stop"), whole(tmp_path / "shards") as part:
        _stopped(part)
    assert not [*tmp_path.iterdir()]


def _stopped(folder: Path) -> None:
    folder.mkdir()
    raise ValueError("stop")

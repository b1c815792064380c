"""What `pathcli tile --save-pixels` says, and how far reading runs ahead."""

import time
from pathlib import Path

import pytest
from conftest import Run

from pathcli.slides import pixels
from pathcli.store import Store

# --- the command -------------------------------------------------------------------------


def test_the_table_says_what_was_saved_and_what_was_there(slide_path: Path, run: Run) -> None:
    for words in ("35 as webdataset", "there already"):
        options = ("--size", 100, "--no-overview", "--save-pixels", "webdataset")
        code, out, err = run("tile", slide_path, *options)
        assert (code, words in out) == (0, True), out
        assert "pixels are in pathcli-out/pixels" in err


@pytest.mark.parametrize(
    "options",
    [
        ("--save-pixels", "zar"),
        ("--pixels-out", "x"),
        ("--pixels-format", "jpeg:90"),
        ("--save-pixels", "zarr", "--pixels-format", "jpeg:90"),
    ],
)
def test_options_of_pixels_that_do_not_fit_are_refused(
    slide_path: Path, run: Run, options: tuple[str, ...]
) -> None:
    code, _, err = run("tile", slide_path, *options)
    assert code == 2
    assert "--save-pixels" in err
    assert not len(Store().tiles)


def test_queued_reads_are_bounded() -> None:
    started = []

    def work(row: int) -> int:
        started.append(row)
        time.sleep(0.001 * (row % 3))
        return row

    ahead = []
    for row in pixels.in_order(work, range(200), 2):
        ahead.append(len(started) - row)
        assert row == len(ahead) - 1
    assert max(ahead) <= 2 * pixels._AHEAD + 2

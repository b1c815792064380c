"""Pickles of questions: plain values are read, and nothing is ever run."""

from __future__ import annotations

import datetime as dt
import pickle
from pathlib import Path

import pytest

from pathcli.data.formats.vqa import records
from pathcli.errors import DataError, ResourceError


class _Calls:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (Path(self.path),)  # type: ignore[return-value]


@pytest.mark.parametrize("protocol", range(6))
def test_a_pickle_that_would_run_something_is_refused(tmp_path: Path, protocol: int) -> None:
    path, mark = tmp_path / "x.pkl", tmp_path / "ran"
    path.write_bytes(pickle.dumps([{"img_id": _Calls(str(mark))}], protocol))
    with pytest.raises(DataError, match=r"x\.pkl: not a pickle of .*it asks for .*could run"):
        list(records(path))
    assert not mark.exists()
    for other in (dt.date(2020, 1, 1), eval, int, getattr):
        path.write_bytes(pickle.dumps([{"img_id": other}], protocol))
        with pytest.raises(DataError, match="it asks for"):
            list(records(path))
    plain = [{"IMG_ID": "a", "label": {"b": 1.5}, "sets": {1, 2}, "t": (None, True, b"x")}]
    path.write_bytes(pickle.dumps(plain, protocol))
    if protocol > 2:  # before, bytes were made by calling an encoder
        assert list(records(path)) == [{"img_id": "a", **{k: plain[0][k] for k in [*plain[0]][1:]}}]


def test_damaged_and_other_pickles_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.pkl"
    data = pickle.dumps([{"img_id": "train_0000", "sent": "Where?", "label": {"a": 1}}])
    for broken in (data[:-9], b"", b"text", data[:20] + b"\xff" + data[21:]):
        path.write_bytes(broken)
        with pytest.raises(DataError, match=r"x\.pkl: not a (whole )?pickle"):
            list(records(path))
    path.write_bytes(pickle.dumps({"what is it": "ans"}))
    with pytest.raises(DataError, match="a list of records, not a dict"):
        list(records(path))
    with pytest.raises(ResourceError, match="cannot be read"):
        list(records(tmp_path / "gone.pkl"))

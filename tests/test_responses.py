"""Kept answers: found again, by others too, whatever a dying process left behind."""

from __future__ import annotations

import json
import multiprocessing
import threading
from pathlib import Path

import pytest

from pathcli.errors import ResourceError, UsageError
from pathcli.store.responses import Responses, response_key


def test_an_answer_is_found_again_by_the_same_and_by_a_later_reader(tmp_path: Path) -> None:
    path = tmp_path / "new" / "responses.jsonl"
    kept = Responses(path)
    assert kept.get("a") is None
    assert not path.parent.exists()
    kept.put("a", "yes\nno “é”", tokens=3)
    kept.put("b", "")
    assert kept.get("a") == Responses(path).get("a") == "yes\nno “é”"
    assert Responses(path).get("b") == ""
    assert json.loads(path.read_text().splitlines()[0])["tokens"] == 3
    kept.put("a", "changed")
    assert Responses(path).get("a") == "changed"
    assert len(path.read_text().splitlines()) == 3


def test_half_a_line_is_passed_over_and_what_follows_is_whole(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "responses.jsonl"
    Responses(path).put("a", "one")
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"key": "b", "te')
    kept = Responses(path)
    assert "1 lines" in caplog.text
    assert (kept.get("a"), kept.get("b")) == ("one", None)
    kept.put("c", "three")
    again = Responses(path)
    assert (again.get("a"), again.get("b"), again.get("c")) == ("one", None, "three")
    assert path.read_bytes().startswith(whole)


def test_lines_that_are_no_answers_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "responses.jsonl"
    path.write_bytes(
        b'\xff\n[1]\n{"key": "x"}\n{"key": [], "text": "t"}\n{"key": "a", "text": "b"}\n'
    )
    assert Responses(path).get("a") == "b"
    assert Responses(path).get("x") is None


def _write(path: str, who: int) -> None:
    kept = Responses(Path(path))
    for i in range(20):
        kept.put(f"{who}-{i}", f"{who}" * 2000)


def test_processes_and_threads_write_one_file_and_no_line_is_lost(tmp_path: Path) -> None:
    path = tmp_path / "responses.jsonl"
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_write, args=(str(path), n)) for n in range(3)]
    kept = Responses(path)
    threads = [
        threading.Thread(target=lambda n=n: [kept.put(f"t{n}-{i}", "x" * 500) for i in range(20)])
        for n in range(3)
    ]
    for worker in [*processes, *threads]:
        worker.start()
    for worker in [*processes, *threads]:
        worker.join()
    lines = [json.loads(line) for line in path.read_text().splitlines() if line]
    assert len({line["key"] for line in lines}) == len(lines) == 120
    assert all(Responses(path).get(line["key"]) == line["text"] for line in lines[::20])


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="a file is where a folder is needed"):
        Responses(tmp_path / "file" / "responses.jsonl").put("a", "b")
    with pytest.raises(ResourceError, match="--out"):
        Responses(Path("/proc/nowhere/responses.jsonl")).put("a", "b")


def test_the_borders_of_a_keys_parts_count() -> None:
    keys = {response_key("ab", "c"), response_key("a", "bc"), response_key("abc")}
    assert len(keys) == 3
    assert response_key("ab", "c") in keys
    assert all(len(key) == 64 for key in keys)

"""Answers that were given once are kept: one JSON object a line, found again by its key.

Several processes may append to one file: each line is written by one `write` on a file opened
for appending. A process that died in the middle of a line leaves half of one; the next writer
ends it and readers pass it over, as they do empty lines, so that nothing another process wrote
is ever cut off.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
from typing import TYPE_CHECKING, Any

from pathcli.store.files import disk_errors

if TYPE_CHECKING:
    from pathlib import Path

log = logging.getLogger("pathcli")


def response_key(*parts: str) -> str:
    """Return the SHA-256 of `parts`, whose borders count: ("ab", "c") is not ("a", "bc")."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


class Responses:
    """A JSONL file of answers, each `{key, text, ...facts}`; of two of one key the last counts.

    The fact `fault` is what was wrong with an answer: cut off, say.
    """

    def __init__(self, path: Path) -> None:
        """Read what `path` holds; the file and its folder are made when first written.

        Raises:
            ResourceError: it may not be read.
        """
        self.path = path
        self._turn = threading.Lock()
        self._texts: dict[str, str] = {}
        self._faults: dict[str, str] = {}
        with disk_errors(path, "--out"):
            if path.exists():
                self._read()

    def get(self, key: str) -> str | None:
        """Return the answer kept under `key`, None if there is none."""
        return self._texts.get(key)

    def fault(self, key: str) -> str:
        """Return what was wrong with the answer kept under `key`, "" for nothing."""
        return self._faults.get(key, "")

    def put(self, key: str, text: str, **facts: Any) -> None:  # noqa: ANN401 - any JSON value
        """Append an answer, and whatever else should stand in its line, at once.

        Raises:
            ResourceError: the disk is full, or the folder may not be written.
        """
        line = (json.dumps({"key": key, "text": text, **facts}) + "\n").encode()
        with self._turn, disk_errors(self.path, "--out"):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _append(self.path, line)
            self._know(key, text, facts)

    def _know(self, key: str, text: str, facts: dict[str, Any]) -> None:
        self._texts[key] = text
        if fault := facts.get("fault"):
            self._faults[key] = str(fault)
        else:
            self._faults.pop(key, None)

    def _read(self) -> None:
        torn = 0
        with self.path.open("rb") as file:
            for line in file:
                try:
                    kept = json.loads(line)
                    self._know(kept["key"], kept["text"], kept)
                except (ValueError, TypeError, KeyError):
                    torn += bool(line.strip())
        if torn:
            log.warning("%s: %d lines are no kept answers and are passed over", self.path, torn)


def _append(path: Path, line: bytes) -> None:
    """Add a whole line in one write, after the end of a line that a dead process began."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0), 0o666)
    with os.fdopen(handle, "r+b", buffering=0) as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            line = line if file.read(1) == b"\n" else b"\n" + line
        written = file.write(line)
        if written != len(line):  # a disk that fills up takes a part; its own error comes next
            file.write(line[written:])

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
from typing import TYPE_CHECKING, Any, NamedTuple

from pathcli.store.files import disk_errors

if TYPE_CHECKING:
    from pathlib import Path

log = logging.getLogger("pathcli")


def response_key(*parts: str) -> str:
    """Return the SHA-256 of `parts`, whose borders count: ("ab", "c") is not ("a", "bc")."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


class Answer(NamedTuple):
    """What is kept: `fault` was wrong with it, `note` is to be known of it, tokens it took."""

    text: str
    fault: str = ""
    note: str = ""
    read: int = 0
    written: int = 0


class Responses:
    """A JSONL file of answers, each `{key, text, ...facts}`; of two of one key the last counts.

    The facts `fault`, `note`, `read` and `written` are those of an `Answer`.
    """

    def __init__(self, path: Path) -> None:
        """Read what `path` holds; the file and its folder are made when first written.

        Raises:
            ResourceError: it may not be read.
        """
        self.path = path
        self._turn = threading.Lock()
        self._known: dict[str, Answer] = {}
        self._earlier: set[str] = set()
        with disk_errors(path, "--out"):
            if path.exists():
                self._read()

    def get(self, key: str) -> str | None:
        """Return the answer kept under `key`, None if there is none."""
        found = self._known.get(key)
        return found.text if found else None

    def find(self, key: str) -> Answer | None:
        """Return what is kept under `key`."""
        return self._known.get(key)

    def earlier(self, key: str) -> bool:
        """Return, the first time it is asked, whether an answer was there before this process."""
        with self._turn:
            known = key in self._earlier
            self._earlier.discard(key)
        return known

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
        fault, note = (str(facts.get(name) or "") for name in ("fault", "note"))
        read, written = (int(facts.get(name) or 0) for name in ("read", "written"))
        self._known[key] = Answer(text, fault, note, read, written)

    def _read(self) -> None:
        torn = 0
        with self.path.open("rb") as file:
            for line in file:
                try:
                    kept = json.loads(line)
                    self._know(kept["key"], kept["text"], kept)
                    self._earlier.add(kept["key"])
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

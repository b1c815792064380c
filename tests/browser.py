"""Headless Chromium driven by its own protocol over a pair of pipes: no driver, no socket."""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_CODES = {"Enter": 13, "Escape": 27, "ArrowLeft": 37, "ArrowRight": 39}
_FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage"),
    *("--remote-debugging-pipe", "--window-size=1200,900"),
)


def find() -> str | None:
    return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One page of a browser; it reads commands from its descriptor 3 and answers on 4."""

    def __init__(self, program: str, profile: Path, downloads: Path) -> None:
        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()
        high = [os.dup(end) for end in (theirs_in, theirs_out)]  # above 4, so none is overwritten
        words = [program, *_FLAGS, f"--user-data-dir={profile}", "about:blank"]
        self._process = subprocess.Popen(
            ["bash", "-c", f'exec "$@" 3<&{high[0]} 4>&{high[1]}', "bash", *words],  # noqa: S607
            pass_fds=high,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for end in (theirs_in, theirs_out, *high):
            os.close(end)
        self._number, self._read, self._session = 0, b"", ""
        targets = self.call("Target.getTargets")["targetInfos"]
        page = next(each["targetId"] for each in targets if each["type"] == "page")
        told = self.call("Target.attachToTarget", targetId=page, flatten=True)
        self._session = told["sessionId"]
        self.call("Page.enable")
        self.call("Runtime.enable")
        where = {"behavior": "allow", "downloadPath": str(downloads)}
        self.call("Browser.setDownloadBehavior", **where)

    def call(self, method: str, **parameters: Any) -> Any:
        """Send one command and return its result."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session and not method.startswith(("Browser.", "Target.")):
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]

    def _next(self) -> dict[str, Any]:
        until = time.monotonic() + 60
        while b"\0" not in self._read:
            ready, _, _ = select.select([self._in], [], [], max(0, until - time.monotonic()))
            data = os.read(self._in, 1 << 16) if ready else b""
            assert data, "the browser does not answer"
            self._read += data
        text, _, self._read = self._read.partition(b"\0")
        return dict(json.loads(text))

    def open(self, page: Path) -> None:
        """Open a page, or the same one again, and wait until it is there."""
        self.call("Page.navigate", url=page.as_uri())
        until = time.monotonic() + 30
        there = f"location.href === {json.dumps(page.as_uri())} && document.readyState"
        while self.value(there) != "complete":
            assert time.monotonic() < until
            time.sleep(0.05)

    def reload(self) -> None:
        """Read the page anew, and wait until it is there."""
        self.value("window.before = true")
        self.call("Page.reload")
        until = time.monotonic() + 30
        while self.value("window.before || document.readyState") != "complete":
            assert time.monotonic() < until
            time.sleep(0.05)

    def value(self, expression: str) -> Any:
        """Return what an expression is in the page."""
        told = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in told, told
        return told["result"].get("value")

    def click(self, selector: str) -> None:
        """Press and release the mouse over the middle of an element."""
        box = f"document.querySelector({json.dumps(selector)}).getBoundingClientRect()"
        x, y = (
            self.value(f"{box}.{a} + {box}.{b} / 2") for a, b in (("x", "width"), ("y", "height"))
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def press(self, key: str, modifiers: int = 0) -> None:
        """Press and release a key; modifier 2 is Ctrl."""
        code = _CODES.get(key, ord(key.upper()[0]))
        both = {"key": key, "windowsVirtualKeyCode": code, "modifiers": modifiers}
        text = {"text": key} if len(key) == 1 and not modifiers else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", **both, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", **both)

    def type(self, text: str) -> None:
        """Put text where the cursor is, over what is selected."""
        self.call("Input.insertText", text=text)

    def close(self) -> None:
        """End the browser and wait for it."""
        os.write(self._out, json.dumps({"id": 0, "method": "Browser.close"}).encode() + b"\0")
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._in)
        os.close(self._out)

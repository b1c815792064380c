"""One request to an OpenAI-compatible endpoint: its pace, its tries, and what went wrong.

Redirects are not followed, and this machine's own addresses are reached without a proxy. The key
stands in no log and in no message.
"""

from __future__ import annotations

import contextlib
import email.utils
import http.client
import json
import logging
import random
import threading
import time
import urllib.request
from typing import Any
from urllib.error import HTTPError, URLError

from pathcli.endpoints import KEYS, LOCAL, host_of, key
from pathcli.errors import DataError, ResourceError, UsageError

log = logging.getLogger("pathcli")

LONGEST_S = 120.0
"""No endpoint is waited for longer than this between two tries."""
_LONG_S = 5.0  # a wait that a person is told of
_LATER = {408, 425, 429, *range(500, 600)}


class SlowError(ResourceError):
    """No answer came in time, though it was asked for several times."""


class Pace:
    """How fast may be asked: requests and tokens a minute, evenly spread; None is no limit."""

    def __init__(self, *, requests: float | None = None, tokens: float | None = None) -> None:
        """Begin now.

        Raises:
            UsageError: a limit that lets nothing pass.
        """
        if any(limit is not None and limit <= 0 for limit in (requests, tokens)):
            msg = "limits of requests and tokens a minute are above 0"
            raise UsageError(msg)
        self._each = tuple(60 / limit if limit else 0.0 for limit in (requests, tokens))
        self._free = [0.0, 0.0]
        self._turn = threading.Lock()

    def wait(self, tokens: int) -> None:
        """Return when a request of so many tokens may be sent, which is counted from then on."""
        with self._turn:
            start = max(time.monotonic(), *self._free)
            for i, cost in enumerate((1, tokens)):
                if self._each[i]:
                    self._free[i] = start + cost * self._each[i]
        self._sleep(start)

    def settle(self, tokens: int) -> None:
        """Give back tokens that were counted and not used; fewer than 0 were used on top."""
        with self._turn:
            self._free[1] -= tokens * self._each[1]

    def hold(self, seconds: float) -> None:
        """Let nobody begin for so long: the endpoint asked for it."""
        with self._turn:
            self._free[0] = max(self._free[0], time.monotonic() + seconds)

    @staticmethod
    def _sleep(until: float) -> None:
        if (rest := until - time.monotonic()) > 0:
            time.sleep(rest)


class Wire:
    """The way to one endpoint."""

    def __init__(
        self, base: str, *, attempts: int, pause_s: float, timeout_s: float, pace: Pace
    ) -> None:
        """Keep an address; see `pathcli.llm.Client`.

        Raises:
            UsageError: not an address.
        """
        self.base, self.pace = base.rstrip("/"), pace
        self.attempts, self.pause_s, self.timeout_s = attempts, pause_s, timeout_s
        handlers: list[urllib.request.BaseHandler] = [_Stay()]
        if host_of(base) in LOCAL:
            handlers.append(urllib.request.ProxyHandler({}))
        self._opener = urllib.request.build_opener(*handlers)

    def send(self, path: str, body: dict[str, Any] | None, tokens: int = 0) -> Any:  # noqa: ANN401
        """Return an endpoint's reply as JSON, trying again what it refuses for now.

        Waits between tries are drawn from 0 to a bound that doubles, so that several who were
        refused together do not come back together; an endpoint's own wait is kept, by all.

        Raises:
            UsageError: it refuses what was asked.
            ResourceError: it is not there, lets nobody in, or stays busy (`SlowError`: silent).
            DataError: it answers something else.
        """
        for attempt in range(1, self.attempts + 1):
            self.pace.wait(tokens)
            try:
                return self._once(path, body)
            except _Later as later:
                asked = later.wait_s or 0.0
                wait = min(self.pause_s * 2 ** (attempt - 1), LONGEST_S) * random.random()  # noqa: S311
                if attempt == self.attempts or asked > LONGEST_S:
                    when = f"it asks for {asked:.0f} s" if asked > LONGEST_S else f"{attempt} tries"
                    msg = f"{self.base}: {later} ({when}); run the same command again later"
                    raise (SlowError if later.slow else ResourceError)(msg) from later
                level = logging.INFO if asked + wait > _LONG_S else logging.DEBUG
                log.log(level, "%s: %s; again in %.1f s", self.base, later, asked + wait)
                self.pace.settle(tokens)
                if asked:
                    self.pace.hold(asked)
                time.sleep(asked + wait)
        raise AssertionError

    def models(self) -> list[str]:
        """Return the names of what the endpoint serves.

        Raises:
            PathcliError: see `send`.
        """
        found = self.send("models", None)
        try:
            return [str(one["id"]) for one in found["data"] or ()]
        except (TypeError, KeyError):
            raise self.strange(found) from None

    def strange(self, found: Any) -> DataError:  # noqa: ANN401 - JSON
        """Return the error of a reply that is none."""
        said = " ".join(str(found).split())[:120]
        return DataError(
            f"{self.base}: not the answer of an OpenAI-compatible endpoint ({said}); does its "
            "address end with /v1?"
        )

    def _once(self, path: str, body: dict[str, Any] | None) -> Any:  # noqa: ANN401 - JSON
        headers = {"Content-Type": "application/json", "User-Agent": "pathcli"}
        if known := key():
            headers["Authorization"] = f"Bearer {known}"
        data = json.dumps(body).encode() if body else None
        request = urllib.request.Request(f"{self.base}/{path}", data, headers)  # noqa: S310 - checked
        try:
            with self._opener.open(request, timeout=self.timeout_s) as reply:
                raw = reply.read()
        except HTTPError as error:
            with error:
                raise self._refusal(error, body) from None
        except (URLError, OSError, http.client.HTTPException) as error:
            raise self._unreached(error) from None
        try:
            return json.loads(raw)
        except ValueError:
            raise self.strange(raw.decode(errors="replace")) from None

    def _refusal(self, error: HTTPError, body: dict[str, Any] | None) -> Exception:
        """Return the error of an HTTP status, with the endpoint's own words."""
        said = _words(error)
        if error.code in _LATER:
            return _Later(f"{error.code} {said}", wait_s(error.headers.get("Retry-After")))
        if error.code in {401, 403}:
            todo = f"set {' or '.join(KEYS)} to a key it knows"
            return ResourceError(f"{self.base}: {error.code}, it lets nobody in ({said}); {todo}")
        if error.code == 404:  # noqa: PLR2004 - HTTP's own
            what, todo = "nothing there", "does the address end with /v1, as most do?"
            if body:
                what = f"no model {body['model']}"
                with contextlib.suppress(DataError, ResourceError):
                    todo = f"it serves: {', '.join(self.models())}"
            return ResourceError(f"{self.base}: 404, {what} ({said}); {todo}")
        return UsageError(f"{self.base}: {error.code}, it refuses what was asked ({said})")

    def _unreached(self, error: Exception) -> Exception:
        """Return the error of a connection: to be tried again, unless nobody is there."""
        why = error.reason if isinstance(error, URLError) else error
        if isinstance(why, TimeoutError):
            return _Later(f"no answer within {self.timeout_s:g} s", slow=True)
        if isinstance(why, ConnectionRefusedError) or not isinstance(
            why, ConnectionError | http.client.HTTPException
        ):
            msg = (
                f"{self.base} cannot be reached ({why}); is the server running, the address right?"
            )
            return ResourceError(msg)
        return _Later(f"the connection broke ({type(why).__name__})")


class _Later(Exception):  # noqa: N818 - no error until it lasts
    """A refusal that may pass: `wait_s` is what the endpoint asks for, `slow` if it was silent."""

    def __init__(self, why: str, wait_s: float | None = None, *, slow: bool = False) -> None:
        super().__init__(why)
        self.wait_s, self.slow = wait_s, slow


class _Stay(urllib.request.HTTPRedirectHandler):
    """Follows no redirect: images and the key go to the address that was given."""

    def redirect_request(self, *_: Any, **__: Any) -> None:  # noqa: ANN401
        return None


def _words(error: HTTPError) -> str:
    """Return an endpoint's own words on an error, in one line, without the key."""
    said: Any = ""
    with contextlib.suppress(OSError, http.client.HTTPException, ValueError, AttributeError):
        said = error.read(10_000).decode(errors="replace")
        said = json.loads(said)
        said = said.get("error", said.get("detail", said.get("message", said)))
        said = said.get("message", said)
    line = " ".join(str(said).split())[:300] or str(error.reason)
    return line.replace(known, "***") if (known := key()) else line


def wait_s(said: str | None) -> float | None:
    """Return the seconds of a Retry-After header: a number, or a date."""
    if said is None:
        return None
    with contextlib.suppress(ValueError):
        return max(0.0, float(said))
    with contextlib.suppress(ValueError):
        return max(0.0, email.utils.parsedate_to_datetime(said).timestamp() - time.time())
    return None

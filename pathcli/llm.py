"""The one client of OpenAI-compatible endpoints: a conversation with images in, words out.

Nothing leaves this machine unless somebody gave an endpoint's address; then what is asked, its
images among it, goes to that address and nowhere else: redirects are not followed, and this
machine's own addresses are reached without a proxy. The key that opens it is the environment's
PATHCLI_API_KEY, or else OPENAI_API_KEY; it stands in no log and in no message.
"""

from __future__ import annotations

import base64
import contextlib
import email.utils
import hashlib
import http.client
import json
import logging
import threading
import time
import urllib.request
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal
from urllib.error import HTTPError, URLError

from pathcli.endpoints import KEYS, LOCAL, host_of, key
from pathcli.errors import DataError, ResourceError, UsageError
from pathcli.store.responses import response_key

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from pathcli.store.responses import Responses

log = logging.getLogger("pathcli")

LONGEST_S = 120.0
"""No endpoint is waited for longer than this between two tries."""
TOP = 20
"""Likeliest first tokens that are asked for: the most an endpoint of this form gives."""
_LATER = {408, 425, 429, *range(500, 600)}


@dataclass(frozen=True)
class Picture:
    """A PNG or JPEG file's bytes."""

    data: bytes = field(repr=False)

    def url(self) -> str:
        """Return the picture inside an address."""
        kind = "png" if self.data.startswith(b"\x89PNG") else "jpeg"
        return f"data:image/{kind};base64,{base64.b64encode(self.data).decode()}"


@dataclass(frozen=True)
class Message:
    """What one side said: words and pictures in their order."""

    role: Literal["system", "user", "assistant"]
    content: tuple[str | Picture, ...]

    def to_json(self, *, short: bool = False) -> dict[str, Any]:
        """Return it as endpoints take it; `short` has pictures' SHA-256 instead of pictures."""
        if all(isinstance(part, str) for part in self.content):
            return {"role": self.role, "content": "\n".join(map(str, self.content))}
        return {"role": self.role, "content": [_part(part, short=short) for part in self.content]}


def _part(part: str | Picture, *, short: bool) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    url = hashlib.sha256(part.data).hexdigest() if short else part.url()
    return {"type": "image_url", "image_url": {"url": url}}


class Budget:
    """What may be spent: tokens read and written, and requests; None is no limit.

    Of several requests at once, those under way when the tokens run out are still finished.
    An endpoint that does not count tokens is taken to use one for four letters.
    """

    def __init__(self, *, tokens: int | None = None, requests: int | None = None) -> None:
        """Begin with nothing spent."""
        self.tokens, self.requests = tokens, requests
        self.spent_tokens = self.spent_requests = 0
        self._turn = threading.Lock()

    def begin(self) -> None:
        """Count one request.

        Raises:
            ResourceError: the budget does not allow it.
        """
        with self._turn:
            tokens = (self.tokens, "tokens", self.spent_tokens)
            for limit, name, spent in (tokens, (self.requests, "requests", self.spent_requests)):
                if limit is not None and spent >= limit:
                    msg = (
                        f"the budget of {limit} {name} is spent ({self.spent_requests} requests, "
                        f"{self.spent_tokens} tokens); raise it and run the same command again"
                    )
                    raise ResourceError(msg)
            self.spent_requests += 1

    def count(self, tokens: int) -> None:
        """Count tokens that were read and written."""
        with self._turn:
            self.spent_tokens += tokens


class Client:
    """A model behind an OpenAI-compatible endpoint (vLLM, Ollama, a vendor's)."""

    def __init__(
        self,
        url: str,
        *,
        kept: Responses | None = None,
        budget: Budget | None = None,
        workers: int = 4,
        attempts: int = 6,
        pause_s: float = 1.0,
        timeout_s: float = 300.0,
    ) -> None:
        """Keep an address, `http://HOST/v1#NAME`; nothing is sent yet.

        Args:
            url: the address; without #NAME, of the endpoint's only model.
            kept: where answers are looked for and kept.
            budget: what may be spent.
            workers: requests under way at once.
            attempts: most tries of what is refused for now, or not answered in `timeout_s`.
            pause_s: before the second try, doubled each time, unless Retry-After says another.
            timeout_s: so long an answer is waited for.

        Raises:
            UsageError: not an address.
        """
        base, _, self._named = url.partition("#")
        self.base, host = base.rstrip("/"), host_of(base)
        self.kept, self.budget, self.workers = kept, budget or Budget(), workers
        self.attempts, self.pause_s, self.timeout_s = attempts, pause_s, timeout_s
        handlers: list[urllib.request.BaseHandler] = [_Stay()]
        if host in LOCAL:
            handlers.append(urllib.request.ProxyHandler({}))
        self._opener = urllib.request.build_opener(*handlers)
        self._limit = "max_tokens"  # as vLLM and Ollama call it

    @cached_property
    def model(self) -> str:
        """The model's name: the address's, or the only one there is.

        Raises:
            UsageError: there are several, or none.
            ResourceError: the endpoint does not answer.
        """
        names = [self._named] if self._named else self.models()
        if len(names) != 1:
            msg = f"{self.base} serves {', '.join(names) or 'no model'}; name one: {self.base}#NAME"
            raise UsageError(msg)
        return names[0]

    def models(self) -> list[str]:
        """Return the names of what the endpoint serves.

        Raises:
            ResourceError: the endpoint does not answer.
            DataError: it answers something else.
        """
        found = self._send("models", None)
        try:
            return [str(one["id"]) for one in found["data"] or ()]
        except (TypeError, KeyError):
            raise self._strange(found) from None

    def ask(self, messages: Sequence[Message], **settings: Any) -> str:  # noqa: ANN401 - JSON
        """Return what the model answers, greedily and in at most 512 tokens.

        `settings` are of the endpoint's own form and go before temperature=0 and max_tokens=512;
        None leaves one out.

        Raises:
            UsageError: the endpoint refuses what was asked.
            ResourceError: it cannot be reached, lets nobody in, lacks the model or stays busy;
                or the budget is spent.
            DataError: what it answers is no answer.
        """
        return self._kept(messages, _text, settings)

    def ask_all(
        self,
        conversations: Iterable[Sequence[Message]],
        **settings: Any,  # noqa: ANN401 - JSON
    ) -> Iterator[str]:
        """Yield the answer to each conversation, in order, several being asked at once.

        Conversations are drawn as there is room. After an error those under way are finished and
        kept, and no other is begun.

        Raises:
            PathcliError: see `ask`.
        """
        pool = ThreadPoolExecutor(self.workers, thread_name_prefix="llm")
        waiting: deque[Future[str]] = deque()
        try:
            for messages in conversations:
                waiting.append(pool.submit(self.ask, messages, **settings))
                if len(waiting) >= 2 * self.workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)

    def first_tokens(self, messages: Sequence[Message]) -> dict[str, float] | None:
        """Return log-probabilities of the likeliest first tokens; None if the endpoint has none.

        Raises:
            PathcliError: see `ask`; an endpoint that refuses log-probabilities has none.
        """
        wanted = {"max_tokens": 1, "logprobs": True, "top_logprobs": TOP}
        try:
            found = json.loads(self._kept(messages, _top, wanted))
        except UsageError as error:
            log.info("no log-probabilities: %s", error)
            return None
        return {str(token): float(value) for token, value in found} or None

    # --- one request -------------------------------------------------------------------------

    def _kept(self, messages: Sequence[Message], read: Any, settings: dict[str, Any]) -> str:  # noqa: ANN401
        """Return what `read` takes out of the reply, from what is kept if it was asked before."""
        given = {"temperature": 0, "max_tokens": 512, **settings}
        given = {name: value for name, value in given.items() if value is not None}
        short = json.dumps([message.to_json(short=True) for message in messages])
        key = response_key(self.base, self.model, short, json.dumps(given, sort_keys=True))
        if self.kept is not None and (text := self.kept.get(key)) is not None:
            return text
        self.budget.begin()
        said = [message.to_json() for message in messages]
        found = self._complete({"model": self.model, "messages": said, **given})
        try:
            text = str(read(found["choices"][0]))
            tokens = (found.get("usage") or {}).get("total_tokens")
        except (TypeError, KeyError, IndexError, AttributeError):
            raise self._strange(found) from None
        tokens = tokens or (len(short) + len(text)) // 4 + 1
        self.budget.count(tokens)
        if self.kept is not None:
            self.kept.put(key, text, model=self.model, tokens=tokens)
        return text

    def _complete(self, body: dict[str, Any]) -> Any:  # noqa: ANN401 - JSON
        """Send a conversation; newer models call the limit of tokens by another name."""
        limit = self._limit
        given = {limit if name == "max_tokens" else name: value for name, value in body.items()}
        try:
            return self._send("chat/completions", given)
        except UsageError as error:
            if limit != "max_tokens" or "max_completion_tokens" not in str(error):
                raise
        self._limit = "max_completion_tokens"
        return self._complete(body)

    def _send(self, path: str, body: dict[str, Any] | None) -> Any:  # noqa: ANN401 - JSON
        """Return an endpoint's reply, trying again what it refuses for now."""
        for attempt in range(1, self.attempts + 1):
            try:
                return self._once(path, body)
            except _Later as later:
                wait = later.wait_s or min(self.pause_s * 2 ** (attempt - 1), LONGEST_S)
                if attempt == self.attempts or wait > LONGEST_S:
                    when = f"it asks for {wait:.0f} s" if wait > LONGEST_S else f"{attempt} tries"
                    msg = f"{self.base}: {later} ({when}); run the same command again later"
                    raise ResourceError(msg) from later
                log.info("%s: %s; again in %.1f s", self.base, later, wait)
                time.sleep(wait)
        raise AssertionError

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
                raise self._refusal(error, path) from None
        except (URLError, OSError, http.client.HTTPException) as error:
            raise self._unreached(error) from None
        try:
            return json.loads(raw)
        except ValueError:
            raise self._strange(raw.decode(errors="replace")) from None

    # --- what went wrong ---------------------------------------------------------------------

    def _refusal(self, error: HTTPError, path: str) -> Exception:
        """Return the error of an HTTP status, with the endpoint's own words."""
        said = _words(error)
        if error.code in _LATER:
            return _Later(f"{error.code} {said}", _wait_s(error.headers.get("Retry-After")))
        if error.code in {401, 403}:
            todo = f"set {' or '.join(KEYS)} to a key it knows"
            return ResourceError(f"{self.base}: {error.code}, it lets nobody in ({said}); {todo}")
        if error.code == 404:  # noqa: PLR2004 - HTTP's own
            what, todo = "nothing there", "does the address end with /v1, as most do?"
            if path != "models":
                what = f"no model {self.model}"
                with contextlib.suppress(DataError, ResourceError):
                    todo = f"it serves: {', '.join(self.models())}"
            return ResourceError(f"{self.base}: 404, {what} ({said}); {todo}")
        return UsageError(f"{self.base}: {error.code}, it refuses what was asked ({said})")

    def _unreached(self, error: Exception) -> Exception:
        """Return the error of a connection: to be tried again, unless nobody is there."""
        why = error.reason if isinstance(error, URLError) else error
        if isinstance(why, TimeoutError):
            return _Later(f"no answer within {self.timeout_s:g} s")
        if isinstance(why, ConnectionRefusedError) or not isinstance(
            why, ConnectionError | http.client.HTTPException
        ):
            msg = (
                f"{self.base} cannot be reached ({why}); is the server running, the address right?"
            )
            return ResourceError(msg)
        return _Later(f"the connection broke ({type(why).__name__})")

    def _strange(self, found: Any) -> DataError:  # noqa: ANN401 - JSON
        said = " ".join(str(found).split())[:120]
        return DataError(
            f"{self.base}: not the answer of an OpenAI-compatible endpoint ({said}); does its "
            "address end with /v1?"
        )


class _Later(Exception):  # noqa: N818 - no error until it lasts
    """A refusal that may pass; `wait_s` is what the endpoint asks for."""

    def __init__(self, why: str, wait_s: float | None = None) -> None:
        super().__init__(why)
        self.wait_s = wait_s


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


def _wait_s(said: str | None) -> float | None:
    """Return the seconds of a Retry-After header: a number, or a date."""
    if said is None:
        return None
    with contextlib.suppress(ValueError):
        return max(0.0, float(said))
    with contextlib.suppress(ValueError):
        return max(0.0, email.utils.parsedate_to_datetime(said).timestamp() - time.time())
    return None


def _text(choice: dict[str, Any]) -> str:
    message = choice["message"]
    return str(message.get("content") or message.get("refusal") or "").strip()


def _top(choice: dict[str, Any]) -> str:
    """Return the first token's likeliest ones as JSON, [] where an endpoint says none."""
    tokens = (choice.get("logprobs") or {}).get("content") or [{}]
    return json.dumps([(one["token"], one["logprob"]) for one in tokens[0].get("top_logprobs", ())])

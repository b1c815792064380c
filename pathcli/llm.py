"""The one client of OpenAI-compatible endpoints: a conversation with images in, words out.

Nothing leaves this machine unless somebody gave an endpoint's address; then what is asked, its
images among it, goes to that address and nowhere else (`pathcli.llm_http`). The key that opens it
is the environment's PATHCLI_API_KEY, or else OPENAI_API_KEY.
"""

from __future__ import annotations

import json
import logging
import re
import threading
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from pathcli.endpoints import Budget
from pathcli.errors import ResourceError, UsageError
from pathcli.llm_http import Pace, SlowError, Wire
from pathcli.llm_messages import CUT, LETTERS, Message, Picture, Reply, in_words, tokens_of
from pathcli.store.responses import response_key

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from pathcli.store.responses import Responses

__all__ = ["Client", "Message", "Picture", "Reply"]

log = logging.getLogger("pathcli")

T = TypeVar("T")

TOP = 20
"""Likeliest first tokens that are asked for: the most an endpoint of this form gives."""
_SILENT = 8  # conversations in a row without answer, at least, after which nobody is there
_NO_SCHEMA = re.compile(r"(?i)response_format|json.schema|structured output")
_NO_TEMPERATURE = re.compile(r"(?i)\btemperature\b")
_OWN = {
    "content filter": re.compile(r"(?i)content.?filter|content.?(management.)?policy|moderation"),
    "too long": re.compile(r"(?i)context.?(length|window)|maximum context|too (long|many tokens)"),
}
"""What endpoints refuse of one conversation, by their words."""


class Usage(NamedTuple):
    """Tokens that are read and written."""

    read: int
    written: int


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
        pace: Pace | None = None,
    ) -> None:
        """Keep an address, `http://HOST/v1#NAME`; nothing is sent yet.

        Args:
            url: the address; without #NAME, of the endpoint's only model.
            kept: where answers are looked for and kept.
            budget: what may be spent.
            workers: requests under way at once.
            attempts: most tries of what is refused for now, or not answered in `timeout_s`.
            pause_s: bound of the wait before the second try, doubled each time; Retry-After
                comes on top.
            timeout_s: so long an answer is waited for.
            pace: requests and tokens a minute.

        Raises:
            UsageError: not an address.
        """
        base, _, self._named = url.partition("#")
        self.kept, self.budget, self.workers = kept, budget or Budget(), workers
        self._wire = Wire(
            base, attempts=attempts, pause_s=pause_s, timeout_s=timeout_s, pace=pace or Pace()
        )
        self.base = self._wire.base
        self._limit = "max_tokens"  # as vLLM and Ollama call it
        self._schemas = True  # as long as it has not refused one
        self._greedy = True  # as long as it has not refused a temperature of 0
        self._asking: dict[str, threading.Lock] = {}

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
        return self._wire.models()

    # --- asking ------------------------------------------------------------------------------

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
        return self._kept(messages, _text, settings).text

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
        yield from self._each(conversations, lambda messages: self.ask(messages, **settings))

    def reply_all(
        self,
        conversations: Iterable[Sequence[Message]],
        *,
        schema: Mapping[str, Any] | None = None,
        **settings: Any,  # noqa: ANN401 - JSON
    ) -> Iterator[Reply]:
        """Yield a reply to each conversation, as `ask_all`, with what is wrong with it alone.

        A refusal, the endpoint's content filter, a conversation longer than the model reads, an
        answer that was cut off and one that did not come in time are faults of one reply.

        Args:
            conversations: what is asked.
            schema: a JSON schema that answers shall have. An endpoint that refuses one is told
                it in words.
            settings: see `ask`.

        Raises:
            PathcliError: see `ask`; an endpoint that does not answer several times in a row is
                gone.
        """
        silent = 0
        for reply, slow in self._each(
            conversations, lambda messages: self._reply(messages, schema, settings)
        ):
            silent = silent + 1 if slow else 0
            if silent >= max(_SILENT, 2 * self.workers):
                msg = f"{reply.fault}; so were {silent} in a row; what was answered is kept"
                raise ResourceError(msg)
            yield reply

    def known(
        self,
        messages: Sequence[Message],
        *,
        schema: Mapping[str, Any] | None = None,
        **settings: Any,  # noqa: ANN401 - JSON
    ) -> Reply | None:
        """Return the reply that is kept already, None if asking would cost something."""
        key = self._key(messages, _given(settings), schema)
        found = self.kept.find(key) if self.kept else None
        return Reply(found.text, found.fault) if found else None

    def first_tokens(self, messages: Sequence[Message]) -> dict[str, float] | None:
        """Return log-probabilities of the likeliest first tokens; None if the endpoint has none.

        Raises:
            PathcliError: see `ask`; an endpoint that refuses log-probabilities has none.
        """
        wanted = {"max_tokens": 1, "logprobs": True, "top_logprobs": TOP}
        try:
            found = json.loads(self._kept(messages, _top, wanted).text)
        except UsageError as error:
            log.info("no log-probabilities: %s", error)
            return None
        return {str(token): float(value) for token, value in found} or None

    def _each(
        self, conversations: Iterable[Sequence[Message]], ask: Callable[[Sequence[Message]], T]
    ) -> Iterator[T]:
        pool = ThreadPoolExecutor(self.workers, thread_name_prefix="llm")
        waiting: deque[Future[T]] = deque()
        try:
            for messages in conversations:
                waiting.append(pool.submit(ask, messages))
                if len(waiting) >= 3 * self.workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)

    def _reply(
        self,
        messages: Sequence[Message],
        schema: Mapping[str, Any] | None,
        settings: dict[str, Any],
    ) -> tuple[Reply, bool]:
        """Return a reply, and whether none came in time."""
        try:
            return self._kept(messages, _text, settings, schema), False
        except SlowError as error:
            return Reply("", str(error)), True
        except UsageError as error:
            own = (why for why, pattern in _OWN.items() if pattern.search(str(error)))
            if why := next(own, ""):
                return Reply("", f"{why}: {error}"), False
            raise

    # --- one request -------------------------------------------------------------------------

    def _key(
        self, messages: Sequence[Message], given: dict[str, Any], schema: Mapping[str, Any] | None
    ) -> str:
        short = json.dumps([message.to_json(short=True) for message in messages])
        told = given | ({"schema": schema} if schema else {})
        return response_key(self.base, self.model, short, json.dumps(told, sort_keys=True))

    def _kept(
        self,
        messages: Sequence[Message],
        read: Callable[[dict[str, Any]], str],
        settings: dict[str, Any],
        schema: Mapping[str, Any] | None = None,
    ) -> Reply:
        """Return what `read` takes out of the reply, from what is kept if it was asked before."""
        given = _given(settings)
        key = self._key(messages, given, schema)
        if self.kept is None:
            return self._paid(messages, read, given, schema, key)
        with self._asking.setdefault(key, threading.Lock()):  # the same at once is paid once
            try:
                if found := self.kept.find(key):
                    if self.kept.earlier(key):
                        self.budget.count_before(found.read, found.written)
                    return Reply(found.text, found.fault)
                return self._paid(messages, read, given, schema, key)
            finally:
                self._asking.pop(key, None)

    def _paid(
        self,
        messages: Sequence[Message],
        read: Callable[[dict[str, Any]], str],
        given: dict[str, Any],
        schema: Mapping[str, Any] | None,
        key: str,
    ) -> Reply:
        """Ask, count and keep."""
        most = int(given.get("max_tokens") or 0)
        with self.budget.request(tokens_of(messages), most) as count:
            found = self._complete(messages, given, schema)
            try:
                choice = found["choices"][0]
                text = str(read(choice))
                used = _used(found.get("usage") or {}, tokens_of(messages), len(text))
                fault = _fault(choice, used.written)
            except (TypeError, KeyError, IndexError, AttributeError):
                raise self._wire.strange(found) from None
            count(*used)
        self._wire.pace.settle(_most(messages, given) - sum(used))
        if self.kept is not None:
            facts = {"model": self.model, **used._asdict()} | ({"fault": fault} if fault else {})
            self.kept.put(key, text, **facts)
        return Reply(text, fault)

    def _complete(
        self, messages: Sequence[Message], given: dict[str, Any], schema: Mapping[str, Any] | None
    ) -> Any:  # noqa: ANN401 - JSON
        """Send a conversation, in such words and with such switches as this endpoint takes."""
        limit, switch = self._limit, schema is not None and self._schemas
        body = {limit if name == "max_tokens" else name: value for name, value in given.items()}
        if not self._greedy and body.get("temperature") == 0:
            del body["temperature"]
        if switch:
            named = {"name": "reply", "schema": schema, "strict": True}
            body["response_format"] = {"type": "json_schema", "json_schema": named}
        elif schema:
            messages = in_words(messages, schema)
        said = [message.to_json() for message in messages]
        whole = {"model": self.model, "messages": said, **body}
        try:
            return self._wire.send("chat/completions", whole, _most(messages, given))
        except UsageError as error:
            if limit == "max_tokens" and "max_completion_tokens" in str(error):
                self._limit = "max_completion_tokens"
            elif switch and _NO_SCHEMA.search(str(error)):
                if self._schemas:  # of several at once, one says so
                    log.warning("%s takes no JSON schema; it is told the form in words", self.base)
                self._schemas = False
            elif body.get("temperature") == 0 and _NO_TEMPERATURE.search(str(error)):
                if self._greedy:
                    log.warning("%s takes no temperature of 0; it is asked with its own", self.base)
                self._greedy = False
            else:
                raise
        return self._complete(messages, given, schema)


def _given(settings: dict[str, Any]) -> dict[str, Any]:
    """Return a request's parameters: greedy and at most 512 tokens, if nothing else is said."""
    given = {"temperature": 0, "max_tokens": 512, **settings}
    return {name: value for name, value in given.items() if value is not None}


def _most(messages: Sequence[Message], given: dict[str, Any]) -> int:
    """Return how many tokens a request may use, as endpoints count them against their limit."""
    return tokens_of(messages) + int(given.get("max_tokens") or 0)


def _used(usage: dict[str, Any], asked: int, said: int) -> Usage:
    """Return tokens read and written: as an endpoint counts them, else one for four letters."""
    written = usage.get("completion_tokens")
    written = said // LETTERS + 1 if written is None else int(written)
    read = usage.get("prompt_tokens")
    if read is None:
        total = usage.get("total_tokens")
        read = asked if total is None else max(0, total - written)
    return Usage(int(read), written)


def _fault(choice: dict[str, Any], written: int) -> str:
    """Return what is wrong with an answer that came."""
    if said := choice["message"].get("refusal"):
        return f"refused: {' '.join(str(said).split())[:120]}"
    why = choice.get("finish_reason")
    faults = {"length": f"{CUT} at {written} tokens", "content_filter": "content filter"}
    return faults.get(str(why), "")


def _text(choice: dict[str, Any]) -> str:
    message = choice["message"]
    return str(message.get("content") or message.get("refusal") or "").strip()


def _top(choice: dict[str, Any]) -> str:
    """Return the first token's likeliest ones as JSON, [] where an endpoint says none."""
    tokens = (choice.get("logprobs") or {}).get("content") or [{}]
    return json.dumps([(one["token"], one["logprob"]) for one in tokens[0].get("top_logprobs", ())])

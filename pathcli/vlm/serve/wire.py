"""OpenAI's chat format: a request's bytes in, a conversation out; an answer in, JSON out.

The format is that of `POST /v1/chat/completions` in OpenAI's public API reference.
"""

from __future__ import annotations

import json
import re
import time
import uuid
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, Field, StrictInt, StrictStr, ValidationError
from pydantic_core import from_json

from pathcli.types import NOTICE
from pathcli.vlm.serve.limits import Limits, RefusedError
from pathcli.vlm.written import IMAGE

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from pathcli.types import Answer

# --- requests ------------------------------------------------------------------------------

_ONE = "this server gives one answer, the likeliest one"
_TEXT = "this server answers in plain text alone"
_TOOLS = "this server's models call no tools"
_LOGS = "this server gives no log-probabilities; `pathcli.scores` has those of closed questions"
_REFUSED: dict[str, tuple[str, tuple[Any, ...]]] = {
    "n": (_ONE, (1,)),
    "temperature": (f"{_ONE}: leave it out or give 0", (0,)),
    "top_p": (f"{_ONE}: leave it out or give 1", (1,)),
    "presence_penalty": (_ONE, (0,)),
    "frequency_penalty": (_ONE, (0,)),
    "logit_bias": (_ONE, ({},)),
    "stop": ("this server's models end their answers themselves", ([], "")),
    "logprobs": (_LOGS, (False,)),
    "top_logprobs": (_LOGS, (0,)),
    "response_format": (_TEXT, ({"type": "text"},)),
    "modalities": (_TEXT, (["text"],)),
    "audio": (_TEXT, ()),
    "tools": (_TOOLS, ([],)),
    "tool_choice": (_TOOLS, ("none", "auto")),
    "functions": (_TOOLS, ([],)),
    "function_call": (_TOOLS, ("none", "auto")),
    "web_search_options": (_TOOLS, ()),
}
"""Parameters that would change an answer, why they cannot, and the values that change nothing."""
_IGNORED = {"user", "seed", "metadata", "store", "service_tier", "parallel_tool_calls"}
_IGNORED |= {"safety_identifier", "prompt_cache_key"}
"""Parameters on which no answer here depends."""
_BLANKS = re.compile(r"(\s{32})\s+")  # patterns that read questions are slow on long runs


class _Options(BaseModel):
    include_usage: bool = False


class _URL(BaseModel):
    url: StrictStr


class _Text(BaseModel):
    type: Literal["text"]
    text: StrictStr


class _Image(BaseModel):
    type: Literal["image_url"]
    image_url: _URL


class _Message(BaseModel):
    role: StrictStr
    content: StrictStr | list[Annotated[_Text | _Image, Field(discriminator="type")]]


class _Request(BaseModel):
    model: StrictStr
    messages: list[_Message] = Field(min_length=1)
    max_tokens: StrictInt | None = Field(None, ge=1)
    max_completion_tokens: StrictInt | None = Field(None, ge=1)
    stream: bool = False
    stream_options: _Options = _Options()


@dataclass(frozen=True)
class Asked:
    """A conversation: turns as of a `Sample`, and each image's address with its place."""

    model: str
    turns: tuple[str, ...]
    images: tuple[tuple[str, str], ...]
    max_tokens: int | None
    stream: bool
    usage: bool


def read(body: bytes, limits: Limits) -> Asked:
    """Return what a request asks.

    Raises:
        RefusedError: it is not JSON, or asks what cannot be asked.
    """
    try:
        found = from_json(body)
    except ValueError as error:
        msg = f"the request is not JSON: {error}"
        raise RefusedError(msg) from None
    if not isinstance(found, dict):
        msg = "the request is not a JSON object"
        raise RefusedError(msg)
    given = {name: value for name, value in found.items() if value is not None}
    _refuse(given)
    try:
        request = _Request.model_validate(given)
    except ValidationError as error:
        raise _invalid(error) from None
    turns, images = _conversation(request.messages, limits)
    most = request.max_completion_tokens or request.max_tokens
    return Asked(
        request.model,
        turns,
        images,
        most and min(most, limits.tokens),
        request.stream,
        request.stream_options.include_usage,
    )


def _refuse(given: dict[str, Any]) -> None:
    for name, value in given.items():
        if name in _REFUSED:
            why, neutral = _REFUSED[name]
            if value not in neutral:
                msg = f"{name}: {why}"
                raise RefusedError(msg, param=name, code="unsupported_value")
        elif name not in _Request.model_fields and name not in _IGNORED:
            msg = f"{name:.60}: there is no such parameter"
            raise RefusedError(msg, param=name[:60], code="unknown_parameter")


def _invalid(error: ValidationError) -> RefusedError:
    """Return the deepest of what is wrong, and its place as in `messages[0].content`."""
    worst = max(error.errors(include_url=False, include_input=False), key=lambda e: len(e["loc"]))
    tags = {"text", "image_url"}  # of a part's two forms, after its number
    before: Sequence[int | str] = ("", *worst["loc"])
    steps = [s for b, s in pairwise(before) if not (isinstance(b, int) and s in tags)]
    param = "".join(f"[{s}]" if isinstance(s, int) else f".{s}" for s in steps if _is_step(s))
    param = param.removeprefix(".")
    code = "missing_required_parameter" if worst["type"] == "missing" else "invalid_value"
    return RefusedError(f"{param}: {worst['msg']}", param=param, code=code)


def _is_step(step: int | str) -> bool:
    """Tell a key of the request from the name of a type that pydantic puts among them."""
    return isinstance(step, int) or (step.isidentifier() and step != "str")


def _conversation(
    messages: Sequence[_Message], limits: Limits
) -> tuple[tuple[str, ...], tuple[tuple[str, str], ...]]:
    """Return turns, and images' addresses with their places, in order.

    Where all images stand at one end of the first message, no mark says so: the model puts them
    where it learnt to, as `ask` does.
    """
    if len(messages) > limits.turns:
        msg = f"messages: {len(messages)} of them, and at most {limits.turns} are read"
        raise RefusedError(msg, param="messages", code="too_many_messages")
    said = [_pieces(number, message, limits) for number, message in enumerate(messages)]
    if len(said) % 2 == 0:
        msg = "messages: the last one is the user's"
        raise RefusedError(msg, param="messages", code="invalid_value")
    images = [piece for pieces in said for piece in pieces if isinstance(piece, tuple)]
    if not images:
        msg = "messages: no image in them; put one in as image_url, with a data: URL"
        raise RefusedError(msg, param="messages", code="no_image")
    if len(images) > limits.images:
        msg = f"messages: {len(images)} images, and at most {limits.images} are read"
        raise RefusedError(msg, param="messages", code="too_many_images")
    if not any(isinstance(piece, str) and piece.strip() for piece in said[-1]):
        msg = "messages: the last one asks nothing"
        raise RefusedError(msg, param="messages", code="no_question")
    first = [isinstance(piece, tuple) for piece in said[0]]
    apart = sum(first) == len(images) and sum(a != b for a, b in pairwise(first)) < 2  # noqa: PLR2004
    turns = tuple("\n".join(_marked(pieces, marks=not apart)) for pieces in said)
    return turns, tuple(images)


def _pieces(number: int, message: _Message, limits: Limits) -> list[str | tuple[str, str]]:
    """Return a message's words and (address, place) of its images, in order."""
    place, role = f"messages[{number}]", ("user", "assistant")[number % 2]
    if message.role != role:
        why = "the user's and the assistant's alternate, the user's first"
        if message.role in {"system", "developer"}:
            why = "this server's models have instructions of their own; say it in the question"
        msg = f"{place}.role: {message.role!r:.40}, not {role!r}: {why}"
        raise RefusedError(msg, param=f"{place}.role", code="invalid_value")
    parts = message.content
    if isinstance(parts, str):
        parts = [_Text(type="text", text=parts)]
    found: list[str | tuple[str, str]] = []
    for i, part in enumerate(parts):
        if isinstance(part, _Text):
            found.append(_BLANKS.sub(r"\1", part.text.replace(IMAGE, "< image>")))
        elif role == "user":
            found.append((part.image_url.url, f"{place}.content[{i}].image_url"))
        else:
            msg = f"{place}.content[{i}]: an image is the user's, not the assistant's"
            raise RefusedError(msg, param=f"{place}.content[{i}]", code="invalid_value")
    letters = sum(len(piece) for piece in found if isinstance(piece, str))
    if letters > limits.letters:
        msg = f"{place}: {letters} letters, and at most {limits.letters} are read"
        raise RefusedError(msg, param=place, code="too_long")
    return found


def _marked(pieces: Sequence[str | tuple[str, str]], *, marks: bool) -> Iterator[str]:
    for piece in pieces:
        if isinstance(piece, str):
            yield piece
        elif marks:
            yield IMAGE


# --- replies -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reply:
    """An answer, with the tokens read and written where they are known, and whether it was cut."""

    answer: Answer
    read: int | None = None
    written: int | None = None
    cut: bool = False

    @property
    def text(self) -> str:
        """What is said; of no answer that it is none, as `ask` says it."""
        return f"no answer: {self.answer.text}" if self.answer.abstained else self.answer.text

    @property
    def usage(self) -> dict[str, int] | None:
        """Tokens as OpenAI counts them."""
        if self.read is None or self.written is None:
            return None
        counts = {"prompt_tokens": self.read, "completion_tokens": self.written}
        return counts | {"total_tokens": self.read + self.written}


def worth(answer: Answer) -> dict[str, Any]:
    """Return what an answer is worth, in few words: the header `X-Pathcli`."""
    return {
        "abstained": answer.abstained,
        "confidence": answer.confidence,
        "scope": answer.scope,
        "notice": NOTICE,
    }


def _extra(answer: Answer) -> dict[str, Any]:
    more = {"scores": dict(answer.scores), "evidence": list(answer.evidence)}
    return worth(answer) | more


def completion(reply: Reply, model: str) -> dict[str, Any]:
    """Return an answer as `chat.completion`, with the field `pathcli`."""
    message = {"role": "assistant", "content": reply.text, "refusal": None}
    choice = _choice(reply) | {"message": message}
    more = {"usage": reply.usage, "pathcli": _extra(reply.answer)}
    return _head("chat.completion", model) | {"choices": [choice]} | more


def chunks(reply: Reply, model: str, *, usage: bool) -> str:
    """Return an answer as server-sent events: a model's words come together, in one chunk."""
    head = _head("chat.completion.chunk", model)
    none: dict[str, Any] = {"index": 0, "logprobs": None, "finish_reason": None}
    said = {"role": "assistant", "content": reply.text}
    end = {"choices": [_choice(reply) | {"delta": {}}], "pathcli": _extra(reply.answer)}
    events: list[dict[str, Any]] = [{"choices": [none | {"delta": said}]}, end]
    if usage:
        events = [event | {"usage": None} for event in events]
        events.append({"choices": [], "usage": reply.usage})
    lines = [json.dumps(head | event) for event in events]
    return "".join(f"data: {line}\n\n" for line in [*lines, "[DONE]"])


def _head(kind: str, model: str) -> dict[str, Any]:
    name = f"chatcmpl-{uuid.uuid4().hex}"
    return {"id": name, "object": kind, "created": int(time.time()), "model": model}


def _choice(reply: Reply) -> dict[str, Any]:
    return {"index": 0, "logprobs": None, "finish_reason": "length" if reply.cut else "stop"}


def card(model: str, scope: str, created: int) -> dict[str, Any]:
    """Return a model as `GET /v1/models` lists it."""
    about = {"scope": scope, "notice": NOTICE}
    head = {"id": model, "object": "model", "created": created, "owned_by": "pathcli"}
    return head | {"pathcli": about}

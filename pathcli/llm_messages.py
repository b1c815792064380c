"""What is said to a language model, and what it replies."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import dataclass, field, replace
from io import BytesIO
from typing import TYPE_CHECKING, Any, Literal

from pathcli.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from pathcli.types import ByteArray

CUT = "cut off"
"""How the fault of an answer begins that lacks its end."""
LETTERS = 4
"""Of a token, where nobody counts."""
_PICTURE = 1000  # tokens, likewise


@dataclass(frozen=True)
class Picture:
    """A PNG or JPEG file's bytes."""

    data: bytes = field(repr=False)

    @classmethod
    def of(cls, pixels: ByteArray) -> Picture:
        """Return uint8 RGB [h, w, 3] as a PNG file."""
        from PIL import Image  # noqa: PLC0415 - only where there are images

        file = BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        return cls(file.getvalue())

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


@dataclass(frozen=True)
class Reply:
    """What was answered; `fault` says what is wrong: refused, cut off, no answer in time.

    `note` is what whoever reads a good answer should know of it.
    """

    text: str
    fault: str = ""
    note: str = ""


def in_words(messages: Sequence[Message], schema: Mapping[str, Any]) -> list[Message]:
    """Return a conversation that asks for JSON of a schema in words, for models without switch."""
    *before, last = messages
    text = f"Reply with JSON alone, of this JSON schema: {json.dumps(schema)}"
    return [*before, replace(last, content=(*last.content, text))]


def list_schema(name: str, item: Mapping[str, Any]) -> dict[str, Any]:
    """Return the JSON schema of a list inside an object, as endpoints want it to be."""
    listed = {"type": "array", "description": "the list that is asked for", "items": dict(item)}
    return object_schema({name: listed})


def object_schema(properties: Mapping[str, Any]) -> dict[str, Any]:
    """Return the JSON schema of an object with all of these and nothing else, as `strict` wants."""
    given = {"properties": dict(properties), "required": [*properties]}
    return {"type": "object", **given, "additionalProperties": False}


_THOUGHT = re.compile(r"<think>.*?</think>", re.DOTALL)
_JSON = json.JSONDecoder(strict=False)


def json_in(reply: str) -> Any:  # noqa: ANN401 - any JSON
    """Return the JSON of a reply: the whole of it, or what stands in a fence or amid prose.

    Of several lists and objects the longest is taken. What a model thought aloud before does not
    count.

    Raises:
        DataError: there is none.
    """
    reply = _THOUGHT.sub("", reply).strip()
    try:
        return _JSON.decode(reply)
    except ValueError as error:
        found = [*_inside(reply)]
        if not found:
            msg = f"this is not JSON ({error})"
            raise DataError(msg) from error
    return max(found, key=lambda each: each[0])[1]


def _inside(reply: str) -> Iterator[tuple[int, Any]]:
    """Yield the length and the value of each list and object in a text, outermost ones."""
    at = 0
    while start := re.compile(r"[\[{]").search(reply, at):
        try:
            value, at = _JSON.raw_decode(reply, start.start())
        except ValueError:
            at = start.end()
            continue
        yield at - start.start(), value


def list_in(reply: str) -> list[Any]:
    """Return the JSON list of a reply, see `json_in`; one alone in an object is taken out of it.

    Raises:
        DataError: there is none; the message says what to a model that tries again.
    """
    found = json_in(reply)
    if isinstance(found, dict) and len(found) == 1:
        (found,) = found.values()
    if not isinstance(found, list):
        msg = "this is not a JSON list"
        raise DataError(msg)
    return found


def tokens_of(messages: Sequence[Message]) -> int:
    """Return about how many tokens a conversation has: a word's are not known before."""
    parts = [part for message in messages for part in message.content]
    letters = sum(len(part) for part in parts if isinstance(part, str))
    return letters // LETTERS + 1 + _PICTURE * sum(isinstance(p, Picture) for p in parts)

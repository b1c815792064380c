"""What is said to a language model, and what it replies."""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

CUT = "cut off"
"""How the fault of an answer begins that lacks its end."""
LETTERS = 4
"""Of a token, where nobody counts."""
_PICTURE = 1000  # tokens, likewise


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


@dataclass(frozen=True)
class Reply:
    """What was answered; `fault` says what is wrong: refused, cut off, no answer in time."""

    text: str
    fault: str = ""


def in_words(messages: Sequence[Message], schema: Mapping[str, Any]) -> list[Message]:
    """Return a conversation that asks for JSON of a schema in words, for models without switch."""
    *before, last = messages
    text = f"Reply with JSON alone, of this JSON schema: {json.dumps(schema)}"
    return [*before, replace(last, content=(*last.content, text))]


def tokens_of(messages: Sequence[Message]) -> int:
    """Return about how many tokens a conversation has: a word's are not known before."""
    parts = [part for message in messages for part in message.content]
    letters = sum(len(part) for part in parts if isinstance(part, str))
    return letters // LETTERS + 1 + _PICTURE * sum(isinstance(p, Picture) for p in parts)

"""How much one request may ask, and how a request is refused."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

MEGA = 1_000_000


@dataclass(frozen=True)
class Limits:
    """The most that is borne; what is more gets a status of 400 or above, and a reason.

    Attributes:
        body: bytes of a request.
        held: bytes of all requests that are being read at a time.
        body_s: seconds in which a request must have come.
        images: of a conversation.
        pixels: of all its images together, before they are decoded.
        turns: messages of a conversation.
        letters: of a message.
        tokens: of an answer; more may be asked for, and are not given.
        waiting: conversations that wait for the model.
    """

    body: int = 20 * MEGA
    held: int = 1000 * MEGA
    body_s: float = 60
    images: int = 16
    pixels: int = 32 * MEGA
    turns: int = 64
    letters: int = 8192
    tokens: int = 1024
    waiting: int = 128


class RefusedError(Exception):
    """A request that is not answered: its HTTP status, why, and which part of it is to blame."""

    def __init__(
        self,
        why: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        """Keep what is told."""
        super().__init__(why)
        self.status, self.param, self.code, self.headers = status, param, code, headers or {}

    def to_json(self) -> dict[str, Any]:
        """Return it as OpenAI's clients read it."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"  # noqa: PLR2004
        told = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return {"error": told}


def busy(seconds: float) -> RefusedError:
    """Return the refusal of a server that has enough to do, and when to come again."""
    wait = str(min(60, max(1, round(seconds))))
    why = f"too many requests are waiting; try again in {wait} s"
    return RefusedError(why, status=503, code="overloaded", headers={"Retry-After": wait})

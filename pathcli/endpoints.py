"""An endpoint's address, its key in the environment, and what may be spent there."""

from __future__ import annotations

import math
import os
import threading
from dataclasses import dataclass
from urllib.parse import urlsplit

from pathcli.errors import ResourceError, UsageError

KEYS = ("PATHCLI_API_KEY", "OPENAI_API_KEY")
LOCAL = {"localhost", "127.0.0.1", "::1"}
"""This machine's own names."""


def host_of(base: str) -> str:
    """Return the host of an address.

    Raises:
        UsageError: it is none, or it holds a password or a key, which messages would show.
    """
    looks = "it looks like http://HOST/v1#NAME"
    if "@" in base or "?" in base:
        msg = f"an endpoint's address holds no user and no key: {looks}, the key is in {KEYS[0]}"
        raise UsageError(msg)
    try:
        parts = urlsplit(base)
        host = parts.hostname if parts.scheme in {"http", "https"} and parts.port != 0 else None
    except ValueError:  # of its port, or of its brackets
        host = None
    if host is None or any(letter <= " " for letter in base):
        msg = f"{base}: not an endpoint's address; {looks}"
        raise UsageError(msg)
    return host


def key() -> str:
    """Return the key of the environment, "" for none.

    Raises:
        UsageError: it could not be sent, and the error of who tries would show it.
    """
    name = next((name for name in KEYS if os.environ.get(name, "").strip()), KEYS[0])
    found = os.environ.get(name, "").strip()
    if not (found.isascii() and found.isprintable()):
        msg = f"{name} is no key: it holds a line's end, or letters that are not ASCII"
        raise UsageError(msg)
    return found


@dataclass(frozen=True)
class Price:
    """What a million tokens cost, in USD: those a model reads, and those it writes."""

    read: float
    written: float

    def __post_init__(self) -> None:
        """Refuse what is no price.

        Raises:
            UsageError: a number below 0, or none.
        """
        if not all(0 <= usd < math.inf for usd in (self.read, self.written)):
            msg = f"a price is two numbers from 0 up, not {self.read:g},{self.written:g}"
            raise UsageError(msg)


class Budget:
    """What may be spent: tokens read and written, requests, and money; None is no limit.

    Of several requests at once, those under way when it runs out are still finished. An endpoint
    that does not count tokens is taken to use one for four letters.
    """

    def __init__(
        self,
        *,
        tokens: int | None = None,
        requests: int | None = None,
        usd: float | None = None,
        price: Price | None = None,
        among: list[Budget] | None = None,
    ) -> None:
        """Begin with nothing spent; those `among` which it is added share the money.

        Raises:
            UsageError: money without a price, or a negative number.
        """
        if usd is not None and (price is None or not 0 <= usd < math.inf):
            msg = "a budget in USD needs a price in USD per million tokens, read and written"
            raise UsageError(msg)
        self.price = price or Price(0, 0)
        self._most = {"tokens": tokens, "requests": requests, "USD": usd}
        self.read = self.written = self.requests = 0
        self._turn = threading.Lock()
        self._among = [] if among is None else among
        self._among.append(self)

    @property
    def tokens(self) -> int:
        """Tokens spent."""
        return self.read + self.written

    @property
    def usd(self) -> float:
        """Money spent."""
        return (self.read * self.price.read + self.written * self.price.written) / 1e6

    def __str__(self) -> str:
        """Say what was spent."""
        money = f", {self.usd:.4f} USD" if self.price != Price(0, 0) else ""
        read, written = f"{self.read:,} tokens read", f"{self.written:,} written"
        return f"{self.requests:,} requests, {read}, {written}{money}"

    def begin(self) -> None:
        """Count one request.

        Raises:
            ResourceError: the budget does not allow it.
        """
        with self._turn:
            usd = sum(each.usd for each in self._among)
            spent = {"tokens": self.tokens, "requests": self.requests, "USD": usd}
            for name, most in self._most.items():
                if most is not None and spent[name] >= most:
                    msg = f"the budget of {most:g} {name} is spent ({self}); what was answered is "
                    raise ResourceError(msg + "kept: raise it and run the same command again")
            self.requests += 1

    def count(self, read: int, written: int) -> None:
        """Count tokens that were read and written."""
        with self._turn:
            self.read += read
            self.written += written

"""An endpoint's address, its key in the environment, and what may be spent there."""

from __future__ import annotations

import math
import os
import threading
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from pathcli.errors import ResourceError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

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

    def usd(self, read: float, written: float) -> float:
        """Return what so many tokens cost."""
        return (read * self.read + written * self.written) / 1e6


@dataclass
class Spent:
    """Requests, and the tokens they read and wrote."""

    requests: int = 0
    read: int = 0
    written: int = 0

    def add(self, read: int, written: int) -> None:
        """Count one request."""
        self.requests += 1
        self.read += read
        self.written += written

    def told(self, price: Price | None) -> str:
        """Return it in words, and what it cost, where that is known and not nothing."""
        usd = price.usd(self.read, self.written) if price else 0
        money = f", {usd:.4f} USD" if price not in {None, Price(0, 0)} else ""
        read, written = f"{self.read:,} tokens read", f"{self.written:,} written"
        return f"{self.requests:,} requests, {read}, {written}{money}"


class Budget:
    """What may be spent: tokens read and written, requests, and money; None is no limit.

    What a request may use at most is set aside before it is sent, so that several at once do not
    overspend together: one for which nothing is left waits for those under way to say what they
    used. How many tokens a request reads is guessed, and guesses grow by what the answers so far
    tell. An endpoint that does not count tokens is taken to use one for four letters.

    `now` is what this run spent, `before` what kept answers cost earlier runs, `aside` what those
    under way may use at most.
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
        self.price = price
        self._most = {"tokens": tokens, "requests": requests, "USD": usd}
        self.now, self.before = Spent(), Spent()
        self.aside = Spent()
        self._guessed = 0
        self._among = [] if among is None else among
        shared = self._among[0].turn if self._among else None
        self.turn: threading.Condition = shared or threading.Condition()
        self._among.append(self)

    @property
    def tokens(self) -> int:
        """Tokens spent."""
        return self.now.read + self.now.written

    @property
    def usd(self) -> float:
        """Money spent."""
        return self.price.usd(self.now.read, self.now.written) if self.price else 0.0

    def __str__(self) -> str:
        """Say what was spent, and what kept answers had cost before."""
        now, before = self.now.told(self.price), self.before.told(self.price)
        return f"{now}; before: {before}" if self.before.requests else now

    @contextmanager
    def request(self, read: int, written: int) -> Iterator[Callable[[int, int], None]]:
        """Set tokens aside for one request; gives what is told the tokens that it used.

        Args:
            read: tokens it reads, about.
            written: tokens that it writes at most.

        Raises:
            ResourceError: the budget does not allow it.
        """

        def count(used: int, wrote: int) -> None:
            with self.turn:
                self._guessed += read
                self.now.read += used
                self.now.written += wrote

        with self.turn:
            while limit := self._lacks(read, written):
                if not any(each.aside.requests for each in self._among):
                    raise self._spent(limit)
                self.turn.wait()
            self.now.requests += 1
            self.aside.add(read, written)
        try:
            yield count
        finally:
            with self.turn:
                self.aside.requests -= 1
                self.aside.read -= read
                self.aside.written -= written
                self.turn.notify_all()

    def count(self, read: int, written: int) -> None:
        """Count one request that nothing was set aside for."""
        with self.turn:
            self.now.add(read, written)

    def count_before(self, read: int, written: int) -> None:
        """Count an answer that an earlier run asked for."""
        with self.turn:
            self.before.add(read, written)

    def at_most(self, read: int = 0, written: int = 0) -> float:
        """Return the money spent once those under way, and one such request more, are done."""
        if self.price is None:
            return 0.0
        held = self.now.read + self._likely(self.aside.read + read)
        return self.price.usd(held, self.now.written + self.aside.written + written)

    def _likely(self, read: int) -> float:
        """Return how many tokens so many guessed ones are, by the answers so far."""
        return read * max(1.0, self.now.read / self._guessed if self._guessed else 1.0)

    def _lacks(self, read: int, written: int) -> str:
        """Return the limit that one request more might break, "" for none."""
        others = sum(each.at_most() for each in self._among if each is not self)
        held = self._likely(self.aside.read + read) + self.aside.written + written
        need = {
            "tokens": self.tokens + held,
            "requests": self.now.requests + 1,
            "USD": self.at_most(read, written) + others,
        }
        limits = self._most.items()
        return next((n for n, most in limits if most is not None and need[n] > most + 1e-9), "")

    def _spent(self, limit: str) -> ResourceError:
        most = self._most[limit]
        msg = (
            f"the budget of {most:g} {limit} is spent, or has no room for one request more "
            f"({self}); what was answered is kept: raise it and run the same command again"
        )
        return ResourceError(msg)


def spent(budgets: Sequence[Budget]) -> dict[str, Any]:
    """Return what was spent now, and before on kept answers, as JSON values.

    Money is None where the price of something that was asked is not known.
    """
    return _told([(b.price, b.now) for b in budgets]) | {
        "before": _told([(b.price, b.before) for b in budgets])
    }


def _told(rows: Sequence[tuple[Price | None, Spent]]) -> dict[str, Any]:
    unknown = any(price is None and each.requests for price, each in rows)
    usd = sum(price.usd(each.read, each.written) for price, each in rows if price)
    return {
        "requests": sum(each.requests for _, each in rows),
        "tokens_read": sum(each.read for _, each in rows),
        "tokens_written": sum(each.written for _, each in rows),
        "usd": None if unknown else round(usd, 6),
    }

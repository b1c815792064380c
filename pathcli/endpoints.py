"""An endpoint's address, and its key in the environment; looked at before anything is sent."""

from __future__ import annotations

import os
from urllib.parse import urlsplit

from pathcli.errors import UsageError

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

"""A caption in, the animal or plant it speaks of out: the cheap way to tell non-human texts.

The words are data, assets/curation/species.yaml, which says how it is read.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pathcli.errors import DataError
from pathcli.types import digest
from pathcli.weights import asset
from pathcli.yaml12 import read_mapping

if TYPE_CHECKING:
    from pathlib import Path

_FORM = "not a lexicon; it needs names, acronyms and allowed"
_LIST = r"(?:\s*(?:,|/|\band\b|\bor\b|&)\s*)+"
_WORD = r"[\w/+-]+"


@dataclass(frozen=True)
class Lexicon:
    """Names of what is not human, and the phrases that may hold one all the same.

    `acronyms` are names that in capitals mean something else; `digest` names the words.
    """

    names: re.Pattern[str]
    allowed: re.Pattern[str]
    acronyms: frozenset[str]
    digest: str

    def found(self, caption: str) -> str:
        """Return the first name a caption has outside of allowed phrases, "" if it has none.

        Capitals count as an acronym's only where not the whole caption is in capitals.
        """
        if not self.names.search(caption):  # most captions; phrases cost more to look for
            return ""
        mixed = not caption.isupper()
        for match in self.names.finditer(self.allowed.sub(" ; ", caption)):
            name = match[0]
            singular = name.casefold().removesuffix("s")
            if not (mixed and name.rstrip("s").isupper() and singular in self.acronyms):
                return name
        return ""


def read_lexicon(path: Path | None = None) -> Lexicon:
    """Return the lexicon of a file, by default the shipped one.

    Raises:
        DataError: it is of another form.
        ResourceError: there is no such file.
    """
    path = path or asset("curation/species.yaml")
    values: dict[str, Any] = read_mapping(path, _FORM)
    try:
        names = [str(name) for line in values["names"] for name in line]
        allowed = [str(phrase) for phrase in values["allowed"]]
        acronyms = frozenset(str(name).casefold() for name in values["acronyms"])
        name = "(?:" + "|".join(map(_spaced, _longest(names))) + ")s?"
        phrases = "|".join(_phrase(phrase, name) for phrase in _longest(allowed))
    except (KeyError, TypeError) as error:
        msg = f"{path}: {_FORM} ({error})"
        raise DataError(msg) from error
    told = digest([names, allowed, sorted(acronyms)])
    return Lexicon(_whole(name), _whole(f"(?:{phrases})s?"), acronyms, told)


def _longest(texts: list[str]) -> list[str]:
    """Return texts so that one that begins like another is tried first."""
    return sorted(texts, key=len, reverse=True)


def _whole(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"(?<!\w){pattern}(?!\w)", re.IGNORECASE)


def _spaced(text: str) -> str:
    return r"[\s-]+".join(map(re.escape, text.split()))


def _phrase(text: str, name: str) -> str:
    """Return the pattern of a phrase: {name} is a name, {names} a list of them, {word} any word."""
    stands = {"{name}": name, "{names}": f"{name}(?:{_LIST}{name})*", "{word}": _WORD}
    return r"[\s-]+".join(stands.get(word) or re.escape(word) for word in text.split())

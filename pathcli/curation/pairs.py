"""What a language model wrote in; questions and answers out, and why some are left out.

The words by which a pair is left out are data, assets/curation/instruct.yaml.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from pathcli.errors import DataError
from pathcli.types import digest
from pathcli.weights import asset
from pathcli.yaml12 import read_mapping

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

QUESTION_WORDS, ANSWER_WORDS = (3, 40), (1, 120)
"""Least and most words."""

_OBJECT = re.compile(r'\{(?:[^{}"]|"(?:[^"\\]|\\.)*")*\}')
_LABEL = re.compile(
    r"""(?:^[\W\d_]*|(?<=["\u201d?.!,;])\s+)          # a line, or a part of one, begins:
        (?:(?P<word>question|answer)[\s\d*_"'.)#]*?:  # question: **Answer 2:** "question":
        |(?P<letter>q|a)(?:["*_]*:|[ ]?\d+["*_]*[:.)]))  # Q: A2. **Q**:""",
    re.IGNORECASE | re.MULTILINE | re.VERBOSE,
)
_NUMBER = re.compile(r"^\s*(?:\d+[.)]|[-*\u2022])\s*")
_QUOTES = " \t\r\n*_\"'\u201c\u201d,`{}[]"
_KEYS = {"question": ("question", "q"), "answer": ("answer", "a")}
_FENCE = re.compile(r"^```\w*$", re.MULTILINE)
_LATIN = 0x24F
_FOREIGN = 0.1
_SURE = 2  # function words from which a text is of another language


class Pair(NamedTuple):
    """A question about an image, and its answer."""

    question: str
    answer: str


class Fault(NamedTuple):
    """Why a pair is left out, and which of its words say so."""

    reason: str
    detail: str = ""


# --- reading -----------------------------------------------------------------------------


def read_pairs(reply: str, *, cut: bool = False) -> tuple[list[Pair], list[Fault]]:
    """Return the pairs of a reply in order, and what in it is no pair.

    JSON objects of a question and an answer; lines `question: "..."` and `answer: "..."`, or
    `Q1: ...` and `A1: ...`; or numbered questions with lines behind them. Of a reply that was
    `cut` off, what may lack its end is left out.
    """
    made = [pair for found in _OBJECT.findall(reply) if (pair := _of_json(found))]
    if made:
        return made, [Fault("cut off")] if cut else []
    told = list(_labelled(reply)) or list(_numbered(reply))
    pairs: list[Pair] = []
    faults: list[Fault] = []
    asked = ""
    for kind, text in told:
        if kind == "question":
            faults += [Fault("badly formed", f"no answer: {asked}")] if asked else []
            asked = text
        elif asked and text:
            pairs.append(Pair(asked, text))
            asked = ""
        else:
            faults.append(Fault("badly formed", f"no question: {text}"))
    if cut and told:
        if not asked and pairs:
            asked = pairs.pop().question
        return pairs, [*faults, Fault("cut off", asked)]
    if asked:
        faults.append(Fault("badly formed", f"no answer: {asked}"))
    if not told:
        faults.append(Fault("badly formed", f"no question: {reply}"))
    return pairs, faults


def _of_json(text: str) -> Pair | None:
    try:
        values = {str(key).casefold(): value for key, value in json.loads(text).items()}
    except ValueError:
        return None
    found = [
        next((values[key] for key in keys if isinstance(values.get(key), str)), "")
        for keys in _KEYS.values()
    ]
    return Pair(*(" ".join(text.split()) for text in found)) if all(found) else None


def _labelled(reply: str) -> Iterable[tuple[str, str]]:
    """Yield (question or answer, text); a text ends at an empty line."""
    reply = _FENCE.sub("", reply)
    labels = list(_LABEL.finditer(reply))
    ends = [*(label.start() for label in labels[1:]), len(reply)]
    for label, end in zip(labels, ends, strict=False):  # without labels nothing
        kind = (label["word"] or label["letter"])[0].casefold()
        text = reply[label.end() : end].strip().split("\n\n")[0]
        yield ("question" if kind == "q" else "answer"), _plain(_NUMBER.sub("", text))


def _numbered(reply: str) -> Iterable[tuple[str, str]]:
    """Yield lines that end in a question mark as questions, what stands below them as answers."""
    answer: list[str] = []
    asked = False
    for line in reply.splitlines():
        text = _plain(_NUMBER.sub("", line))
        if text.endswith("?"):
            if answer:
                yield "answer", " ".join(answer)
            yield "question", text
            asked, answer = True, []
        elif asked and text:
            answer.append(text)
    if answer:
        yield "answer", " ".join(answer)


def _plain(text: str) -> str:
    return " ".join(text.strip(_QUOTES).split())


# --- judging -----------------------------------------------------------------------------


@cache
def texts() -> dict[str, Any]:
    """Return assets/curation/instruct.yaml.

    Raises:
        DataError: a part is missing.
    """
    path = asset("curation/instruct.yaml")
    values = read_mapping(path, "it needs prompts, example, and lists of words")
    parts = ("system", "forms", "example", "gives_away", "numbers", "advice", "languages")
    if lacks := [part for part in (*parts, "body_parts") if part not in values]:
        msg = f"{path}: {', '.join(lacks)} is missing"
        raise DataError(msg)
    return values


def whole_words(words: Iterable[str]) -> re.Pattern[str]:
    """Return the pattern of any of the words or phrases, `*` for the rest of a word."""
    ordered = sorted(words, key=len, reverse=True)
    told = "|".join(r"[\s-]+".join(_word(w) for w in re.split(r"[\s-]+", each)) for each in ordered)
    return re.compile(rf"(?<!\w)(?:{told or '(?!)'})(?!\w)", re.IGNORECASE)


def _word(text: str) -> str:
    return re.escape(text.removesuffix("*")) + (r"\w*" if text.endswith("*") else "")


@dataclass(frozen=True)
class Rules:
    """What questions and answers may not say; `digest` names the lists."""

    lists: Sequence[tuple[str, re.Pattern[str], re.Pattern[str]]]
    number: re.Pattern[str]
    languages: Mapping[str, frozenset[str]]
    example: frozenset[str]
    digest: str

    def fault(self, pair: Pair, *, template: bool = False) -> Fault | None:
        """Return the first reason against a pair, None if there is none.

        Of a `template`, whose question is ours and whose answer is the caption, the answer is
        judged alone.
        """
        asked = "" if template else pair.question
        said = f"{asked}\n{pair.answer}"
        return (
            _length(asked, pair.answer, template=template)
            or self._words(said)
            or self._language(said)
            or self._copied(pair)
        )

    def _words(self, said: str) -> Fault | None:
        for reason, words, allowed in self.lists:
            if found := words.search(allowed.sub(" ", said)):
                return Fault(reason, found[0])
            if reason == "numbers" and (found := self.number.search(said)):
                return Fault(reason, found[0].strip())
        return None

    def _language(self, said: str) -> Fault | None:
        letters = [ord(letter) for letter in said if letter.isalpha()]
        if sum(letter > _LATIN for letter in letters) > _FOREIGN * len(letters):
            return Fault("not in English", "another script")
        words = Counter(re.findall(r"[^\W\d_]+", said.casefold()))
        hits = {name: sum(words[w] for w in known) for name, known in self.languages.items()}
        most = max(hits, key=lambda name: hits[name])
        if hits[most] > max(hits["english"], _SURE - 1):
            return Fault("not in English", most)
        return None

    def _copied(self, pair: Pair) -> Fault | None:
        same = [text for text in pair if normal(text) in self.example]
        return Fault("copied from the example", same[0]) if same else None


def _length(asked: str, answer: str, *, template: bool) -> Fault | None:
    limits = (("question", asked, QUESTION_WORDS), ("answer", answer, ANSWER_WORDS))
    for what, text, (least, most) in limits[template:]:
        count = len(text.split())
        if not least <= count <= most:
            short = "short" if count < least else "long"
            return Fault(f"{what} too {short}", f"{count} words")
    return None


@cache
def rules() -> Rules:
    """Return the shipped rules.

    Raises:
        DataError: the file is of another form.
    """
    told = texts()
    try:
        named = (
            ("gives away the text", "gives_away"),
            ("numbers", "numbers"),
            ("advice", "advice"),
        )
        lists = [
            (reason, whole_words(told[key]["words"]), whole_words(told[key].get("allowed", ())))
            for reason, key in named
        ]
        before = "".join(
            rf"(?<!\b{re.escape(word)}\s)" for word in told["numbers"]["allowed_before"]
        )
        number = re.compile(
            rf"{before}(?<![\w.,/+-])\d+(?:[.,]\d+)*\s*(?:%|x|\u00d7|(?:[\u00b5\u03bcmcn]m)|st|nd|rd|th)?"
            r"(?![\w/+-]|[.,]\d)",
            re.IGNORECASE,
        )
        languages = {name: frozenset(words) for name, words in told["languages"].items()}
        pairs = [Pair(**pair) for pair in told["example"]["pairs"]]
    except (KeyError, TypeError, AttributeError) as error:
        msg = f"assets/curation/instruct.yaml: of another form ({error!r})"
        raise DataError(msg) from error
    shown = frozenset(normal(text) for pair in pairs for text in pair)
    kept = {key: told[key] for key in ("gives_away", "numbers", "advice", "languages")}
    return Rules(lists, number, languages, shown, digest(kept))


def normal(text: str) -> str:
    """Return a text's words in small letters, without marks, for comparing."""
    return " ".join(re.findall(r"\w+", text.casefold()))


class Seen:
    """Which pairs there were, among those of one caption and among all."""

    def __init__(self) -> None:
        """Know none yet."""
        self._all: set[int] = set()
        self._here: set[tuple[int, str]] = set()

    def next(self) -> None:
        """Begin another caption."""
        self._here.clear()

    def fault(self, pair: Pair) -> Fault | None:
        """Return why a pair is a copy; if it is none, it is known from now on.

        Of one caption, neither a question nor an answer comes twice; of all, no pair.
        """
        parts = [(i, normal(text)) for i, text in enumerate(pair)]
        if twice := [text for i, text in parts if (i, text) in self._here]:
            return Fault("duplicate in its caption", twice[0])
        told = int(digest([text for _, text in parts]), 16)
        if told in self._all:
            return Fault("duplicate of another caption's", pair.question)
        self._here.update(parts)
        self._all.add(told)
        return None

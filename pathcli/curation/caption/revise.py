"""Captions and edits: what a revising model says is read and applied; good captions are spoilt.

An edit is one JSON object, and a reply is a list of them, applied in order:

    {"op": "add", "text": "Mitoses are frequent.", "after": "high-grade nuclei."}
    {"op": "delete", "text": "There is no necrosis."}
    {"op": "modify", "text": "small nuclei", "to": "large nuclei"}

`text` of a deletion or modification, and `after`, stand in the caption as whole words exactly
once, so that it is plain what is meant; `after` is "" for the beginning. An empty list changes
nothing.
"""

from __future__ import annotations

import json
import re
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pathcli.errors import DataError
from pathcli.llm_messages import list_in, list_schema, object_schema

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy as np

KEYS = {"add": ("text", "after"), "delete": ("text",), "modify": ("text", "to")}
_TEXT = {"type": "string"}
SCHEMA = list_schema(
    "operations",
    {
        "anyOf": [
            object_schema({"op": {**_TEXT, "enum": [op]}} | dict.fromkeys(keys, _TEXT))
            for op, keys in KEYS.items()
        ]
    },
)
"""What a model replies where it takes a schema."""

_CLOSES = ",.;:!?)"
_SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z0-9])")
_TRIES = 20
_WORDS = 8  # of an anchor, and of what stands beside a word to say which one is meant


@dataclass(frozen=True)
class Edit:
    """One change: `other` is what an addition stands after, or what a modification writes."""

    op: str
    text: str
    other: str = ""

    def to_json(self) -> dict[str, str]:
        """Return it as a model writes it."""
        values = (self.text, self.other)
        return {"op": self.op, **dict(zip(KEYS[self.op], values, strict=False))}


# --- a model's reply ---------------------------------------------------------------------


def read_edits(reply: str) -> tuple[Edit, ...]:
    """Return the edits of a reply: a JSON list of them, alone, fenced, or amid prose.

    Raises:
        DataError: it is anything else; the message says what to a model that tries again.
    """
    return tuple(map(_edit, list_in(reply)))


def written(edits: Sequence[Edit]) -> str:
    """Return edits as a model replies them; the inverse of `read_edits`."""
    return json.dumps([edit.to_json() for edit in edits], ensure_ascii=False)


def _edit(found: Any) -> Edit:  # noqa: ANN401 - any JSON
    op = found.get("op") if isinstance(found, dict) else None
    keys = KEYS.get(op) if isinstance(op, str) else None
    if keys is None:
        msg = f"an operation is an object whose op is one of {', '.join(KEYS)}, not {_short(found)}"
        raise DataError(msg)
    if {*found} != {"op", *keys} or not all(isinstance(found[key], str) for key in keys):
        msg = f"an operation {op} has the texts {' and '.join(keys)}, and nothing else: "
        raise DataError(msg + _short(found))
    if not all(found[key].strip() for key in keys if key != "after"):
        msg = f"a text of an operation {op} is empty"
        raise DataError(msg)
    return Edit(str(op), *(found[key].strip() for key in keys))


def _short(value: Any) -> str:  # noqa: ANN401 - any JSON
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."  # noqa: PLR2004 - a line's width


def apply(caption: str, edits: Sequence[Edit]) -> str:
    """Return a caption after all edits, each made on what the one before has left.

    Raises:
        DataError: what an edit names is not there, or there more than once.
    """
    for edit in edits:
        if edit.op == "add":
            end = _place(caption, edit.other)[1] if edit.other else 0
            caption = _joined(caption[:end], edit.text, caption[end:])
            continue
        start, end = _place(caption, edit.text)
        if edit.op == "modify":
            caption = caption[:start] + edit.other + caption[end:]
        else:
            caption = _closed(caption[:start], caption[end:])
    return caption


def _place(caption: str, text: str) -> tuple[int, int]:
    found = _starts(caption, text)
    if len(found) != 1:
        times = f"{len(found)} times" if found else "not"
        msg = f"{_short(text)} is {times} in the caption; quote words that stand there exactly once"
        raise DataError(msg)
    return found[0], found[0] + len(text)


def _starts(caption: str, text: str) -> list[int]:
    """Return where `text` stands as whole words, overlapping places too."""
    left = r"(?<!\w)" if re.match(r"\w", text) else ""
    right = r"(?!\w)" if re.search(r"\w$", text) else ""
    return [one.start() for one in re.finditer(f"{left}(?={re.escape(text)}{right})", caption)]


def _joined(before: str, text: str, after: str) -> str:
    """Return three parts with a space between words, and none before a comma or full stop."""
    left = " " if before and not before[-1].isspace() and text[0] not in _CLOSES else ""
    right = " " if after and not after[0].isspace() and after[0] not in _CLOSES else ""
    return f"{before}{left}{text}{right}{after}"


def _closed(before: str, after: str) -> str:
    """Return what is left around a deletion, without the space that went with it."""
    if after[:1].isspace() and (not before or before[-1].isspace()):
        return before + after[1:]
    if before[-1:].isspace() and (not after or after[0] in _CLOSES):
        return before[:-1] + after
    return before + after


# --- spoilt captions ---------------------------------------------------------------------


@dataclass(frozen=True)
class Spoilt:
    """A caption made wrong on purpose, and the edits that give back the good one exactly."""

    caption: str
    edits: tuple[Edit, ...] = ()


def spoil(caption: str, edits: Sequence[Edit]) -> Spoilt:
    """Make a good caption wrong by `edits`, and find what restores it.

    Raises:
        DataError: an edit cannot be made, changes nothing, or cannot be taken back exactly.
    """
    wrong, back = caption, list[Edit]()
    for edit in edits:
        changed = apply(wrong, [edit])
        undo = next((e for e in _undoing(wrong, edit) if _restores(changed, e, wrong)), None)
        if changed == wrong or undo is None:
            msg = f"the operation {_short(edit.to_json())} cannot be taken back exactly"
            raise DataError(msg)
        wrong, back = changed, [undo, *back]
    return Spoilt(wrong, tuple(back))


def _restores(changed: str, edit: Edit, caption: str) -> bool:
    try:
        return apply(changed, [edit]) == caption
    except DataError:
        return False


def _undoing(caption: str, edit: Edit) -> Iterator[Edit]:
    """Yield edits that might take one back, the shortest first."""
    if edit.op == "add":
        yield Edit("delete", edit.text)
        return
    start, end = _place(caption, edit.text)
    before, after = caption[:start].rstrip(), caption[end:].lstrip()
    ends = [before[one.start() :] for one in re.finditer(r"(?<!\S)\S", before)][::-1]
    if edit.op == "delete":
        yield from (
            Edit("add", edit.text, words) for words in ([*ends[:_WORDS]] if before else [""])
        )
        return
    yield Edit("modify", edit.other, edit.text)
    begins = [after[: one.end()] for one in re.finditer(r"\S(?!\S)", after)]
    for words in ends[:_WORDS]:
        yield Edit("modify", f"{words} {edit.other}", f"{words} {edit.text}")
    for words in begins[:_WORDS]:
        yield Edit("modify", f"{edit.other} {words}", f"{edit.text} {words}")


def spoil_by_rule(
    caption: str,
    contrasts: Sequence[Sequence[str]],
    claims: Sequence[str],
    rng: np.random.Generator,
) -> Spoilt:
    """Make one to three changes that turn a good caption wrong.

    Args:
        caption: a good one.
        contrasts: pairs of words of which one is wrong where the other is right.
        claims: sentences that may be added: of other captions, say.
        rng: draws the changes.

    Raises:
        DataError: nothing in the caption can be changed.
    """
    wanted, made, wrong = int(rng.integers(1, 4)), list[Edit](), Spoilt(caption)
    for _ in range(_TRIES):
        edit = _drawn(wrong.caption, contrasts, claims, rng)
        if edit is None:
            continue
        with suppress(DataError):
            worse = spoil(caption, [*made, edit])
            if worse.caption != caption:
                made, wrong = [*made, edit], worse
        if len(made) == wanted:
            break
    if not made:
        msg = "nothing in this caption can be changed by rule"
        raise DataError(msg)
    return wrong


def _drawn(
    caption: str,
    contrasts: Sequence[Sequence[str]],
    claims: Sequence[str],
    rng: np.random.Generator,
) -> Edit | None:
    """Return a change that would make a caption wrong, None if that kind is not to be had."""
    sentences = _SENTENCE.split(caption)
    kind = ("modify", "add", "delete")[int(rng.integers(3))]
    if kind == "modify":
        swaps = [edit for pair in contrasts for edit in _swaps(caption, pair)]
        return swaps[int(rng.integers(len(swaps)))] if swaps else None
    at = int(rng.integers(len(sentences)))
    if kind == "delete":
        return Edit("delete", sentences[at]) if len(sentences) > 1 else None
    fitting = [claim for claim in claims if claim not in caption]
    return Edit("add", fitting[int(rng.integers(len(fitting)))], sentences[at]) if fitting else None


def _swaps(caption: str, pair: Sequence[str]) -> Iterator[Edit]:
    for word, other in (pair, pair[::-1]):
        for text, instead in ((word, other), (_capital(word), _capital(other))):
            if len(_starts(caption, text)) == 1:
                yield Edit("modify", text, instead)


def _capital(word: str) -> str:
    return word[:1].upper() + word[1:]


def sentences_of(caption: str) -> list[str]:
    """Return the sentences of a caption."""
    return _SENTENCE.split(caption.strip())

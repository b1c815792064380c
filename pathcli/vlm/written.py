"""What is said, and by which template, in; its tokens, and which of them are learnt, out.

The text between two images is tokenized at once, and a token is learnt where it holds a
character of an answer or is the mark that ends it. The space between `ASSISTANT:` and an answer
belongs to the answer, so what is asked is how what was learnt begins, token by token.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

from pathcli.errors import DataError
from pathcli.vlm.model import NOT_LEARNT

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from pathcli.vlm.templates import Voice

IMAGE = "<image>"
"""Marks the place of an image in a user's turn, as LLaVA's data has it."""


# --- what comes out ----------------------------------------------------------------------


class Token(NamedTuple):
    """A token: its id, the text it adds, whether it is learnt, and the image it is a part of."""

    id: int
    text: str
    learnt: bool = False
    image: int | None = None

    @property
    def role(self) -> str:
        """Return `image`, `learnt` or `read`."""
        return "image" if self.image is not None else "learnt" if self.learnt else "read"


@dataclass(frozen=True)
class Encoded:
    """A conversation as tokens; `target` is what a decoder learns beside them, if there is one.

    `question` are the user's words, without marks and template; `truncated` says that a limit
    cut something off.
    """

    tokens: tuple[Token, ...]
    target: tuple[Token, ...] | None = None
    question: str = ""
    truncated: bool = False

    @property
    def ids(self) -> list[int]:
        """Return what is read; 0 where an image stands."""
        return [token.id for token in self.tokens]

    @property
    def image(self) -> list[bool]:
        """Tell where visual embeddings stand."""
        return [token.image is not None for token in self.tokens]

    @property
    def labels(self) -> list[int]:
        """Return what is learnt: beside `ids`, -100 for nothing; or the decoder's own ids."""
        if self.target is not None:
            return [token.id for token in self.target]
        return [token.id if token.learnt else NOT_LEARNT for token in self.tokens]

    @property
    def text(self) -> str:
        """Return what is read as text: special tokens are written out, an image is `<image>`."""
        return "".join(token.text for token in self.tokens)

    def show(self) -> list[tuple[str, str]]:
        """Return (role, text) pieces for a person: read, learnt, image; at last the counts."""
        tokens = [*self.tokens, *(self.target or ())]
        pieces = []
        for (role, _), group in groupby(tokens, key=lambda t: (t.role, t.image)):
            members = list(group)
            text = "".join(token.text for token in members)
            pieces.append((role, f"<image: {len(members)} tokens>" if role == "image" else text))
        images, learnt = (sum(t.role == role for t in tokens) for role in ("image", "learnt"))
        counts = f"{len(tokens)} tokens: {images} of images, {learnt} learnt"
        return [*pieces, ("counts", counts + (", truncated" if self.truncated else ""))]


# --- how it is written -------------------------------------------------------------------


class Part(NamedTuple):
    """A stretch of the text, or the place of an image."""

    text: str
    learnt: bool = False
    image: bool = False


class Writer:
    """Writes a conversation down part by part; `cut` tells whether a limit took something."""

    def __init__(self, speech: Voice, tokenizer: Any) -> None:  # noqa: ANN401 - transformers'
        """Begin with nothing written."""
        self.speech, self.tokenizer = speech, tokenizer
        self.template = speech.template
        self.parts: list[Part] = []
        self.cut = False

    def system(self, words: str) -> None:
        """Write the words for the system, if there are any."""
        if words:
            text = self.template.system.replace("{}", self.speech.words(words))
            self.parts.append(Part(text))

    def user(self, pieces: Sequence[str], limit: int | None) -> None:
        """Write a user's turn, and what the assistant's begins with."""
        before, _, after = self.template.user.partition("{}")
        said = []
        for piece in pieces:
            if piece == IMAGE:
                said.append(Part(IMAGE, image=True))
            elif self.template.asks:
                words, used = self._within(piece, limit)
                limit = None if limit is None else limit - used
                said += [Part(words)] if words else []
        self.parts.append(Part(before))
        for number, part in enumerate(said):
            self.parts += [Part(self.template.join if number else ""), part]
        self.parts.append(Part(after + self.template.assistant))

    def answer(self, words: str, limit: int | None) -> None:
        """Write an answer and its end; one that is cut short does not learn to end there."""
        kept, _ = self._within(words, limit)
        whole = kept == self.speech.words(words)
        self.parts += [
            Part(self.template.answer.replace("{}", kept), learnt=bool(kept)),
            Part(self.template.end, learnt=whole),
            Part(self.template.after),
        ]

    def _within(self, text: str, limit: int | None) -> tuple[str, int]:
        """Return what of words is within a limit, and its number of tokens."""
        text = self.speech.words(text)
        if limit is None:
            return text, 0
        spans = _spans(text, self.tokenizer)
        if len(spans) <= limit:
            return text, len(spans)
        self.cut = True
        return text[: spans[limit][0]].rstrip(), limit


def target_of(parts: Sequence[Part]) -> list[Part]:
    """Return what a decoder learns of an answer's parts: no space before it, nothing after."""
    return [part._replace(text=part.text.lstrip()) for part in parts if part.learnt]


def tokenized(parts: Iterable[Part], counts: Sequence[int], tokenizer: Any) -> list[Token]:  # noqa: ANN401
    """Return the tokens of all parts; an image becomes as many as `counts` says."""
    found: list[Token] = []
    images = 0
    for image, group in groupby(parts, key=lambda part: part.image):
        if not image:
            found += _written(list(group), tokenizer)
            continue
        for _ in group:
            found += [Token(0, "" if i else IMAGE, image=images) for i in range(counts[images])]
            images += 1
    return found


def _written(parts: Sequence[Part], tokenizer: Any) -> list[Token]:  # noqa: ANN401 - transformers'
    """Return the tokens of one stretch of text; their texts joined are that text."""
    text, answers = "", []
    for part in parts:
        if part.learnt:
            answers.append((len(text), len(text) + len(part.text)))
        text += part.text
    if not text:
        return []
    told = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    found: list[Token] = []
    done, last = 0, len(told.input_ids) - 1
    for number, (token, span) in enumerate(zip(told.input_ids, told.offset_mapping, strict=True)):
        start, end = span[0], max(span[1], span[0] + 1)  # a mark of a word's start holds nothing
        learnt = any(start < stop and begin < end for begin, stop in answers)
        shown = len(text) if number == last else max(done, span[1])
        found.append(Token(token, text[done:shown], learnt))
        done = shown
    return found


def _spans(text: str, tokenizer: Any) -> list[tuple[int, int]]:  # noqa: ANN401 - transformers'
    told = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return list(told.offset_mapping)


def fitted(tokens: list[Token], room: int, name: str, *, left: bool) -> list[Token]:
    """Return at most `room` tokens: words go, from the end or the beginning, images never."""
    over = len(tokens) - room
    words = [i for i, token in enumerate(tokens) if token.image is None]
    if over <= 0:
        return tokens
    if over >= len(words):
        images = len(tokens) - len(words)
        msg = f"{name}: {images} visual tokens leave no room for words; raise chat.limit"
        raise DataError(msg)
    gone = set(words[:over] if left else words[-over:])
    return [token for i, token in enumerate(tokens) if i not in gone]

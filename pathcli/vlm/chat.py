"""A sample's turns in; what a language model reads, and which tokens of it are learnt, out.

What a template writes may be special tokens. What a sample says never is one, nor the place of
an image outside a user's turn: such words are taken apart by a space (`</s>` becomes `< /s>`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence  # noqa: TC003 - recipes read annotations when they run
from typing import TYPE_CHECKING, Any, Literal

from pathcli.errors import DataError, UsageError
from pathcli.vlm.model import NOT_LEARNT
from pathcli.vlm.templates import read_questions, read_template, voice
from pathcli.vlm.written import IMAGE, Encoded, Token, Writer, fitted, target_of, tokenized

if TYPE_CHECKING:
    from collections.abc import Iterable

    import numpy as np

    from pathcli.types import Sample

__all__ = ["IMAGE", "Chat", "Encoded"]


class Chat:
    """The section `chat` of a recipe: how samples are put to a language model."""

    def __init__(
        self,
        *,
        template: str,
        system: str | None = None,
        prefix: str = "",
        closed: str = "",
        questions: Sequence[str] | str = (),
        place: Literal["first", "last", "random"] = "first",
        limit: int = 2048,
        question_limit: int | None = None,
        answer_limit: int | None = None,
    ) -> None:
        """Read the template and keep the rest.

        Args:
            template: plain, vicuna-v1, llama-3, chatml, flan, or a file of that form.
            system: words for the system, "" for none (default: the template's).
            prefix: said before every question.
            closed: said after questions whose answer is yes or no.
            questions: one is drawn for a sample without turns; a list, or the name of one
                (describe, describe-in-detail), or a file of that form.
            place: of images in the first turn, where the turns do not mark it.
            limit: most tokens, images among them.
            question_limit: most tokens of a user's turn, without template and images.
            answer_limit: most tokens of an answer, without its end, which a cut one does not
                learn.

        Raises:
            UsageError: an unknown name, a limit below 1, or words that would not be said.
            DataError: a file of another form.
            ResourceError: there is no such file.
        """
        self.template = read_template(template)
        self.questions = read_questions(questions) if isinstance(questions, str) else questions
        self.system = self.template.default if system is None else system
        self.prefix, self.closed, self.place = prefix.strip(), closed.strip(), place
        self.limit, self.question_limit, self.answer_limit = limit, question_limit, answer_limit
        if low := [n for n in (limit, question_limit, answer_limit) if n is not None and n < 1]:
            msg = f"limits are at least 1 token, not {low[0]}"
            raise UsageError(msg)
        if not self.template.asks and (self.questions or self.prefix or self.closed):
            msg = f"template {template} says no questions; leave out questions, prefix and closed"
            raise UsageError(msg)
        if self.system and not self.template.system:
            msg = f"template {template} has no words for the system; leave out system"
            raise UsageError(msg)

    def encode(
        self,
        sample: Sample,
        tokenizer: Any,  # noqa: ANN401 - transformers' fast tokenizer
        counts: Sequence[int],
        rng: np.random.Generator,
        seq2seq: bool = False,
    ) -> Encoded:
        """Return a sample as it is learnt: all its answers, or with `seq2seq` the last one.

        Args:
            sample: what is said.
            tokenizer: of the language model.
            counts: visual tokens of each image.
            rng: draws the question and the place of images, where a recipe has several.
            seq2seq: whether the language model has an encoder of its own.

        Raises:
            DataError: nothing is learnt, marks and images differ, or images exceed the limit.
            UsageError: the tokenizer lacks what the template needs.
        """
        if not all(answer.strip() for answer in _answers(sample)):
            msg = f"{sample.name}: an answer is empty, so there is nothing to learn"
            raise DataError(msg)
        told = self._told(sample, tokenizer, counts, rng, seq2seq=seq2seq, learn=True)
        if all(label == NOT_LEARNT for label in told.labels):
            msg = f"{sample.name}: nothing of its answers is left; raise chat.limit"
            raise DataError(msg)
        return told

    def ask(
        self,
        sample: Sample,
        tokenizer: Any,  # noqa: ANN401 - transformers' fast tokenizer
        counts: Sequence[int],
        seq2seq: bool = False,
    ) -> Encoded:
        """Return what the last answer is generated from; of too long a text the beginning goes.

        Of what could be drawn it takes the first. `sample.answer`, which may be empty, is not
        told; where it is known it decides whether the question is closed.

        Raises:
            DataError: marks and images differ, or images exceed the limit.
            UsageError: the tokenizer lacks what the template needs.
        """
        return self._told(sample, tokenizer, counts, None, seq2seq=seq2seq, learn=False)

    def question(self, sample: Sample, rng: np.random.Generator | None = None) -> str:
        """Return the user's words, as `Encoded.question` has them for the same state of `rng`.

        Raises:
            DataError: marks and images differ, or the last turn is not the user's.
        """
        return _plain(self._asked(sample, rng))

    def stop(self, tokenizer: Any) -> list[int]:  # noqa: ANN401 - transformers' fast tokenizer
        """Return the ids that end an answer.

        Raises:
            UsageError: the tokenizer lacks what the template needs.
        """
        return list(voice(self.template, tokenizer).stop)

    def _told(
        self,
        sample: Sample,
        tokenizer: Any,  # noqa: ANN401 - transformers' fast tokenizer
        counts: Sequence[int],
        rng: np.random.Generator | None,
        *,
        seq2seq: bool,
        learn: bool,
    ) -> Encoded:
        speech = voice(self.template, tokenizer)
        asked, answers = self._asked(sample, rng), _answers(sample)
        before, last = Writer(speech, tokenizer), Writer(speech, tokenizer)
        before.system(self.system)
        for number, pieces in enumerate(asked, start=1):
            before.user(pieces, self.question_limit)
            if number < len(asked):
                before.answer(answers[number - 1], self.answer_limit)
        if learn:
            last.answer(answers[-1], self.answer_limit)
        target, parts = None, [*before.parts, *last.parts]
        if seq2seq:
            target = tuple(tokenized(target_of(last.parts), (), tokenizer))
            parts = before.parts
        if seq2seq or not learn:
            parts = [part._replace(learnt=False) for part in parts]
        begin, close = ([Token(*mark) for mark in some] for some in (speech.begin, speech.close))
        close = close if seq2seq else []
        body = tokenized(parts, counts, tokenizer)
        room = self.limit - len(begin) - len(close)
        kept = fitted(body, room, sample.name, left=not (learn or seq2seq))
        cut = before.cut or last.cut or len(kept) < len(body) or len(target or ()) > self.limit
        target = target and target[: self.limit]
        return Encoded((*begin, *kept, *close), target, _plain(asked), cut)

    def _asked(self, sample: Sample, rng: np.random.Generator | None) -> list[list[str]]:
        """Return the user's turns as pieces: words, and `<image>` where one stands."""

        def drawn(among: Sequence[str]) -> str:
            return among[0 if rng is None or len(among) == 1 else int(rng.integers(len(among)))]

        turns = sample.turns or (drawn(self.questions or ("",)),)
        if len(turns) % 2 == 0 or (len(turns) > 1 and not self.template.asks):
            why = "the last turn before the answer is not the user's"
            why = why if self.template.asks else f"template {self.template.name} has one turn"
            msg = f"{sample.name}: {len(turns)} turns, but {why}"
            raise DataError(msg)
        split = [re.split(f"({IMAGE})", turn) for turn in turns[::2]]
        asked = [[piece.strip() for piece in turn if piece.strip()] for turn in split]
        marks, images = sum(pieces.count(IMAGE) for pieces in asked), len(sample.images)
        if not marks and images:
            place = drawn(("first", "last")) if self.place == "random" else self.place
            at = 0 if place == "first" else len(asked[0])
            asked[0][at:at] = [IMAGE] * images
        elif marks != images:
            msg = f"{sample.name}: {marks} {IMAGE} marks for {images} images"
            raise DataError(msg)
        for pieces, answer in zip(asked, _answers(sample), strict=True):
            if words := [i for i, piece in enumerate(pieces) if piece != IMAGE]:
                closed = self.closed if _CLOSED.fullmatch(answer.strip()) else ""
                pieces[words[0]] = f"{self.prefix} {pieces[words[0]]}".strip()
                pieces[words[-1]] = f"{pieces[words[-1]]} {closed}".strip()
        return asked


_CLOSED = re.compile(r"(?:yes|no)\W*", re.IGNORECASE)


def _answers(sample: Sample) -> list[str]:
    return [*sample.turns[1::2], sample.answer]


def _plain(asked: Iterable[Sequence[str]]) -> str:
    return " ".join(piece for pieces in asked for piece in pieces if piece != IMAGE)

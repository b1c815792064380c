"""How long a task's samples are, as far as data and tokenizer are here; else at most."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pathcli.cards import CARDS, Hub
from pathcli.errors import DataError, PathcliError
from pathcli.weights import find

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pathcli.types import Sample

Limit = tuple[float, int, float, bool]

LOOKED = 128
"""So many samples, evenly spaced, are measured."""
_LETTERS = 4
"""Letters in a token of English, about."""


@dataclass(frozen=True)
class Lengths:
    """Tokens of a sample, visual ones among them: the mean, the longest, and those learnt.

    `mean` and `longest` are of what is read at once; an encoder-decoder's answer comes on top.
    `samples` and `images` count the training data, where it is here.
    """

    visual: int
    mean: float
    longest: int
    learnt: float
    split: bool = False
    samples: int | None = None
    images: int | None = None
    notes: tuple[str, ...] = ()

    @property
    def tokens(self) -> float:
        """All tokens of a sample."""
        return self.mean + (self.learnt if self.split else 0)


def lengths_of(task: Any, visual: int, *, given: bool, counted: bool = True) -> Lengths:  # noqa: ANN401
    """Return the lengths of a task's samples; an image becomes `visual` tokens.

    Args:
        task: of a recipe.
        visual: visual tokens of an image.
        given: whether the recipe says where the data are.
        counted: measure texts, not only how many there are.
    """
    limit = _limits(task, visual)
    if not given:
        note = "no data are named yet, so texts count as long as the recipe allows"
        return Lengths(visual, *limit, notes=(note,) if counted else ())
    try:
        corpus = task.data.corpus()
    except PathcliError as error:
        return Lengths(
            visual, *limit, notes=(f"the data: {error}; texts count as long as allowed",)
        )
    train = corpus.train
    images = len({ref for side in (train, corpus.val) for s in side for ref in s.images})
    lengths = Lengths(visual, *limit, samples=len(train), images=images)
    if not len(train) or not counted:
        return lengths
    n = min(len(train), LOOKED)
    some = [train[i * len(train) // n] for i in range(n)]
    return replace(lengths, **_measured(task, visual, some, limit))


def _limits(task: Any, visual: int) -> Limit:  # noqa: ANN401
    """Return mean and longest, learnt, and whether answers are apart, at most."""
    if not hasattr(task, "chat"):
        words = int(task.connector.keywords.get("text_limit", 32)) if visual else 0
        return visual + words, visual + words, words, False
    from pathcli.vlm.language import shape_of  # noqa: PLC0415

    chat, split = task.chat, shape_of(task.language.model).seq2seq
    answer = chat.answer_limit or chat.limit
    asked = visual + chat.question_limit if chat.question_limit else chat.limit
    read = asked if split or not chat.question_limit else min(chat.limit, asked + answer)
    return read, read, min(answer, chat.limit), split


def _measured(task: Any, visual: int, samples: Sequence[Sample], limit: Limit) -> dict[str, Any]:  # noqa: ANN401
    """Return the lengths of samples, by the tokenizer if it is here."""
    _, most, learnt_most, split = limit
    if not hasattr(task, "chat") or not _here(task.language.model):
        said = np.array([len(s.answer) / _LETTERS for s in samples])
        read = np.array([sum(map(len, s.turns)) / _LETTERS for s in samples])
        read += visual * np.array([len(s.images) for s in samples])
        learnt = np.minimum(said, learnt_most)
        words = np.minimum(read if split else read + learnt, most)
        how = f"{_LETTERS} letters are taken for a token, and the template's words left out"
    else:
        rng, words_of = np.random.default_rng(0), task.language.tokenizer
        told, bad = [], None
        for s in samples:
            try:
                counts = [visual] * len(s.images)
                told.append(task.chat.encode(s, words_of, counts, rng, seq2seq=split))
            except DataError as error:
                bad = error
        if bad and not told:
            raise bad
        words = np.array([len(one.ids) for one in told])
        learnt = np.array([sum(label >= 0 for label in one.labels) for one in told])
        how = "by the model's tokenizer"
        if bad:
            how += f"; {len(samples) - len(told)} of them cannot be told ({bad})"
    note = f"the length of texts is that of {len(samples)} samples of the data, {how}"
    return {
        "mean": float(words.mean()),
        "longest": int(np.ceil(words.max())),
        "learnt": float(learnt.mean()),
        "split": split,
        "notes": (note,),
    }


def _here(model: str) -> bool:
    """Tell whether a language model, its tokenizer among it, is on this machine."""
    if Path(model).expanduser().exists():
        return True
    try:
        return find(model if model in CARDS else Hub(model)) is not None
    except PathcliError:
        return False

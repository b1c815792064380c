"""A set of labelled images in, questions with choices to train on out: BACH's, say, as VQA.

Sets with published words (assets/vqa) are asked in these, as PA-LLaVA asked BACH, OSCC and
ColonPath (Dai et al. 2024, arXiv:2408.09530, section III.A.3); any other with its own classes.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pathcli.data.classes import NAMES
from pathcli.data.labelled import open_dataset
from pathcli.errors import UsageError
from pathcli.evals.vqa_cards import SetCard, cards, prompt_of
from pathcli.evals.vqa_data import Question, read_questions, with_images
from pathcli.registry import did_you_mean
from pathcli.types import Sample

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

OWN = "own"
"""Names the classes that a folder or table has itself."""
QUESTION = "Which choice best describes the tissue in this image?"
"""Asked of sets without published words."""


@dataclass(frozen=True)
class Choices:
    """Samples of one turn, whose answer is the right option as it is written there.

    Label and group are kept. `dropped` counts images left out by reason.
    """

    samples: tuple[Sample, ...]
    dropped: Counter[str]
    warnings: tuple[str, ...]


def choices(name: str, data: Path) -> Choices:
    """Return a question for each image of a set.

    Args:
        name: bach, oscc or colonpath; a set of classes we know; or own, for the classes of `data`.
        data: the set's folder, or its table of labels.

    Raises:
        UsageError: no set is called so.
        ResourceError: its files are not there.
        DataError: a table is wrong, or no image is left.
    """
    asked = {key for key, card in cards().items() if card.question}
    if name in asked:
        return _published(name, data)
    if name not in {OWN, *NAMES}:
        msg = f"--choices: {did_you_mean(name, [OWN, *sorted(asked), *NAMES])}"
        raise UsageError(msg)
    classes, found = open_dataset(*((str(data),) if name == OWN else (name, data)))
    texts = {c.key: c.text for c in classes.classes}
    named = {text: key for key, text in texts.items()}
    asked_of = [
        Question(s.name, s.images, QUESTION, texts[s.label], tuple(named), "choice", s.group)
        for s in found.samples
    ]
    rows = tuple(_samples(asked_of, SetCard(), named))
    return Choices(rows, Counter(found.dropped), found.warnings)


def _published(name: str, data: Path) -> Choices:
    found = with_images(read_questions(name, data=data), missing=1.0)
    named = {text: labels[0] for text, labels in found.card.options.items()}
    rows = tuple(_samples(found.questions, found.card, named))
    return Choices(rows, Counter(found.dropped), found.warnings)


def _samples(
    questions: Sequence[Question], card: SetCard, named: Mapping[str, str]
) -> Iterator[Sample]:
    prompt = prompt_of(None, card)
    for asked in questions:
        right = prompt.lines(asked)[asked.options.index(asked.answer)]
        label = named[asked.answer]
        yield Sample(asked.id, asked.images, right, (prompt.words(asked),), label, asked.group)

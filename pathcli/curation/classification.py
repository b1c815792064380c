"""A set of labelled images in, questions with choices out, as PA-LLaVA asked BACH and others.

Sets with published words have them in assets/vqa; any other set is asked with its own classes.
"""

from __future__ import annotations

from dataclasses import replace
from string import ascii_uppercase
from typing import TYPE_CHECKING, Any

from pathcli.data.labelled import open_dataset
from pathcli.errors import DataError, UsageError
from pathcli.weights import asset
from pathcli.yaml12 import read_mapping

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from pathcli.types import Sample

QUESTION = "Which choice best describes the tissue in this image?"
"""Asked of sets without published words."""
_PLAIN = {"option": "{letter}. {text}", "join": "\n", "choice": "{question}\n{options}"}


def choices(name: str, folder: Path | str | None = None) -> Iterator[Sample]:
    """Yield a question for each image of a set: options in the turn, the right one as answer.

    The answer is written as its option is ("B: Benign tumors"); label and group are kept.

    Args:
        name: bach, oscc, colonpath; a set of classes we know; or a folder or table of one's own.
        folder: where the set's images are.

    Raises:
        UsageError: no set is called so, or it needs a folder.
        ResourceError: its files are not there.
        DataError: a table is wrong, or a label is none of the options.
    """
    card = _cards().get(name, {})
    words, labels = (_PLAIN, {}) if not card else (_prompt(card["prompt"]), card["options"])
    if card and folder is None:
        msg = f"{name}: where is it? give its folder; {card['get']}"
        raise UsageError(msg)
    named = str(card.get("classes") or folder) if card else name
    classes, found = open_dataset(named, folder)
    if card:
        texts, question = list(labels), str(card["question"])
        place = {str(one).casefold(): n for n, text in enumerate(texts) for one in labels[text]}
    else:
        texts, question = [c.text for c in classes.classes], QUESTION
        place = {c.key.casefold(): n for n, c in enumerate(classes.classes)}
    options = _options(words, texts)
    turn = words["choice"].format(question=question, options=str(words["join"]).join(options))
    for sample in found.samples:
        if (right := place.get(sample.label.casefold())) is None:
            msg = f"{found.source}: label {sample.label!r} is none of {', '.join(place)}"
            raise DataError(msg)
        yield replace(sample, answer=options[right], turns=(turn,))


def _cards() -> dict[str, Any]:
    """Return the sets that are labelled images with a published question."""
    cards = read_mapping(asset("vqa/sets.yaml"), "a mapping of sets")
    return {name: card for name, card in cards.items() if "question" in card}


def _prompt(name: str) -> dict[str, Any]:
    prompts: dict[str, Any] = read_mapping(asset("vqa/prompts.yaml"), "a mapping of prompts")
    words: dict[str, Any] = _PLAIN | prompts[name]
    return words


def _options(words: dict[str, Any], texts: Sequence[str]) -> list[str]:
    """Return the options as they are written; `option` may say it for each place."""
    forms = words["option"]
    if isinstance(forms, str):
        forms = [forms]
    return [
        forms[min(n, len(forms) - 1)].format(letter=ascii_uppercase[n], text=text)
        for n, text in enumerate(texts)
    ]

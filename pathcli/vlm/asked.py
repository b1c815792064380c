"""Which answers a question allows, and how probable a model finds each of them."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from scipy.special import softmax

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

    from pathcli.types import Sample
    from pathcli.vlm.responders import Responder

YES_NO = ("yes", "no")
_ASKS = re.compile(
    r"\s*(?:is|are|was|were|do|does|did|has|have|had|can|could|would|will|should|may|might|must)\b",
    re.IGNORECASE,
)
_WRAPPED = re.compile(  # "can you tell me what ...": asked politely, and open
    r"\s*(?:can|could|would|will|do)\s+you\s+(?:please\s+)?(?:know\s+|tell\s+(?:me\s+)?|say\s+)?"
    r"(?:what|which|how|where|why|who|name|describe|identify|classify|explain|give|list)\b",
    re.IGNORECASE,
)
_ANYWHERE = re.compile(r"\byes\s*(?:or|/)\s*no\b", re.IGNORECASE)
_WHETHER = re.compile(r"^(?:please\s+)?(?:tell|say|state)\b.*?\b(?:if|whether)\b", re.IGNORECASE)
_BEGINS = re.compile(r"(?:yes|no)\b|[a-h][.):]")
_LETTERED = re.compile(r"(?:^| )\(?([A-H])[.):] (.*?)(?= \(?[A-H][.):] |$)")


def allowed(question: str, taught: Sequence[Sequence[str]] = ()) -> tuple[str, ...]:
    """Return the answers a question allows; none for an open one.

    Lettered options, as "A. benign"; those of `taught` that are named, where there are two or
    more ("Is it a tumor or benign?"); yes and no where the question begins with a verb or says
    so. Of a question whose alternatives are in other words nothing is known: it is open.
    """
    lettered = _LETTERED.findall(" ".join(question.split()))
    if len(lettered) > 1 and [letter for letter, _ in lettered] == list(
        "ABCDEFGH"[: len(lettered)]
    ):
        return tuple(f"{letter}. {text}" for letter, text in lettered)
    for answers in taught:
        named = [a for a in answers if re.search(rf"\b{re.escape(a)}\b", question, re.IGNORECASE)]
        if len(named) > 1:
            return tuple(named)
    if _ANYWHERE.search(question) or _WHETHER.match(question):
        return YES_NO
    chooses = re.search(r"\bor\b(?! not\b)", question, re.IGNORECASE)
    closed = _ASKS.match(question) and not chooses and not _WRAPPED.match(question)
    return YES_NO if closed else ()


def matched(answer: str, options: Sequence[str]) -> str | None:
    """Return which option an answer says: word for word, by its letter, or by its yes or no."""
    said = _plain(answer)
    for option in options:
        if said == _plain(option):
            return option
    for option in options:
        begin = _BEGINS.match(_plain(option))
        if begin and said == begin[0].rstrip(".):"):  # the letter alone
            return option
        if begin and re.match(rf"{re.escape(begin[0])}(?!\w)", said):
            return option
    return None


def _plain(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip(" .").lower()


def probabilities(
    responder: Responder, samples: Sequence[Sample], options: Sequence[Sequence[str]]
) -> list[NDArray[np.float64]] | None:
    """Return each sample's probabilities over its options, which sum to 1, or None.

    The log-probabilities of the options as answers, divided by the model's temperature, where
    one was fitted, and normalised (Guo et al. 2017, arXiv:1706.04599).

    Raises:
        DataError: an image cannot be read.
    """
    found = responder.likelihoods(samples, options)
    if found is None:
        return None
    return [softmax(row / (responder.temperature or 1.0)) for row in found]

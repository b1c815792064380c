"""Tiles' answers in, a slide's answer out, and the rule it was made by in words."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pathcli.errors import DataError
from pathcli.vlm.asked import YES_NO
from pathcli.yaml12 import read_mapping

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    Floats = NDArray[np.floating[Any]]

STATISTICS = ("largest-1", "largest-2", "largest-3", "largest-4", "share")

_HALF = 0.5  # P(yes) from which a tile says yes
_NTH = {"1": "", "2": "second ", "3": "third ", "4": "fourth "}
_FRAME = re.compile(
    r"\b(?:is|are|was|were|do|does|did|can|could|would|will|has|have|there|any|some|you|we|i|it"
    r"|this|that|these|those|the|a|an|in|on|of|at|to|here|what|which|where|who|how|see|seen|find"
    r"|found|show|shown|shows|contain|contains|present|visible|call|called|say|think|tell|me|if"
    r"|please|look|looks|like|yes|no|or|and|not|without|free|only|all|every|evidence|signs?"
    r"|image|picture|patch|slide|tile|scan|photo)\b|[^\w\s-]",
    re.IGNORECASE,
)
_HEALTH = re.compile(
    r"\b(?:benign|normal|healthy|non-?(?:cancer|malign|tumou?r)\w*)\b", re.IGNORECASE
)
_EVERYWHERE = re.compile(r"\b(?:no|without|free|only|all|every)\b", re.IGNORECASE)
_SOMEWHERE = re.compile(
    r"\b(?:(?:is|are) there|see|find|seen|found|present|visible|contains?|shows?)\b", re.IGNORECASE
)
_YES_OR_NO = re.compile(r"\byes or no\b", re.IGNORECASE)


def subject(question: str) -> str:
    """Return what a question is about, which tiles are compared with: its words without the asking.

    "Is there a tumor on this slide?" is about "tumor". A question of such words alone is about
    itself.
    """
    words = [word.strip("-") for word in _FRAME.sub(" ", question).split()]
    return " ".join(filter(None, words)) or question


def asks_of_all(question: str) -> bool:
    """Tell whether yes must hold of all tiles ("is it benign?", "is there no tumor?").

    All other questions of yes and no are of presence: one place is enough for a yes.
    """
    said = _YES_OR_NO.sub(" ", question)
    if _EVERYWHERE.search(said):
        return True
    return bool(_HEALTH.search(said)) and not _SOMEWHERE.search(said)


def seeks_the_opposite(question: str) -> bool:
    """Tell whether tiles unlike the words speak against a yes: is all of the slide benign?"""
    return asks_of_all(question) and bool(_HEALTH.search(question))


@dataclass(frozen=True)
class Presence:
    """How tiles' P(yes) become a slide's yes or no.

    The slide is answered yes where the `statistic` of the tiles read reaches the `threshold`:
    `largest-K` is the K-th largest P(yes) (of fewer tiles, the least), `share` is the share of
    tiles with P(yes) of at least 0.5. A rule that was fitted says on what (`fitted_on`), holds
    under its `conditions` alone and for questions with one of its `words`, and gives the share
    of those slides on which it was `right` when it said yes, and when it said no.
    """

    statistic: str = "largest-1"
    threshold: float = _HALF
    fitted_on: str = ""
    words: tuple[str, ...] = ()
    conditions: Mapping[str, Any] = field(default_factory=dict)
    right: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Presence:
        """Read a rule that was fitted.

        Raises:
            ResourceError: the file cannot be read.
            DataError: it is no such rule.
        """
        values = read_mapping(path, "a rule has statistic, threshold and fitted_on")
        try:
            found = cls(**values | {"words": tuple(values["words"])})
        except (KeyError, TypeError) as error:
            msg = f"{path}: not a rule for slides ({error}); benchmarks/ask_slide.py writes one"
            raise DataError(msg) from error
        if found.statistic not in STATISTICS:
            msg = f"{path}: no statistic {found.statistic!r}; there are {', '.join(STATISTICS)}"
            raise DataError(msg)
        return found

    def value(self, chances: Floats) -> float:
        """Return the statistic of tiles' P(yes), float [n], n of at least 1."""
        if self.statistic == "share":
            return float((chances >= _HALF).mean())
        place = min(int(self.statistic.removeprefix("largest-")), len(chances))
        return float(np.sort(chances)[-place])

    def measured(self, answer: str) -> str:
        """Say what is compared with the threshold, for tiles' P(`answer`)."""
        if self.statistic == "share":
            return f"the share of tiles with P({answer}) of at least {_HALF}"
        return f"the {_NTH[self.statistic.removeprefix('largest-')]}largest P({answer}) of a tile"

    def unfit(self, question: str, here: Mapping[str, Any]) -> str:
        """Say why a rule that was fitted is not one for this question here, or nothing."""
        other = [name for name, value in self.conditions.items() if here.get(name) != value]
        if other:
            return f"its rule for slides was fitted with another {' and '.join(other)}"
        if not any(word in question.lower() for word in self.words) or asks_of_all(question):
            return f"its rule for slides was fitted for questions of {', '.join(self.words)}"
        return ""


class Verdict(NamedTuple):
    """A slide's answer; `scores` as in `SlideAnswer`."""

    text: str
    confidence: float | None
    abstained: bool
    rule: str
    scores: Mapping[str, float]


class Said(NamedTuple):
    """What a tile was answered, and its probability; of yes and no, that of yes.

    `chances` are the probabilities of all answers allowed, none where the model gives none.
    """

    answer: str
    probability: float | None = None
    chances: tuple[float, ...] = ()


def combine(
    question: str,
    options: Sequence[str],
    said: Sequence[Said],
    rule: Presence,
    here: Mapping[str, Any],
) -> Verdict:
    """Return the slide's answer.

    Args:
        question: what each tile was asked.
        options: the answers it allows; none for an open one.
        said: the tiles' answers, at least one.
        rule: for questions of yes and no.
        here: what the rule's conditions are compared with.
    """
    valid = [s for s in said if s.answer in options] if options else said
    if not valid:
        told = f"none of {len(said)} tiles was answered with one of: {', '.join(options)}"
        return Verdict("no answer that the question allows", None, True, told, {})  # noqa: FBT003
    if tuple(options) == YES_NO:
        return _yes_or_no(question, valid, rule, here)
    if options:
        return _choice(options, valid)
    counts = Counter(plain(s.answer) for s in valid).most_common()
    listed = "; ".join(f"{name} ({count} of {len(valid)} tiles)" for name, count in counts)
    told = "the tiles' answers, the most frequent first; uncalibrated"
    scores = {name: count / len(valid) for name, count in counts}
    return Verdict(listed, None, False, told, scores)  # noqa: FBT003


def _choice(options: Sequence[str], said: Sequence[Said]) -> Verdict:
    """Return what is most probable over the tiles, so that undecided tiles count for little."""
    votes = np.array([s.chances or [float(s.answer == option) for option in options] for s in said])
    scores = dict(zip(options, votes.mean(0).tolist(), strict=True))
    order = sorted(options, key=lambda option: -scores[option])
    most = sum(s.answer == order[0] for s in said)
    told = "the largest mean probability" if said[0].chances else "the answer of most tiles"
    told += f": {scores[order[0]]:.3f} over {len(said)} tiles, {most} of which are answered so"
    ranked = {option: scores[option] for option in order}
    return Verdict(order[0], None, False, f"{told}; uncalibrated", ranked)  # noqa: FBT003


def _yes_or_no(
    question: str, said: Sequence[Said], rule: Presence, here: Mapping[str, Any]
) -> Verdict:
    """Return yes where one place is enough for it, or no where one place speaks against it."""
    counts = Counter(s.answer for s in said)
    scores = {name: n / len(said) for name, n in counts.most_common()}
    unfit = rule.unfit(question, here) if rule.fitted_on else "no rule for slides was fitted"
    used = Presence() if unfit else rule
    sought, other = YES_NO[::-1] if asks_of_all(question) else YES_NO
    chances = np.array([s.probability for s in said], np.float64)
    value = used.value(1 - chances if sought == "no" else chances)
    text = sought if value >= used.threshold else other
    told = (
        f"{sought} if {used.measured(sought)}, here {value:.3f} of {len(said)} tiles, is at least "
        f"{used.threshold:.3g}, else {other}; "
    )
    told += f"uncalibrated: {unfit}" if unfit else f"fitted on {used.fitted_on}"
    return Verdict(text, used.right.get(text), False, told, scores)  # noqa: FBT003


def plain(text: str) -> str:
    """Return an answer as it is counted: one space, no full stop."""
    return re.sub(r"\s+", " ", text).strip(" .")

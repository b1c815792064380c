"""Questions and what was answered in, numbers by named rules with honest intervals out.

Intervals draw whole groups anew where questions carry one, else images with all their
questions. A question asked in several orders of its options counts once, with its mean.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from pathcli.errors import DataError
from pathcli.metrics import vqa as rules
from pathcli.metrics.answers import (
    UNMAPPED,
    chance,
    chosen,
    classification,
    consistency,
    right_option,
)
from pathcli.metrics.statistics import Interval, bootstrap, holm, paired_bootstrap
from pathcli.metrics.vqa_text import words

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from pathcli.evals.vqa_data import Question, QuestionSet
    from pathcli.metrics.answers import Scored
    from pathcli.metrics.vqa import Rule

    Ints = NDArray[np.int64]
    Floats = NDArray[np.float64]

REPLICATES = 2000
HEADLINE = {"closed": "closed-first-word", "open": "open-recall", "choice": "choice"}
"""The rule of each kind of question that `overall` mixes and that tables by type show."""

OVERALL = "overall"
MADE_OF = {
    OVERALL: "Mixture, of each question its kind's rule: "
    + ", ".join(f"{rule} ({kind})" for kind, rule in HEADLINE.items()),
    "consistency": "Questions answered alike in all orders of their options.",
    "agreement": "Pairs of orders of a question's options answered alike.",
    "macro_recall": "Options as classes: mean recall; an answer of no class is wrong.",
    "macro_precision": "Options as classes: mean precision; a class never said has 0.",
}
"""What the numbers are that are no rules."""

_YES_NO = {"yes", "no"}
_ITSELF_AND_ONE = 2


@dataclass(frozen=True)
class Prediction:
    """What was answered to a question whose options were shown in `order` (() as they are)."""

    id: str
    text: str
    order: tuple[int, ...] = ()


Answers = dict[str, tuple[Prediction, ...]]
"""The answers to each question, by its id; several where its options changed places."""


@dataclass(frozen=True)
class Answered:
    """Questions and the answers of one model, one or several to each; rules beside `RULES`."""

    asked: QuestionSet
    answers: Mapping[str, Sequence[Prediction]]
    model: str
    more: tuple[Rule, ...] = ()

    @cached_property
    def rules(self) -> dict[str, Rule]:
        """The rules that are applied, by name."""
        return rules.RULES | {rule.name: rule for rule in self.more}

    def of(self, asked: QuestionSet) -> Answered:
        """Return the answers to some of the questions."""
        return replace(self, asked=asked)

    @cached_property
    def questions(self) -> tuple[Question, ...]:
        """The questions, in order."""
        return self.asked.questions

    @cached_property
    def flat(self) -> list[tuple[int, str, tuple[str, ...]]]:
        """Every answer: the question's place, what was said, the options as shown."""
        return [
            (i, said.text, tuple(q.options[j] for j in said.order) or q.options)
            for i, q in enumerate(self.questions)
            for said in self.answers[q.id]
        ]

    @cached_property
    def picks(self) -> list[Ints]:
        """For each question the options its answers choose, as they are numbered in it."""
        places = chosen([said for _, said, _ in self.flat], [shown for *_, shown in self.flat])
        at, picks = iter(places.tolist()), []
        for question in self.questions:
            orders = [said.order for said in self.answers[question.id]]
            of = [(order, next(at)) for order in orders]
            picks.append(
                np.array([order[p] if order and p != UNMAPPED else p for order, p in of], np.int64)
            )
        return picks

    @cached_property
    def headline(self) -> dict[str, Scored]:
        """The score [n] of each question by the rules of `HEADLINE`, and their mixture."""
        every = {rule: self._score(rules.RULES[rule]) for rule in HEADLINE.values()}
        found = {rule: row for rule, row in every.items() if not np.isnan(row).all()}
        return {OVERALL: rules.mixture(*found.values()), **found}

    @cached_property
    def values(self) -> dict[str, Scored]:
        """The score [n] of each question by every rule that applies to any, and `overall`."""
        more = {
            name: self._score(rule)
            for name, rule in self.rules.items()
            if name not in self.headline
        }
        return self.headline | {k: row for k, row in more.items() if not np.isnan(row).all()}

    def _score(self, rule: Rule) -> Scored:
        """Return the mean [n] over a question's answers, nan where the rule says nothing."""
        sums, times = np.zeros(len(self.questions)), np.zeros(len(self.questions))
        for i, said, shown in self.flat:
            question = self.questions[i]
            if rule.applies in {"all", question.kind}:
                text = self._spelt(i, said, shown) if rule.source == rules.OURS else said
                sums[i] += rule.score(text, question.answer, shown)
                times[i] += 1
        with np.errstate(invalid="ignore"):
            return np.asarray(sums / times)

    def _spelt(self, i: int, said: str, shown: tuple[str, ...]) -> str:
        """Return what was said; if it has neither yes nor no but these were options, the choice."""
        if shown and self.questions[i].kind == "closed" and not _YES_NO & set(words(said)):
            place = int(chosen([said], [shown])[0])
            return said if place == UNMAPPED else shown[place]
        return said

    @cached_property
    def steady(self) -> dict[str, Scored]:
        """Whether [n] a question is answered alike in all orders, and what share of pairs of them.

        `consistency` and `agreement`, nan for questions asked once; nothing where all were.
        """
        found = [consistency(picks[None]) if len(picks) > 1 else None for picks in self.picks]
        if not any(found):
            return {}
        return {
            "consistency": np.array([f.alike[0] if f else np.nan for f in found]),
            "agreement": np.array([f.agreement[0] if f else np.nan for f in found]),
        }

    def counts(self) -> dict[str, int]:
        """Return how many answers are empty, and how many say none of what was allowed."""
        kinds = [self.questions[i].kind for i, *_ in self.flat]
        spelt = [self._spelt(*each) for each in self.flat]
        no_word = sum(
            kind == "closed" and not _YES_NO & set(words(said))
            for kind, said in zip(kinds, spelt, strict=True)
        )
        no_option = sum(
            int((p == UNMAPPED).sum())
            for q, p in zip(self.questions, self.picks, strict=True)
            if q.kind == "choice"
        )
        return {
            "questions": len(self.questions),
            "answers": len(self.flat),
            "empty": sum(not said.strip() for _, said, _ in self.flat),
            "closed, neither yes nor no": no_word,
            "choice, none of the options": no_option,
        }


# --- intervals ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Sums:
    """Scores added up by unit and column: `sums` and `counts` are [units, columns].

    The statistic is the mean over columns of each column's mean; a column without scores in a
    resample is left out of it.
    """

    sums: Floats
    counts: Floats

    def __call__(self, rows: NDArray[np.intp]) -> float:
        """Return the statistic of units (with repeats)."""
        counts = self.counts[rows].sum(0)
        there = counts > 0
        means = self.sums[rows].sum(0)[there] / counts[there]
        return float(means.mean()) if there.any() else float("nan")


def summed(row: Scored, units: Sequence[str], columns: Sequence[str] | None = None) -> Sums:
    """Return the scores [n] that are not nan, by unit and by column (default: one column)."""
    known = ~np.isnan(row)
    _, unit = np.unique(np.array(units, object).astype(str), return_inverse=True)
    _, column = np.unique(np.array(columns or [""] * len(row)).astype(str), return_inverse=True)
    shape = (int(unit.max()) + 1, int(column.max()) + 1)
    sums, counts = np.zeros(shape), np.zeros(shape)
    np.add.at(sums, (unit[known], column[known]), row[known])
    np.add.at(counts, (unit[known], column[known]), 1.0)
    used = counts.sum(1) > 0
    return Sums(sums[used], counts[used])


def interval(found: Sums, replicates: int = REPLICATES) -> Interval:
    """Return the statistic with its interval, units drawn anew."""
    if not len(found.sums):
        return Interval(float("nan"), float("nan"), float("nan"), 0, method="undefined")
    return bootstrap(found, range(len(found.sums)), replicates=replicates)


def measure_vqa(answered: Answered, replicates: int = REPLICATES) -> dict[str, Interval]:
    """Return every rule's mean over its questions by name, and what is made of several.

    `overall` mixes the rules of `HEADLINE`; `<rule>.macro` is the mean over types of question
    of each type's mean, for those and `overall`. Rules for any question have `<rule>.closed`
    and so on as well. With options in several orders come `consistency` (questions answered
    alike in all orders) and `agreement` (pairs of orders answered alike); where all questions
    have the same options, `macro_recall` and `macro_precision` of them as classes.
    """
    questions = answered.questions
    units, types = [q.unit for q in questions], [q.type for q in questions]
    kinds = np.array([q.kind for q in questions])
    found = {}
    for name, row in answered.values.items():
        found[name] = interval(summed(row, units), replicates)
        if name == OVERALL or name in HEADLINE.values():
            found[f"{name}.macro"] = interval(summed(row, units, types), replicates)
        if name != OVERALL and answered.rules[name].applies == "all" and len(set(kinds)) > 1:
            for kind in sorted(set(kinds.tolist())):
                part = np.where(kinds == kind, row, np.nan)
                found[f"{name}.{kind}"] = interval(summed(part, units), replicates)
    for name, row in answered.steady.items():
        found[name] = interval(summed(row, units), replicates)
    return found | dict(_as_classes(answered, units, replicates))


def _as_classes(
    answered: Answered, units: Sequence[str], replicates: int
) -> Iterator[tuple[str, Interval]]:
    """Yield what PA-LLaVA's Table II has, where all questions have one list of options."""
    options = {q.options for q in answered.questions}
    if len(options) > 1 or not next(iter(options)):
        return
    labels = np.array([right_option(q.answer, q.options) for q in answered.questions], np.int64)
    votes = [p[0] if len(p) == 1 else consistency(p[None]).vote[0] for p in answered.picks]
    picks = np.array(votes, np.int64)

    def recall(rows: NDArray[np.intp]) -> float:
        return classification(labels[rows], picks[rows]).recall

    def precision(rows: NDArray[np.intp]) -> float:
        return classification(labels[rows], picks[rows]).precision

    for name, statistic in (("macro_recall", recall), ("macro_precision", precision)):
        strata = labels.tolist()
        yield name, bootstrap(statistic, units, replicates=replicates, strata=strata)


# --- by type, baselines, comparison ------------------------------------------------------


def majority(asked: QuestionSet) -> Answered:
    """Return the answers of one who knows no image: of each type the commonest reference.

    Of questions with options it is the place that is right most often. It has seen the
    references it is measured by.
    """
    seen: dict[str, Counter[str]] = {}
    for question in asked.questions:
        seen.setdefault(_slot(question), Counter())[_said(question)] += 1
    answers = {
        q.id: (Prediction(q.id, seen[_slot(q)].most_common(1)[0][0]),) for q in asked.questions
    }
    return Answered(asked, answers, "majority answer")


def _slot(question: Question) -> str:
    return f"{question.kind} {question.type}"


def _said(question: Question) -> str:
    if question.kind != "choice":
        return question.answer.casefold()
    return chr(ord("A") + right_option(question.answer, question.options))


def guessing(asked: QuestionSet) -> float:
    """Return the share of questions with options that guessing answers; nan without any."""
    return chance([q.options for q in asked.questions if q.kind == "choice"])


TypeRow = tuple[str, str, int, Interval, list[float]]
"""A type's name, kind and number of questions, its score, and others' scores."""


def by_type(
    answered: Answered, others: Sequence[Answered] = (), replicates: int = REPLICATES
) -> list[TypeRow]:
    """Return for each type its kind, how many, its `overall` score, and those of `others`."""
    rows = []
    for slot in sorted({_slot(q) for q in answered.questions}):
        here = np.array([_slot(q) == slot for q in answered.questions])
        kind, _, name = slot.partition(" ")
        units = [q.unit for q in answered.questions]
        row = np.where(here, answered.headline[OVERALL], np.nan)
        means = [float(other.headline[OVERALL][here].mean()) for other in others]
        rows.append((name, kind, int(here.sum()), interval(summed(row, units), replicates), means))
    return rows


@dataclass(frozen=True)
class Difference:
    """One rule's mean of two models, the difference with its interval, and p by Holm."""

    rule: str
    ours: float
    theirs: float
    difference: Interval
    p: float


def compare(a: Answered, b: Answered, replicates: int = REPLICATES) -> list[Difference]:
    """Return the differences a - b of `overall` and of each kind's rule, units drawn in pairs.

    Where all questions are of one kind, `overall` is its rule and is not tested again.

    Raises:
        DataError: they answered other questions.
    """
    if [q.id for q in a.questions] != [q.id for q in b.questions]:
        msg = f"{a.model} and {b.model} answered other questions; compare answers to one set"
        raise DataError(msg)
    units = [q.unit for q in a.questions]
    found = []
    for name, row in a.headline.items():
        if name == OVERALL and len(a.headline) == _ITSELF_AND_ONE:
            continue
        one, two = summed(row, units), summed(b.headline[name], units)
        every = np.arange(len(one.sums))
        told = paired_bootstrap(one, two, every.tolist(), replicates=replicates)
        found.append((name, one(every), two(every), *told))
    adjusted = holm([p for *_, p in found])
    return [Difference(*row[:4], p) for row, p in zip(found, adjusted, strict=True)]


@dataclass(frozen=True)
class Outcome:
    """All an evaluation found.

    `blind` are the same model's answers to other images, `rival` another model's answers;
    `facts` say how the model was asked.
    """

    ours: Answered
    numbers: Mapping[str, Interval]
    blind: Answered | None = None
    rival: Answered | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def majority(self) -> Answered:
        """What one who knows no image answers."""
        return majority(self.ours.asked)

    @cached_property
    def types(self) -> list[TypeRow]:
        """Each type's kind, questions and score, and the majority answer's."""
        return by_type(self.ours, [self.majority])

    @cached_property
    def differences(self) -> list[Difference]:
        """How ours differ from the rival's."""
        return compare(self.ours, self.rival) if self.rival else []

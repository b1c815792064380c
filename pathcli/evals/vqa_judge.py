"""Open answers and a language model in, the marks it gives them from 1 to 10 out.

PA-LLaVA's Table IV has GPT-4 mark descriptions so; its words are not published, these are ours.
Marks of two judges are not comparable, so the judge's name stands beside them. Only questions,
references and answers are sent, never an image.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pathcli.errors import UsageError
from pathcli.evals.vqa_scores import REPLICATES, summed
from pathcli.llm import Message
from pathcli.metrics.statistics import bootstrap

if TYPE_CHECKING:
    from pathcli.evals.vqa_data import QuestionSet
    from pathcli.evals.vqa_scores import Answered
    from pathcli.llm import Client
    from pathcli.metrics.answers import Scored
    from pathcli.metrics.statistics import Interval

ABOUT = "Mean mark of a language model, 1 to 10, for how alike answer and reference are in meaning."
WORDS = """\
Two answers to one question about a pathology image follow: a pathologist's, and another. How \
alike are they in meaning? 1 is nothing in common, or the opposite; 10 is the same meaning in \
whatever words. What the second adds counts neither way unless it contradicts the first. Reply \
with one whole number from 1 to 10 and nothing else.

Question: {question}
The pathologist: {answer}
The other: {said}"""
LOWEST, HIGHEST = 1.0, 10.0
_MARK = re.compile(r"(?<![\d.])(10|[1-9])(?!\d)")
_SCALE = re.compile(r"\b1\s*(?:to|-|\u2013)\s*10\b")  # said again, it is no mark


@dataclass(frozen=True)
class Judged:
    """A judge's name, its marks [n] (nan where it gave none), and how many it did not give."""

    judge: str
    marks: Scored
    unread: int


def refuse_unless_open(asked: QuestionSet) -> None:
    """Refuse a set without a question that a judge could mark.

    Raises:
        UsageError: there is none.
    """
    if not any(question.kind == "open" for question in asked.questions):
        msg = f"--judge marks open questions, and {asked.name} has none"
        raise UsageError(msg)


def judge(answered: Answered, client: Client) -> Judged:
    """Return the marks of all open questions; an empty answer has the lowest without asking.

    Raises:
        UsageError: there is no open question.
        PathcliError: the endpoint cannot be asked; see `Client.ask`.
    """
    questions = answered.questions
    marks = np.full(len(questions), np.nan)
    said = {i: answered.answers[q.id][0].text for i, q in enumerate(questions) if q.kind == "open"}
    refuse_unless_open(answered.asked)
    marks[[i for i, text in said.items() if not text.strip()]] = LOWEST
    asked = {i: text for i, text in said.items() if text.strip()}
    conversations = (
        [Message("user", (WORDS.format(question=q.question, answer=q.answer, said=text),))]
        for q, text in ((questions[i], text) for i, text in asked.items())
    )
    for i, reply in zip(asked, client.ask_all(conversations), strict=True):
        if found := _MARK.search(_SCALE.sub("", reply)):
            marks[i] = float(found[1])
    return Judged(client.model, marks, int(np.isnan(marks[list(said)]).sum()))


def judge_interval(answered: Answered, judged: Judged, replicates: int = REPLICATES) -> Interval:
    """Return the mean mark with its interval, units drawn anew, the judge held fixed."""
    found = summed(judged.marks, [q.unit for q in answered.questions])
    units, limits = range(len(found.sums)), (LOWEST, HIGHEST)
    return bootstrap(found, units, replicates=replicates, limits=limits)

"""How well questions about images are answered, by rules with names.

A score of a row is a number in 0..1, and nan where the rule says nothing of the row: means,
intervals and comparisons leave those rows out. Four kinds of row: closed (the reference is yes
or no), choice (it has options), open (neither), and all of them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache, partial
from math import nan
from typing import TYPE_CHECKING, Literal

import numpy as np

from pathcli.errors import DataError, UsageError
from pathcli.metrics import vqa_text as text
from pathcli.metrics.answers import Options, Scored, right_option

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Sequence

Kind = Literal["closed", "open", "choice", "all"]
_YES_NO = ("yes", "no")


@dataclass(frozen=True)
class Rule:
    """A rule with a name: what it does in a sentence, whose it is, and the score of a row.

    `score(prediction, answer, options)` is in 0..1, or nan where the rule drops the row.
    """

    name: str
    about: str
    source: str
    applies: Kind
    score: Callable[[str, str, Options], float]


def kind(answer: str, options: Options = ()) -> Literal["closed", "open", "choice"]:
    """Return what kind of row it is; yes or no among three options or more is a choice."""
    if closed(answer) and len(options) <= len(_YES_NO):
        return "closed"
    return "choice" if options else "open"


def closed(answer: str) -> bool:
    """Return whether the reference is yes or no, case and punctuation aside."""
    return text.normalise(answer) in _YES_NO


# --- closed questions --------------------------------------------------------------------


def _llava_med(prediction: str, answer: str, _: Options) -> float:
    said = text.normalise(prediction)
    return float(any(word in said for word in _YES_NO) and text.normalise(answer) in said)


def _llava_med_omitting(prediction: str, answer: str, options: Options) -> float:
    said = text.normalise(prediction)
    hit = _llava_med(prediction, answer, options)
    return hit if hit or not any(word in said for word in _YES_NO) else nan


def _quilt(prediction: str, answer: str, _: Options) -> float:
    said = text.normalise(prediction).split()
    return float(("no" if {"no", "not"} & set(said) else "yes") == text.normalise(answer))


def _quilt_token(prediction: str, answer: str, _: Options) -> float:
    return float(text.normalise(answer) in text.normalise(prediction).split())


def _first_word(prediction: str, answer: str, _: Options) -> float:
    first = next((word for word in text.words(prediction) if word in _YES_NO), "")
    return float(first == text.normalise(answer))


# --- words in common ---------------------------------------------------------------------


def _exact(prediction: str, answer: str, _: Options) -> float:
    return float(text.normalise(prediction) == text.normalise(answer))


def _pa_llava(prediction: str, answer: str, _: Options) -> float:
    return float(text.pa_llava_text(prediction) == text.pa_llava_text(answer))


def _overlap(
    tokens: Callable[[str], list[str]], part: int, prediction: str, answer: str, _: Options
) -> float:
    return text.overlap(tokens(prediction), tokens(answer))[part]


def _distinct(
    tokens: Callable[[str], list[str]], prediction: str, answer: str, _: Options
) -> float:
    return text.distinct_share(tokens(prediction), tokens(answer))


def _bleu(order: int, prediction: str, answer: str, _: Options) -> float:
    return text.bleu(_med_counts(prediction, answer), order)


@lru_cache(1 << 14)
def _med_counts(prediction: str, answer: str) -> text.Counts:
    return text.ngram_counts(text.llava_med_tokens(prediction), text.llava_med_tokens(answer))


def _pathvqa_bleu(order: int, prediction: str, answer: str, _: Options) -> float:
    return text.pathvqa_bleu(prediction, answer, order)


# --- multiple choice ---------------------------------------------------------------------


def _chosen(
    parse: Callable[[str, Options], int | None], prediction: str, answer: str, options: Options
) -> float:
    return float(parse(prediction, options) == right_option(answer, options))


def _pathmmu(prediction: str, answer: str, options: Options) -> float:
    right = right_option(answer, options)
    same = prediction.strip() == text.option_texts(options)[right]
    return float(same or text.pathmmu_choice(prediction, options) == right)


def _before_colon(prediction: str, answer: str, options: Options) -> float:
    letter = chr(ord("A") + right_option(answer, options))
    return float(prediction.partition(":")[0].strip() == letter)


# --- the rules ---------------------------------------------------------------------------

LLAVA_MED = "LLaVA-Med, llava/eval/run_eval.py (fc39e79)"
QUILT = "Quilt-LLaVA, llava/eval/quilt_eval.py"
PATHVQA = "PathVQA, evaluation_script.py"
PA_LLAVA = "PA-LLaVA, VQAEval.py"
OURS = "ours"

_MED, _LETTERS = text.llava_med_tokens, text.pathvqa_tokens
_COUNTED = "a token of both counts as often as the reply says it, and no overlap is 0"

_ALL_RULES = (
    # closed
    Rule(
        "closed-llava-med",
        "Hit if the normalised reply holds the characters yes or no and those of the reference, "
        "so 'normal' says no and a reply with both words is right.",
        LLAVA_MED,
        "closed",
        _llava_med,
    ),
    Rule(
        "closed-llava-med-omitting",
        "As closed-llava-med, but a reply that says only the other word is left out of the count, "
        "as the published code does; it comes out too high.",
        LLAVA_MED,
        "closed",
        _llava_med_omitting,
    ),
    Rule(
        "closed-quilt",
        "The reply means no if no or not is among its tokens, and yes if not.",
        QUILT,
        "closed",
        _quilt,
    ),
    Rule(
        "closed-quilt-token",
        "Hit if the reference is among the tokens of the reply, whatever else is.",
        QUILT,
        "closed",
        _quilt_token,
    ),
    Rule(
        "closed-exact",
        "Hit if the reply is the reference after VQA normalisation, and nothing more.",
        "common practice",
        "closed",
        _exact,
    ),
    Rule(
        "closed-first-word",
        "The first word of the reply that is yes or no is what it says, without one the option it "
        "chooses where yes and no are options; else it is wrong.",
        OURS,
        "closed",
        _first_word,
    ),
    # open
    Rule(
        "open-recall",
        f"Share of the reference's normalised tokens that the reply has; {_COUNTED}.",
        LLAVA_MED,
        "open",
        partial(_overlap, _MED, 1),
    ),
    Rule(
        "open-precision",
        f"Share of the reply's normalised tokens that the reference has; {_COUNTED}.",
        LLAVA_MED,
        "open",
        partial(_overlap, _MED, 0),
    ),
    Rule(
        "open-f1",
        f"Harmonic mean of open-recall and open-precision; {_COUNTED}.",
        LLAVA_MED,
        "open",
        partial(_overlap, _MED, 2),
    ),
    Rule(
        "open-llava-med-exact",
        "What LLaVA-Med calls exact match: distinct normalised tokens in common over all tokens "
        "of the reply.",
        LLAVA_MED,
        "open",
        partial(_distinct, _MED),
    ),
    Rule(
        "open-pathvqa-exact",
        "What PathVQA calls exact match: distinct letters-only tokens in common over all tokens "
        "of the reply.",
        PATHVQA,
        "open",
        partial(_distinct, _LETTERS),
    ),
    Rule(
        "open-pathvqa-f1",
        f"F1 of tokens of which all but the letters a to z is dropped; {_COUNTED}.",
        PATHVQA,
        "open",
        partial(_overlap, _LETTERS, 2),
    ),
    *(
        Rule(
            f"open-pathvqa-bleu-{order}",
            f"BLEU up to {order} letters-only tokens with equal weights, lengths in characters "
            "and orders without a match skipped.",
            PATHVQA,
            "open",
            partial(_pathvqa_bleu, order),
        )
        for order in (1, 2, 3)
    ),
    *(
        Rule(
            f"bleu-{order}",
            f"Sentence BLEU up to {order} normalised tokens, unsmoothed: 0 where an order has no "
            f"match, so also where the reply has fewer than {order}.",
            "Papineni 2002, tokens of LLaVA-Med",
            "open",
            partial(_bleu, order),
        )
        for order in range(1, text.ORDERS + 1)
    ),
    # multiple choice
    Rule(
        "choice",
        "The reply chooses an option by its text or letter (announced, in brackets, heading a "
        "line, alone), of several the last; a reply that chooses none is wrong.",
        OURS,
        "choice",
        partial(_chosen, text.choice),
    ),
    Rule(
        "choice-pathmmu",
        "The right option's text alone, else PathMMU's parser: '(A)', else ' A ', else in replies "
        "of over five words an option's text, of several the last; where it would guess at "
        "random the reply is wrong.",
        "PathMMU, main.py and eval_utils.py",
        "choice",
        _pathmmu,
    ),
    Rule(
        "choice-pa-llava",
        "Hit if what stands before the first colon of the reply is the right letter.",
        PA_LLAVA,
        "choice",
        _before_colon,
    ),
    # any question
    Rule(
        "exact",
        "Hit if the reply is the reference after VQA normalisation.",
        "VQA (GT-Vision-Lab), tokens of LLaVA-Med",
        "all",
        _exact,
    ),
    Rule(
        "exact-pa-llava",
        "Hit if the reply is the reference, both in lower case and without punctuation.",
        PA_LLAVA,
        "all",
        _pa_llava,
    ),
)
RULES: dict[str, Rule] = {rule.name: rule for rule in _ALL_RULES}


def language_recall(tokens: Callable[[str], Sequence[object]], tokenizer: str) -> Rule:
    """Return PA-LLaVA's recall over the tokens of a language model.

    `tokens` cuts a text into tokens without special ones; `tokenizer` names it in reports.
    """

    def score(prediction: str, answer: str, _: Options) -> float:
        said, meant = (tokens(text.pa_llava_text(words)) for words in (prediction, answer))
        return text.multiset_recall(said, meant)

    about = (
        f"Share of the reference's tokens ({tokenizer}) that the reply has, each as often as it "
        "has it, both in lower case and without punctuation."
    )
    return Rule("recall-pa-llava", about, PA_LLAVA, "all", score)


def scores(
    rule: str | Rule,
    predictions: Sequence[str],
    answers: Sequence[str],
    options: Sequence[Options] | None = None,
) -> Scored:
    """Return the score of each row [n] by a rule, nan where it does not apply.

    Raises:
        UsageError: no rule has this name.
        DataError: the lists differ in length, or a reference is none of its row's options.
    """
    if isinstance(rule, str):
        if rule not in RULES:
            msg = f"no rule is called {rule!r}; there are {', '.join(RULES)}"
            raise UsageError(msg)
        rule = RULES[rule]
    listed = [()] * len(answers) if options is None else options
    if not len(predictions) == len(answers) == len(listed):
        counts = f"{len(predictions)} predictions, {len(answers)} answers, {len(listed)} options"
        msg = f"{counts} do not fit; every row has one of each"
        raise DataError(msg)
    row = [
        rule.score(*asked) if rule.applies in ("all", kind(*asked[1:])) else nan
        for asked in zip(predictions, answers, listed, strict=True)
    ]
    return np.array(row, np.float64)


# --- means -------------------------------------------------------------------------------


def micro(row: Scored) -> float:
    """Return the mean over the rows a rule applies to; nan without any."""
    known = row[~np.isnan(row)]
    return float(known.mean()) if len(known) else nan


def by_type(row: Scored, types: Sequence[Hashable]) -> dict[Hashable, tuple[float, int]]:
    """Return for each type of question the mean and the number of rows the rule applies to."""
    if len(row) != len(types):
        msg = f"{len(row)} scores but {len(types)} types; both are given once a row"
        raise DataError(msg)
    parts: dict[Hashable, list[float]] = {}
    for score, of_type in zip(row.tolist(), types, strict=True):
        if not np.isnan(score):
            parts.setdefault(of_type, []).append(score)
    return {name: (float(np.mean(part)), len(part)) for name, part in parts.items()}


def macro(row: Scored, types: Sequence[Hashable]) -> float:
    """Return the mean over types of question of their means; nan without any."""
    means = [mean for mean, _ in by_type(row, types).values()]
    return float(np.mean(means)) if means else nan


def mixture(*rows: Scored) -> Scored:
    """Return for each row the first score that is not nan.

    `micro` of closed accuracy and open recall is what papers call overall.
    """
    mixed = rows[0].copy()
    for row in rows[1:]:
        mixed = np.where(np.isnan(mixed), row, mixed)
    return mixed


def question_type(question: str, answer: str = "") -> str:
    """Return PathVQA's type of a question: yes/no, how many, or its first question word."""
    if closed(answer):
        return "yes/no"
    asked = " ".join(text.words(question))
    if re.search(r"\bhow (many|much)\b", asked):
        return "how many"
    found = re.search(r"\b(what|where|when|whose|who|whom|which|why|how)\b", asked)
    return found[1] if found else "other"

"""Answers as words: the normalisations, tokens, counts and readings that the rules compare.

Every published rule cleans text in a way of its own, and the quirks decide the number, so each
is kept as its code has it. Sources: VQA (GT-Vision-Lab/VQA, vqaEval.py), LLaVA-Med
(llava/eval, commit fc39e79), Quilt-LLaVA (quilt_eval.py), PA-LLaVA (VQAEval.py), PathVQA
(evaluation_script.py), PathMMU (eval_utils.py), MMMU (eval_utils.py).
"""

from __future__ import annotations

import re
from collections import Counter
from functools import lru_cache
from math import exp, fsum, log
from string import ascii_uppercase
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from collections.abc import Sequence

Counts = NDArray[np.int64]

# --- normalisation -----------------------------------------------------------------------

_NUMBERS = {
    word: str(number)
    for number, word in enumerate(
        ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    )
} | {"none": "0"}
_ARTICLES = {"a", "an", "the"}
_SPACED = ';/[]"{}()=+\\_-><@`,?!'  # neither the colon nor the apostrophe is among them
_PERIOD = re.compile(r"\.(?!\d)")
_PERIODS = int(re.UNICODE)  # the flag stands where re.sub takes a count, so 32 go and no more
_COMMA_IN_NUMBER = re.compile(r"\d,\d")

_ENDINGS = {
    "n't": "ai are ca could did does do had has have is might must need ought sha should was were "
    "wo would",
    "n't've": "could had might should would",
    "'ve": "could might must not should they we what where who would you",
    "'d": "he how it someone something there they where who you",
    "'d've": "he it she somebody someone something there they we who y'all you",
    "'s": "he how somebody someone that there what when where who why",
    "'ll": "how it somebody someone something they what who why y'all you",
    "'re": "there they what why you",
    "": "'ow's'at 'twas ma'am o'clock y'all",
}


def _contractions() -> dict[str, str]:
    """Return the VQA table: each contraction with one of its apostrophes dropped, to itself.

    One entry is the other way round (somebody'd). Left out are two that change nothing and
    four with a capital, which never match since text is made lower case first.
    """
    whole = [stem + ending for ending, stems in _ENDINGS.items() for stem in stems.split()]
    cut = {
        word[:at] + word[at + 1 :]: word
        for word in whole
        for at, letter in enumerate(word)
        if letter == "'"
    }
    return cut | {"somebody'd": "somebodyd"}


CONTRACTIONS = _contractions()

_KEPT = 1 << 16
"""So many texts are kept as they were normalised: every rule wants the same ones."""


@lru_cache(_KEPT)
def normalise(text: str) -> str:
    """Return text as LLaVA-Med compares it, after VQA: lower case, no articles, digits for words.

    Punctuation becomes a space, or nothing where the mark stands beside a space anywhere in
    the text or the text has a comma between digits; colons and apostrophes stay. At most 32
    full stops are taken away.
    """
    text = text.lower()
    number = _COMMA_IN_NUMBER.search(text) is not None
    spaced = text
    for mark in _SPACED:
        beside = number or f"{mark} " in text or f" {mark}" in text
        spaced = spaced.replace(mark, "" if beside else " ")
    words = (_NUMBERS.get(word, word) for word in _PERIOD.sub("", spaced, count=_PERIODS).split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def llava_med_tokens(text: str) -> list[str]:
    """Return LLaVA-Med's tokens: normalised twice, as its scores do, and cut at spaces."""
    return normalise(normalise(text)).split()


def pathvqa_tokens(text: str) -> list[str]:
    """Return PathVQA's tokens: all but a-z and the space is dropped, joining what it parted."""
    return re.sub("[^a-zA-Z ]", "", text).lower().split()


def pa_llava_text(text: str) -> str:
    """Return text as PA-LLaVA compares it: lower case without most punctuation."""
    text = re.sub(r"[,.'!?\"()*#:;~]", "", text.lower())
    return re.sub("x[ -]ray", "xray", text).replace(" - ", "-").strip()


def words(text: str) -> list[str]:
    """Return runs of letters in lower case."""
    return re.findall("[a-z]+", text.lower())


# --- counting ----------------------------------------------------------------------------


def overlap(said: Sequence[str], meant: Sequence[str]) -> tuple[float, float, float]:
    """Return precision, recall and F1 of tokens, as LLaVA-Med and PathVQA count them.

    A token of both is found as often as it is said: repeating it raises both numbers. All are
    0 where nothing is common.
    """
    there, wanted = set(said), set(meant)
    found = sum(token in wanted for token in said)
    missed = sum(token not in there for token in meant)
    if not found:
        return 0.0, 0.0, 0.0
    precision, recall = found / len(said), found / (found + missed)
    return precision, recall, 2 * precision * recall / (precision + recall)


def distinct_share(said: Sequence[str], meant: Sequence[str]) -> float:
    """Return distinct common tokens over all tokens said: what LLaVA-Med calls exact match."""
    return len(set(said) & set(meant)) / len(said) if said else 0.0


def multiset_recall(said: Sequence[object], meant: Sequence[object]) -> float:
    """Return the share of the tokens meant that are said, each as often as it is said."""
    found = Counter(said) & Counter(meant)
    return found.total() / len(meant) if meant else 0.0


ORDERS = 4


def ngram_counts(said: Sequence[str], meant: Sequence[str]) -> Counts:
    """Return what BLEU needs of a row, int64 [10]: lengths, then (clipped matches, n-grams) x 4.

    Rows add up: `bleu` of one is the sentence's, of a sum the corpus's.
    """
    row = [len(said), len(meant)]
    for order in range(1, ORDERS + 1):
        ours, theirs = _ngrams(said, order), _ngrams(meant, order)
        row += [(ours & theirs).total(), ours.total()]
    return np.array(row, np.int64)


def _ngrams(tokens: Sequence[str], order: int) -> Counter[tuple[str, ...]]:
    return Counter(zip(*(tokens[start:] for start in range(order)), strict=False))


def bleu(counts: Counts, order: int) -> float:
    """Return BLEU up to `order` of counts [10], unsmoothed (Papineni 2002).

    The geometric mean of the clipped precisions of 1..order times the brevity penalty; 0 where
    an order has no match, so a right answer shorter than `order` words has 0 as well.
    """
    said, meant = (int(length) for length in counts[:2])
    pairs = counts[2 : 2 + 2 * order].reshape(order, 2)
    if not pairs.all():
        return 0.0
    mean = exp(fsum(log(found / of) for found, of in pairs.tolist()) / order)
    return mean * min(1.0, exp(1 - meant / said))


def bleu_counts(predictions: Sequence[str], answers: Sequence[str]) -> Counts:
    """Return `ngram_counts` of LLaVA-Med's tokens of each row, int64 [n, 10].

    Corpus BLEU of any rows is `bleu(counts[rows].sum(0), order)`.
    """
    pairs = zip(predictions, answers, strict=True)
    rows = [ngram_counts(*map(llava_med_tokens, pair)) for pair in pairs]
    return np.array(rows, np.int64).reshape(-1, 2 + 2 * ORDERS)


def pathvqa_bleu(prediction: str, answer: str, order: int) -> float:
    """Return PathVQA's BLEU: letters only, lengths in characters, orders without match skipped.

    Its code divides by 0 where the reply is shorter than `order` words; here that is 0.
    """
    counts = ngram_counts(pathvqa_tokens(prediction), pathvqa_tokens(answer))
    pairs = counts[2 : 2 + 2 * order].reshape(order, 2)
    if not pairs[:, 1].all():
        return 0.0
    mean = exp(fsum(log(found / of) for found, of in pairs.tolist() if found) / order)
    return mean * min(1.0, exp(1 - len(answer) / len(prediction)))


# --- multiple choice ---------------------------------------------------------------------

_LEAD = re.compile(r"\s*\(?([A-Z])\s*[):.]\s*")
_LETTER = r"([A-{last}])(?![\w'-])(?!\s+(?!because|since|as\b|is\b)[a-z])"
_ANNOUNCED = r"(?:[Aa]nswer|ANSWER|[Oo]ption|[Cc]hoice)(?:\s+is)?[\s:\"'*(]+" + _LETTER
_BRACKETED = r"\(([A-{last}a-{low}])\)"
_HEADED = r"(?m:^)\W*([A-{last}])(?:\)|:|\*|\.(?=\s|$))"
_ALONE = r"(?<![\w'-])" + _LETTER
_ENDS = " \t\r\n.,!?;:'\"*()"


def option_texts(options: Sequence[str]) -> list[str]:
    """Return options without their letters, where all are headed by theirs ("A) stroma")."""
    heads = [_LEAD.match(option) for option in options]
    if all(
        head and head[1] == letter for head, letter in zip(heads, ascii_uppercase, strict=False)
    ):
        return [_LEAD.sub("", option, count=1).strip() for option in options]
    return [option.strip() for option in options]


def answer_index(answer: str, options: Sequence[str]) -> int | None:
    """Return which option a reference names: its text, its letter, or both ("B: gland")."""
    texts, said = [option.lower() for option in option_texts(options)], answer.strip()
    letters, head = ascii_uppercase[: len(options)], _LEAD.match(said)
    if said.lower() in texts:
        return texts.index(said.lower())
    if head and said[head.end() :].lower() in texts:
        return texts.index(said[head.end() :].lower())
    letter = said.strip(_ENDS).upper()
    return letters.index(letter) if len(letter) == 1 and letter in letters else None


def choice(reply: str, options: Sequence[str]) -> int | None:
    """Return which option a reply chooses, or None: nothing is ever drawn at random.

    The first reading that finds one: the reply is an option's text, letter, or both; a letter
    is announced ("Answer: B", "option B"); one is in brackets; one heads a line ("B)", "B.",
    "B:"); an option's text stands in the reply, of nested ones the longest; a capital stands
    alone. A capital before a word is no letter: "A gland", "B cell". Of several the last counts.
    """
    texts = [option.strip(_ENDS).lower() for option in option_texts(options)]
    whole, letters = reply.strip(_ENDS), ascii_uppercase[: len(options)]
    if whole and whole.lower() in texts:
        return texts.index(whole.lower())
    if len(whole) <= 1 or not options:
        return letters.index(whole.upper()) if whole and whole.upper() in letters else None
    longest_first = sorted(filter(None, texts), key=len, reverse=True)
    named = rf"(?<!\w)({'|'.join(map(re.escape, longest_first))})(?!\w)"
    lettered = [_ANNOUNCED, _BRACKETED, _HEADED, _ALONE]
    patterns = [form.format(last=letters[-1], low=letters[-1].lower()) for form in lettered]
    for pattern in patterns[:-1]:
        if found := re.findall(pattern, reply):
            return letters.index(found[-1].upper())
    if found := re.findall(named, reply.lower()):
        return texts.index(found[-1])
    found = re.findall(patterns[-1], reply)
    return letters.index(found[-1]) if found else None


def pathmmu_choice(reply: str, options: Sequence[str]) -> int | None:
    """Return which option PathMMU's parser chooses; None where it would draw one at random.

    Punctuation at the ends goes; then "(A)", then a capital between spaces (the article of
    "A gland" too), then, in replies of more than five words, an option anywhere, even inside a
    word. Of several the last counts.
    """
    for mark in ",.!?;:'":
        reply = reply.strip(mark)
    reply = f" {reply} "
    letters = ascii_uppercase[: len(options)]
    for form in ("({})", " {} "):
        at = [reply.rfind(form.format(letter)) for letter in letters]
        if max(at, default=-1) >= 0:
            return int(np.argmax(at))
    if len(reply.split()) > 5:  # noqa: PLR2004 - its number
        at = [reply.lower().rfind(option.lower()) for option in option_texts(options)]
        if max(at, default=-1) >= 0:
            return int(np.argmax(at))
    return None

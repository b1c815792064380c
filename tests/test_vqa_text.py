from __future__ import annotations

from math import exp, log, sqrt

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pathcli.metrics import vqa_text as vt

# --- normalisation -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "known"),
    [
        ("A Squamous CELL carcinoma", "squamous cell carcinoma"),  # an article and case
        ("the cleft between the cells and the stroma", "cleft between cells and stroma"),
        ("none", "0"),  # a number word
        ("two or Ten", "2 or 10"),
        ("bone, calvarium", "bone calvarium"),  # a mark beside a space goes
        ("bone,calvarium", "bone calvarium"),  # a mark between letters becomes a space
        ("x-ray", "x ray"),
        ("1,000 cells", "1000 cells"),
        ("1,000 x-ray films", "1000 xray films"),  # a comma in a number: all marks just go
        ("2.5 cm.", "2.5 cm"),  # a point before a digit stays
        ("e.g. p24", "eg p24"),
        ("small (700g)", "small 700g"),
        ("Diagnosis: liver", "diagnosis: liver"),  # the colon stays
        ("hashimoto 's thyroiditis", "hashimoto 's thyroiditis"),  # and the apostrophe
        ("a.n glands", "glands"),  # made an article by dropping its point
        ("Yes!", "yes"),
        ("a ! yes!", "yes"),
        ("", ""),
        ("The.", ""),
    ],
)
def test_text_is_normalised_as_in_llava_med(text: str, known: str) -> None:
    assert vt.normalise(text) == known


@pytest.mark.parametrize(
    ("cut", "whole"),
    [
        ("aint", "ain't"),
        ("couldn'tve", "couldn't've"),
        ("couldnt've", "couldn't've"),
        ("isnt", "isn't"),
        ("mightve", "might've"),
        ("notve", "not've"),
        ("oclock", "o'clock"),
        ("ow's'at", "'ow's'at"),
        ("'ows'at", "'ow's'at"),
        ("'ow'sat", "'ow's'at"),
        ("shant", "shan't"),
        ("shed've", "she'd've"),
        ("somebody'd", "somebodyd"),  # the table's slip
        ("somebodyd've", "somebody'd've"),
        ("therere", "there're"),
        ("twas", "'twas"),
        ("wheres", "where's"),
        ("yall", "y'all"),
        ("y'allll", "y'all'll"),
        ("yall'd've", "y'all'd've"),
        ("y'all'dve", "y'all'd've"),
    ],
)
def test_contractions_are_those_of_the_vqa_table(cut: str, whole: str) -> None:
    assert vt.normalise(f"so {cut}") == f"so {whole}"


def test_the_vqa_table_is_whole_and_has_no_english_word_beside_it() -> None:
    # its 120 entries, less let's and she's (changed into themselves) and Id've, I'dve, Im, Ive
    assert len(vt.CONTRACTIONS) == 114
    beside = {"hell", "well", "were", "shed", "wed", "ill", "id", "its", "lets", "shell", "shes"}
    assert not beside & set(vt.CONTRACTIONS)


def test_only_32_full_stops_are_dropped_at_a_time() -> None:
    assert vt.normalise("x." * 32) == "x" * 32
    assert vt.normalise("x." * 34) == "x" * 33 + ".x."
    assert vt.llava_med_tokens("x." * 64) == ["x" * 64]


def test_pathvqa_keeps_letters_and_spaces_alone() -> None:
    assert vt.pathvqa_tokens("Spindle-shaped CD34+ cells, 2\n(two)") == [
        "spindleshaped",
        "cd",
        "cells",
        "two",
    ]
    assert vt.pathvqa_tokens("a\nb") == ["ab"]


def test_pa_llava_drops_its_marks_and_joins_x_ray() -> None:
    assert vt.pa_llava_text("X-ray; (x ray) 1,000.5 [a]") == "xray xray 10005 [a]"
    assert vt.pa_llava_text("Well - differentiated!") == "well-differentiated"


# --- counting ----------------------------------------------------------------------------


def test_overlap_counts_what_is_repeated() -> None:
    # found 2 (ulcers twice), missed 5 of 6: recall 2/7, and not 1/6
    meant = ["characteristic", "transverse", "ulcers", "and", "2", "strictures"]
    assert vt.overlap(["ulcers", "ulcers"], meant) == pytest.approx((1, 2 / 7, 4 / 9))
    assert vt.overlap(["liver"] * 3, ["liver"]) == (1, 1, 1)
    assert vt.overlap([], ["liver"]) == vt.overlap(["lung"], ["liver"]) == (0, 0, 0)


def test_multiset_recall_counts_each_token_as_often_as_it_is_said() -> None:
    assert vt.multiset_recall("aab", "aaac") == 2 / 4
    assert vt.multiset_recall("aaaaaa", "a") == 1
    assert vt.multiset_recall("a", "") == 0


def test_bleu_of_a_sentence_is_the_hand_worked_one() -> None:
    counts = vt.ngram_counts(["p", "q", "r", "t"], ["p", "q", "r", "s"])
    # p1 3/4, p2 2/3, p3 1/2, p4 0/1; equal lengths, so no penalty
    assert counts.tolist() == [4, 4, 3, 4, 2, 3, 1, 2, 0, 1]
    assert vt.bleu(counts, 1) == pytest.approx(3 / 4)
    assert vt.bleu(counts, 2) == pytest.approx(sqrt(1 / 2))
    assert vt.bleu(counts, 3) == pytest.approx((1 / 4) ** (1 / 3))
    assert vt.bleu(counts, 4) == 0


def test_bleu_clips_repeats_and_punishes_short_replies() -> None:
    # Papineni's example: seven times "the" against two of the reference, 2/7
    the = vt.ngram_counts(["the"] * 7, ["the", "cat", "is", "on", "the", "mat"])
    assert vt.bleu(the, 1) == pytest.approx(2 / 7)
    # three words of ten, all in order: precisions 1, penalty exp(1 - 10/3)
    ten = "well differentiated adenocarcinoma showing closely packed glands with cytologic atypia"
    short = vt.ngram_counts(["closely", "packed", "glands"], ten.split())
    assert [vt.bleu(short, order) for order in (1, 2, 3, 4)] == pytest.approx(
        [exp(-7 / 3)] * 3 + [0]
    )


def test_corpus_bleu_adds_up_counts_before_it_divides() -> None:
    counts = vt.bleu_counts(["p q r t", "x y"], ["p q r s", "x y z"])
    # p1 (3+2)/(4+2), p2 (2+1)/(3+1), 6 words against 7
    assert vt.bleu(counts.sum(0), 2) == pytest.approx(exp(-1 / 6) * sqrt(5 / 6 * 3 / 4))
    assert vt.bleu_counts([], []).shape == (0, 10)
    assert vt.bleu(np.zeros(10, np.int64), 1) == 0


def test_pathvqa_bleu_skips_orders_without_a_match_and_counts_characters() -> None:
    # p1 1/2, p2 0/1 is skipped: sqrt(1/2) is more than BLEU-1; 10 characters against 5
    assert vt.pathvqa_bleu("liver cell", "liver", 1) == pytest.approx(1 / 2)
    assert vt.pathvqa_bleu("liver cell", "liver", 2) == pytest.approx(exp(log(1 / 2) / 2))
    assert vt.pathvqa_bleu("liver", "liver cell", 1) == pytest.approx(exp(-1))  # 5 against 10
    assert vt.pathvqa_bleu("liver", "liver cell", 2) == 0  # there it divides by 0
    assert vt.pathvqa_bleu("", "liver", 1) == 0


# --- multiple choice ---------------------------------------------------------------------

TISSUE = ["Normal tissue", "Benign tumor", "In situ cancer", "Invasive cancer"]
CARCINOMA = ["carcinoma", "carcinoma in situ", "no carcinoma"]


@pytest.mark.parametrize(
    ("reply", "known"),
    [
        ("B", 1),
        ("b", 1),
        ("(B)", 1),
        ("(b)", 1),
        ("B.", 1),
        ("B) Benign tumor", 1),
        ("B: Invasive cancer", 1),  # what was asked for is the letter
        ("**B**", 1),
        ("Answer: B", 1),
        ("**Answer:** B", 1),
        ("The answer is (B).", 1),
        ("The correct answer is B because glands are round", 1),
        ("I rule out (A). The answer is B, since (C) has no lumen.", 1),  # announced goes first
        ("(A) is wrong, it is (D)", 3),  # of several the last
        ("benign tumor", 1),
        ("Benign Tumor.", 1),
        ("The image shows an invasive cancer of the breast", 3),
        ("A benign tumor", 1),  # an article, no letter
        ("B cell infiltrate", None),  # a word follows
        ("I would say D", 3),
        ("C\nThe lumen is filled", 2),
        ("A", 0),
        ("E", None),  # there is no such option
        ("abnormal tissue", None),  # not as a part of a word
        ("cancer", None),  # neither cancer
        ("I cannot tell", None),
        ("", None),
        ("...", None),
    ],
)
def test_a_reply_chooses_an_option_or_none(reply: str, known: int | None) -> None:
    assert vt.choice(reply, TISSUE) == known
    lettered = [f"{letter}) {text}" for letter, text in zip("ABCD", TISSUE, strict=True)]
    assert vt.choice(reply, lettered) == known


def test_of_nested_options_the_longest_is_meant() -> None:
    assert vt.choice("this is carcinoma in situ", CARCINOMA) == 1
    assert vt.choice("there is no carcinoma here", CARCINOMA) == 2
    assert vt.choice("carcinoma in situ, then carcinoma", CARCINOMA) == 0


def test_a_genus_is_no_letter() -> None:
    options = ["S. aureus", "H. pylori", "P. acnes", "M. leprae", "E. coli"]
    assert vt.choice("E. coli", options) == 4
    assert vt.choice("H. pylori", options) == 1
    assert vt.answer_index("E. coli", options) == 4


@pytest.mark.parametrize(
    ("reply", "known"),
    [
        ("(B)", 1),
        ("B.", 1),
        ("I say B here", 1),
        ("(A) no, (D)", 3),
        ("A benign tumor", 0),  # the article is read as a letter
        ("b", None),
        ("B) Benign tumor", None),  # neither form, and three words are too few
        ("The picture shows a Benign Tumor here", 1),
        ("Benign tumor", None),  # five words or fewer
        ("this is some pseudoinvasive cancer or so", 3),  # inside a word
        ("", None),
    ],
)
def test_pathmmu_parses_by_its_own_steps(reply: str, known: int | None) -> None:
    assert vt.pathmmu_choice(reply, TISSUE) == known


@pytest.mark.parametrize(
    ("answer", "known"),
    [
        ("Benign tumor", 1),
        ("benign tumor", 1),
        ("B", 1),
        ("(B)", 1),
        ("B: Benign tumor", 1),
        ("D) Invasive cancer", 3),
        ("E", None),
        ("cancer", None),
        ("", None),
    ],
)
def test_a_reference_names_its_option(answer: str, known: int | None) -> None:
    assert vt.answer_index(answer, TISSUE) == known


@given(st.text(max_size=60), st.lists(st.text(max_size=12), max_size=6))
def test_any_text_is_parsed_to_an_option_there_is_or_to_none(
    reply: str, options: list[str]
) -> None:
    for parse in (vt.choice, vt.pathmmu_choice, vt.answer_index):
        place = parse(reply, options)
        assert place is None or 0 <= place < len(options)


@given(st.text(alphabet="aAn. ,-'1xyB!", max_size=30))
def test_normalising_twice_is_normalising_once_but_for_many_full_stops(text: str) -> None:
    once = vt.normalise(text)
    assert vt.normalise(once) == once

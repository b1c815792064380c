from __future__ import annotations

import json
import math
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from pathcli.errors import DataError, UsageError
from pathcli.metrics import answers as an
from pathcli.metrics import vqa
from pathcli.metrics import vqa_text as vt

nan = math.nan

# --- closed ------------------------------------------------------------------------------

CLOSED = (
    "closed-llava-med",
    "closed-llava-med-omitting",
    "closed-quilt",
    "closed-quilt-token",
    "closed-exact",
    "closed-first-word",
)


@pytest.mark.parametrize(
    ("answer", "reply", "known"),
    [
        # "normal" has the characters n-o; no token is no
        ("no", "The glands look normal.", (1, 1, 0, 0, 0, 0)),
        # it does say no, so the omitting code drops the row; without no, Quilt hears yes
        ("yes", "normal", (0, nan, 1, 0, 0, 0)),
        # both words: characters and tokens always hit, Quilt hears no, the first is yes
        ("yes", "Yes, not no.", (1, 1, 0, 1, 0, 1)),
        ("no", "Yes, not no.", (1, 1, 1, 1, 0, 0)),
        # nothing said: neither word, which is Quilt's yes
        ("yes", "", (0, 0, 1, 0, 0, 0)),
        ("no", "", (0, 0, 0, 0, 0, 0)),
        # none becomes the number 0 and says neither
        ("no", "None.", (0, 0, 0, 0, 0, 0)),
        # n-o in not; a no for Quilt alone
        ("no", "It is not.", (1, 1, 1, 0, 0, 0)),
        # case and marks
        ("no", "NO", (1, 1, 1, 1, 1, 1)),
        ("yes", "Yes!", (1, 1, 1, 1, 1, 1)),
        # an article goes; the rest of the sentence does not
        ("no", "A no.", (1, 1, 1, 1, 1, 1)),
        ("no", "No, it is benign", (1, 1, 1, 1, 0, 1)),
        # the hyphen parts: non, neoplastic
        ("no", "non-neoplastic", (1, 1, 0, 0, 0, 0)),
        # n-o in nodule, and yes as a word
        ("yes", "A nodule is seen: yes", (1, 1, 1, 1, 0, 1)),
        # n-o in know
        ("no", "I don't know", (1, 1, 0, 0, 0, 0)),
        # plainly wrong, and yet left out by the omitting code
        ("no", "yes", (0, nan, 0, 0, 0, 0)),
        # the reference in its own spelling
        ("No", "no", (1, 1, 1, 1, 1, 1)),
    ],
)
def test_closed_rules_score_as_worked_out_by_hand(
    answer: str, reply: str, known: tuple[float, ...]
) -> None:
    ours = [vqa.scores(rule, [reply], [answer])[0] for rule in CLOSED]
    np.testing.assert_array_equal(ours, known)


# --- open --------------------------------------------------------------------------------

LONG = "well-differentiated adenocarcinoma showing closely packed glands with cytologic atypia"
ULCERS = "characteristic transverse ulcers and two strictures"


@pytest.mark.parametrize(
    ("answer", "reply", "recall", "precision", "f1", "exact"),
    [
        ("three", "3", 1, 1, 1, 1),  # both are 3
        ("the tumor", "Tumor.", 1, 1, 1, 1),  # article, case, full stop
        ("700 g", "700g", 0, 0, 0, 0),  # 700, g against 700g
        ("small (700g)", "small, 700g", 1, 1, 1, 1),
        ("bone, calvarium", "bone,calvarium", 1, 1, 1, 1),
        # the hyphen parts: 3 of the 10 tokens
        (LONG, "well differentiated adenocarcinoma", 3 / 10, 1, 6 / 13, 0),
        ("liver", "liver liver liver", 1, 1, 1, 0),  # repeats cost nothing
        (ULCERS, "ulcers, ulcers", 2 / 7, 1, 4 / 9, 0),  # and even pay: 2 found, 5 missed
        ("liver", "", 0, 0, 0, 0),
        ("liver", "livers", 0, 0, 0, 0),  # a plural is another token
        # hashimoto, 's, thyroiditis against hashimoto's, thyroiditis
        ("hashimoto 's thyroiditis", "Hashimoto's thyroiditis", 1 / 3, 1 / 2, 2 / 5, 0),
        ("Pierre robin sndrome", "PIERRE ROBIN SNDROME", 1, 1, 1, 1),
        ("no inflammation", "No.", 1 / 2, 1, 2 / 3, 0),  # open: more than yes or no
        ("liver", "Diagnosis: liver.", 1, 1 / 2, 2 / 3, 0),  # "diagnosis:" keeps its colon
        ("a partly formed unerupted tooth", "the tooth", 1 / 4, 1, 2 / 5, 0),
        ("2 viral glycoproteins", "Two viral glycoproteins", 1, 1, 1, 1),
        # 70 full stops before that of "liver.", which two rounds of 32 do not reach
        ("liver", "well. " * 70 + "liver.", 0, 0, 0, 0),
        # 31 before it: found 1 of 32 tokens, f1 2 * 1/32 / (33/32)
        ("liver", "well. " * 31 + "liver.", 1, 1 / 32, 2 / 33, 0),
    ],
)
def test_open_rules_score_as_worked_out_by_hand(
    answer: str, reply: str, recall: float, precision: float, f1: float, exact: float
) -> None:
    rules = ("open-recall", "open-precision", "open-f1", "exact")
    ours = [vqa.scores(rule, [reply], [answer])[0] for rule in rules]
    assert ours == pytest.approx([recall, precision, f1, exact])


@pytest.mark.parametrize(
    ("answer", "reply", "med", "pathvqa", "f1"),
    [
        # distinct tokens in common over tokens said
        ("liver", "liver liver", 1 / 2, 1 / 2, 1),
        ("2 viral glycoproteins", "two glycoproteins", 1, 1 / 2, 1 / 2),  # letters lose the 2
        ("spindle-shaped cells", "spindle shaped cells", 1, 1 / 3, 2 / 5),  # spindleshaped
        ("liver", "", 0, 0, 0),
        ("45", "45", 1, 0, 0),  # no letters at all
    ],
)
def test_what_others_call_exact_match_is_a_share_of_the_reply(
    answer: str, reply: str, med: float, pathvqa: float, f1: float
) -> None:
    rules = ("open-llava-med-exact", "open-pathvqa-exact", "open-pathvqa-f1")
    ours = [vqa.scores(rule, [reply], [answer])[0] for rule in rules]
    assert ours == pytest.approx([med, pathvqa, f1])


def test_bleu_rules_are_those_of_the_text_module() -> None:
    said, meant = ["closely packed glands"], [LONG]
    ours = [vqa.scores(f"bleu-{order}", said, meant)[0] for order in (1, 2, 3, 4)]
    assert ours == pytest.approx([math.exp(-7 / 3)] * 3 + [0])  # as worked out there
    assert vqa.scores("open-pathvqa-bleu-2", ["liver cell"], ["liver"]) == pytest.approx(0.5**0.5)


@pytest.mark.parametrize(
    ("answer", "reply", "known"),
    [
        ("x ray film", "X-ray film.", 1),
        ("well-differentiated", "Well - differentiated", 1),
        ("well-differentiated", "well differentiated", 0),
        ("the tumor", "tumor", 0),  # articles count
        ("three", "3", 0),  # and number words
        ("yes", "Yes!", 1),  # closed questions too
        ("liver", "", 0),
    ],
)
def test_pa_llava_wants_the_same_text_but_for_marks(answer: str, reply: str, known: int) -> None:
    assert vqa.scores("exact-pa-llava", [reply], [answer]) == [known]


def test_language_recall_counts_the_tokens_it_is_given() -> None:
    letters = vqa.language_recall(list, "letters")
    # of l-i-v-e-r the word river has i, v, e and one r; of yes the word eyes has all
    ours = vqa.scores(letters, ["River!", "eyes", ""], ["liver", "yes", "liver"])
    assert ours.tolist() == [4 / 5, 1, 0]
    assert "letters" in letters.about


# --- multiple choice ---------------------------------------------------------------------

TISSUE = ("Normal tissue", "Benign tumor", "In situ cancer", "Invasive cancer")


def test_choice_rules_differ_as_their_parsers_do() -> None:
    replies = ["B: Benign tumor", "A benign tumor", "(B)", "tumor", "B) benign", "Benign tumor"]
    table = {
        rule: vqa.scores(rule, replies, ["B"] * 6, [TISSUE] * 6).tolist()
        for rule in ("choice", "choice-pathmmu", "choice-pa-llava")
    }
    assert table == {
        "choice": [1, 1, 1, 0, 1, 1],
        # no form fits; the article; (B); nothing; no form; its text, as main.py has it
        "choice-pathmmu": [0, 0, 1, 0, 0, 1],
        "choice-pa-llava": [1, 0, 0, 0, 0, 0],  # "B"; else not the bare letter
    }


def test_a_reference_that_is_no_option_is_refused() -> None:
    with pytest.raises(DataError, match="'E' is none of the options"):
        vqa.scores("choice", ["A"], ["E"], [TISSUE])


def test_orders_are_distinct_and_their_shifts_put_each_option_everywhere() -> None:
    assert an.orders(3, 3) == [(0, 1, 2), (1, 2, 0), (2, 0, 1)]
    assert sorted(an.orders(4, 99)) == sorted(permutations(range(4)))
    assert len(an.orders(26, 30)) == 30


def test_consistency_is_the_hand_worked_one() -> None:
    picks = np.array([[0, 0, 0], [0, 0, 1], [-1, -1, -1], [2, -1, 2], [0, 1, 2], [1, 2, 2]])
    known = an.consistency(picks)
    assert known.alike.tolist() == [1, 0, 0, 0, 0, 0]
    assert known.agreement == pytest.approx([1, 1 / 3, 0, 1 / 3, 0, 1 / 3])
    assert known.vote.tolist() == [0, 0, -1, 2, 0, 2]
    with pytest.raises(DataError, match="two orders"):
        an.consistency(picks[:, :1])


def test_who_answers_by_place_is_never_consistent_and_who_answers_by_content_always() -> None:
    shown = np.array(an.orders(4, 4))
    assert an.consistency(shown[:, [0, 0, 0, 0]].T).alike.tolist() == [0] * 4  # always the first
    content = np.full((5, 4), 2)
    assert an.consistency(content).agreement.tolist() == [1] * 5


def test_chance_is_the_mean_of_one_over_the_options() -> None:
    assert an.chance([TISSUE, ("yes", "no"), ()]) == pytest.approx((1 / 4 + 1 / 2) / 2)
    assert math.isnan(an.chance([()]))


def test_unmapped_replies_are_wrong_in_the_table_of_classes() -> None:
    replies = ["A", "A", "who knows", "B", "B", "A"]
    picked = an.chosen(replies, [("Normal", "Tumor")] * 6)
    ours = an.classification(np.array([0, 0, 0, 1, 1, 1]), picked)
    # class 0: 2 of 3 found, 2 of 3 calls right; class 1: 2 of 3, 2 of 2
    assert picked.tolist() == [0, 0, -1, 1, 1, 0]
    assert (ours.accuracy, ours.unmapped) == (4 / 6, 1)
    assert ours.recall == pytest.approx(2 / 3)
    assert ours.precision == pytest.approx((2 / 3 + 1) / 2)
    assert ours.f1 == pytest.approx((4 / 6 + 4 / 5) / 2)


@pytest.mark.parametrize("seed", range(5))
def test_classification_is_scikit_learns_over_the_classes_there_are(seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels, predicted = rng.integers(1, 4, 30), rng.integers(-1, 5, 30)
    known = sk.precision_recall_fscore_support(
        labels, predicted, labels=np.unique(labels), average="macro", zero_division=0
    )
    ours = an.classification(labels, predicted)
    assert (ours.precision, ours.recall, ours.f1) == pytest.approx(known[:3])
    assert ours.accuracy == pytest.approx((labels == predicted).mean())


# --- rows and means ----------------------------------------------------------------------

ROWS = [
    ("yes", ()),
    ("no", ()),
    ("the tumor", ()),
    ("three", ()),
    ("bone, calvarium", ()),
    (LONG, ()),
    ("hashimoto 's thyroiditis", ()),
    ("small (700g)", ()),
    ("Benign tumor", TISSUE),
    ("D", TISSUE),
]


@pytest.mark.parametrize("name", vqa.RULES)
def test_a_perfect_reply_scores_1_by_every_rule_that_applies(name: str) -> None:
    rule, answers = vqa.RULES[name], [answer for answer, _ in ROWS]
    replies = answers
    if name in {"choice-pathmmu", "choice-pa-llava"}:  # these want the letter
        replies = [f"({'B' if answer[0] == 'B' else answer})" for answer in answers]
    if name == "choice-pa-llava":
        replies = [reply.strip("()") for reply in replies]
    row = vqa.scores(name, replies, answers, [options for _, options in ROWS])
    order = int(name[-1]) if "bleu" in name else 1
    tokens = vt.pathvqa_tokens if "pathvqa" in name else vt.llava_med_tokens
    for score, (answer, options) in zip(row, ROWS, strict=True):
        if rule.applies not in {"all", vqa.kind(answer, options)}:
            assert math.isnan(score)
        else:  # BLEU is 0 by definition where there are too few words
            assert score == pytest.approx(float(len(tokens(answer)) >= order))


@settings(max_examples=20)
@given(st.permutations(range(8)), st.data())
def test_the_order_of_rows_does_not_matter(order: list[int], data: st.DataObject) -> None:
    answers = [answer for answer, _ in ROWS[:8]]
    replies = [data.draw(st.sampled_from([*answers, "", "normal", "not 3"])) for _ in answers]
    types = ["a", "b", "a", "c", "c", "c", "a", "b"]

    def shuffled(row: list[str]) -> list[str]:
        return [row[place] for place in order]

    for rule in vqa.RULES:
        row = vqa.scores(rule, replies, answers)
        other = vqa.scores(rule, shuffled(replies), shuffled(answers))
        np.testing.assert_array_equal(row[order], other)
        means = vqa.micro(row), vqa.macro(row, types)
        assert means == pytest.approx(
            (vqa.micro(other), vqa.macro(other, shuffled(types))), nan_ok=True
        )


def test_means_leave_out_the_rows_a_rule_says_nothing_of() -> None:
    row = np.array([1, nan, 0, 1, nan])
    types = ["what", "where", "what", "how", "when"]
    assert vqa.micro(row) == pytest.approx(2 / 3)
    assert vqa.by_type(row, types) == {"what": (0.5, 2), "how": (1, 1)}
    assert vqa.macro(row, types) == pytest.approx(3 / 4)
    assert math.isnan(vqa.micro(row[1:2]))
    assert math.isnan(vqa.macro(row[1:2], types[1:2]))


def test_overall_mixes_closed_accuracy_and_open_recall() -> None:
    replies, answers = ["yes", "yes", "glands"], ["yes", "no", "closely packed glands"]
    closed = vqa.scores("closed-exact", replies, answers)
    recall = vqa.scores("open-recall", replies, answers)
    assert vqa.micro(vqa.mixture(closed, recall)) == pytest.approx((1 + 0 + 1 / 3) / 3)


def test_kinds_of_rows_are_told_by_reference_and_options() -> None:
    assert vqa.kind("Yes.") == "closed"
    assert vqa.kind("no", ("yes", "no")) == "closed"
    assert vqa.kind("no", ("yes", "no", "maybe")) == "choice"
    assert vqa.kind("no inflammation") == "open"
    assert vqa.kind("B", ("lung", "colon")) == "choice"


@pytest.mark.parametrize(
    ("question", "answer", "known"),
    [
        ("Is it benign?", "no", "yes/no"),
        ("How many layers does microscopy show?", "three", "how many"),
        ("How is the liver?", "small (700g)", "how"),
        ("In which part is it?", "wall", "which"),
        ("Metastatic lesions, by whose multicentricity?", "theirs", "whose"),
        ("Describe the image", "liver", "other"),
    ],
)
def test_questions_are_of_pathvqas_types(question: str, answer: str, known: str) -> None:
    assert vqa.question_type(question, answer) == known


def test_wrong_calls_say_what_is_wrong() -> None:
    with pytest.raises(UsageError, match="no rule is called 'accuracy'; there are closed-llava"):
        vqa.scores("accuracy", [], [])
    with pytest.raises(DataError, match="1 predictions, 2 answers"):
        vqa.scores("exact", ["yes"], ["yes", "no"])
    with pytest.raises(DataError, match="2 scores but 1 types"):
        vqa.by_type(np.zeros(2), ["what"])


def test_every_rule_states_itself_in_a_sentence() -> None:
    for name, rule in vqa.RULES.items():
        assert rule.name == name
        assert rule.about.endswith(".")
        assert rule.source
        assert "  " not in rule.about


@pytest.mark.data
def test_the_test_questions_of_pathvqa_are_half_closed(data: Path) -> None:
    records = json.loads((data / "vqa" / "pathvqa-test-text.json").read_text())
    answers = [next(iter(label)) for row in records for label in row["labelf"]["pvqa"]]
    kinds = [vqa.kind(answer) for answer in answers]
    assert (kinds.count("closed"), kinds.count("open")) == (3391, 3370)
    # a mute model: what each closed rule gives it (1844 references are yes)
    mute = [""] * len(answers)
    assert vqa.micro(vqa.scores("closed-quilt", mute, answers)) == pytest.approx(1844 / 3391)
    assert vqa.micro(vqa.scores("closed-first-word", mute, answers)) == 0

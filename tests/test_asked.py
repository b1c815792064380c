"""Which answers a question allows, and which of them an answer says."""

from __future__ import annotations

import numpy as np
import pytest

from pathcli.types import Sample
from pathcli.vlm.asked import YES_NO, allowed, matched, probabilities

NAMES = ("benign lung tissue", "lung adenocarcinoma", "lung squamous cell carcinoma")
TAUGHT = (NAMES, ("lung", "colon"))


@pytest.mark.parametrize(
    ("question", "wanted"),
    [
        ("Is this malignant?", YES_NO),
        ("is there tumor?", YES_NO),
        ("Are mitoses seen or not?", YES_NO),
        ("Tell me if this tissue is malignant.", YES_NO),
        ("Please say whether cancer is present.", YES_NO),
        ("Malignancy, yes or no?", YES_NO),
        ("Yes/no: is it cancer?", YES_NO),
        ("Can you see malignant cells?", YES_NO),
        ("Would you call this malignant?", YES_NO),
        ("Can you tell me if it is benign?", YES_NO),
        ("Can you tell me what tissue this is?", ()),
        ("Could you please name the organ?", ()),
        ("What tissue is this?", ()),
        ("Describe what can be seen.", ()),
        ("Island of cells: what is it?", ()),  # begins with "is", which is no word here
        ("Is it in situ or invasive?", ()),  # alternatives nobody taught
        ("Is this lung adenocarcinoma or benign lung tissue?", (NAMES[0], NAMES[1])),
        ("Is this lung adenocarcinoma?", YES_NO),
        ("Lung or colon?", ("lung", "colon")),
        ("What? A. benign B. malignant", ("A. benign", "B. malignant")),
        ("Choose: (A) fat (B) muscle", ("A. fat", "B. muscle")),
        ("Is vitamin A. deficiency seen?", YES_NO),  # one letter is no list of options
        ("", ()),
    ],
)
def test_a_question_allows(question: str, wanted: tuple[str, ...]) -> None:
    assert allowed(question, TAUGHT) == wanted


@pytest.mark.parametrize(
    ("answer", "options", "wanted"),
    [
        ("Yes.", YES_NO, "yes"),
        ("no, it is benign", YES_NO, "no"),
        ("normal", YES_NO, None),
        ("nothing", YES_NO, None),
        ("Lung  adenocarcinoma.", NAMES, NAMES[1]),
        ("adenocarcinoma", NAMES, None),
        ("B", ("A. fat", "B. muscle"), "B. muscle"),
        ("A.", ("A. fat", "B. muscle"), "A. fat"),
        ("n", YES_NO, None),
        ("B. tendon", ("A. fat", "B. muscle"), "B. muscle"),
        ("a tumor", ("A. fat", "B. muscle"), None),
        ("", YES_NO, None),
    ],
)
def test_an_answer_says_an_option(
    answer: str, options: tuple[str, ...], wanted: str | None
) -> None:
    assert matched(answer, options) == wanted


class Model:
    """Finds the second of two options twice as likely as the first."""

    def __init__(self, temperature: float | None, given: bool = True) -> None:
        self.temperature, self.given = temperature, given

    def likelihoods(self, samples: list[Sample], options: list[list[str]]) -> object:
        assert len(samples) == len(options)
        return [np.log([0.1, 0.2]) for _ in options] if self.given else None


def test_probabilities_sum_to_one_and_a_temperature_flattens_them() -> None:
    samples = [Sample("x", ("x.png",), turns=("a or b?",))]
    (plain,) = probabilities(Model(None), samples, [["a", "b"]])  # type: ignore[arg-type, misc]
    assert plain.tolist() == pytest.approx([1 / 3, 2 / 3])
    (flat,) = probabilities(Model(2.0), samples, [["a", "b"]])  # type: ignore[arg-type, misc]
    assert flat[1] / flat[0] == pytest.approx(2**0.5)
    assert probabilities(Model(None, given=False), samples, [["a", "b"]]) is None  # type: ignore[arg-type]

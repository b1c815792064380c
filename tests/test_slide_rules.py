"""The rules by which tiles' answers become a slide's, and how the shipped one is fitted."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pathcli.encoders.build import build_encoder
from pathcli.errors import DataError
from pathcli.vlm.slide import BUDGET, own_rule
from pathcli.vlm.slide_rules import (
    Presence,
    Said,
    asks_of_all,
    combine,
    seeks_the_opposite,
    subject,
)
from pathcli.weights import fetch

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import ask_slide as bench

YES_NO = ("yes", "no")


# --- what a question is about ------------------------------------------------------------


@pytest.mark.parametrize(
    ("question", "about", "of_all", "opposite"),
    [
        ("Is there a tumor on this slide?", "tumor", False, False),
        ("is there tumor?", "tumor", False, False),
        ("Yes or no: is cancer present?", "cancer", False, False),
        ("Do you see lung adenocarcinoma here?", "lung adenocarcinoma", False, False),
        ("Is there normal tissue?", "normal tissue", False, False),
        ("Is it benign?", "benign", True, True),
        ("Is there no tumor?", "tumor", True, False),
        ("Is the slide free of cancer?", "cancer", True, False),
        ("Is this tumor-free?", "tumor", True, False),
        ("What is this?", "What is this?", False, False),
    ],
)
def test_a_question_is_about_its_words_without_the_asking(
    question: str, about: str, of_all: bool, opposite: bool
) -> None:
    assert subject(question) == about
    assert (asks_of_all(question), seeks_the_opposite(question)) == (of_all, opposite)


# --- the rules ---------------------------------------------------------------------------


def said(*chances: float) -> list[Said]:
    return [Said("yes" if p >= 0.5 else "no", p) for p in chances]


@pytest.mark.parametrize(
    ("statistic", "chances", "value"),
    [
        ("largest-1", (0.2, 0.9, 0.4), 0.9),
        ("largest-2", (0.2, 0.9, 0.4), 0.4),
        ("largest-4", (0.2, 0.9), 0.2),
        ("share", (0.5, 0.4, 0.9, 0.1), 0.5),
    ],
)
def test_a_statistic_of_tiles(statistic: str, chances: tuple[float, ...], value: float) -> None:
    assert Presence(statistic).value(np.array(chances)) == value


def test_a_threshold_is_reached_at_its_value() -> None:
    rule = Presence("largest-2", 0.4, "made up", ("tumor",), {"budget": 3}, {"yes": 0.8})
    for threshold, text, confidence in ((0.4, "yes", 0.8), (0.4001, "no", None)):
        found = combine(
            "is there tumor?",
            YES_NO,
            said(0.2, 0.9, 0.4),
            replace(rule, threshold=threshold),
            {"budget": 3},
        )
        assert (found.text, found.confidence) == (text, confidence)
        assert "second largest P(yes) of a tile, here 0.400 of 3 tiles" in found.rule
        assert found.rule.endswith("fitted on made up")
        assert found.scores == {"no": 2 / 3, "yes": 1 / 3}


@pytest.mark.parametrize(
    ("question", "budget", "why"),
    [
        ("is there tumor?", 4, "another budget"),
        ("is there necrosis?", 3, "for questions of tumor"),
        ("is there no tumor?", 3, "for questions of tumor"),
    ],
)
def test_a_fitted_rule_holds_for_what_it_was_fitted_on_alone(
    question: str, budget: int, why: str
) -> None:
    rule = Presence("share", 0.01, "made up", ("tumor",), {"budget": 3}, {"yes": 0.8})
    found = combine(question, YES_NO, said(0.1, 0.9), rule, {"budget": budget})
    assert found.confidence is None
    assert (
        f"uncalibrated: its rule for slides was fitted {'with ' if budget == 4 else ''}{why}"
        in (found.rule)
    )
    assert "largest P(" in found.rule


def test_one_place_speaks_against_what_must_hold_of_all() -> None:
    for chances, text in (((0.9, 0.4), "no"), ((0.9, 0.6), "yes")):
        found = combine("is it benign?", YES_NO, said(*chances), Presence(), {})
        assert found.text == text
        assert found.rule.startswith("no if the largest P(no) of a tile")
        assert "uncalibrated: no rule" in found.rule


def test_undecided_tiles_do_not_outvote_a_sure_one() -> None:
    options = ("A. red", "B. blue")
    tiles = [Said("A. red", p, (p, 1 - p)) for p in (0.55, 0.6, 0.6)]
    found = combine(
        "which?", options, [*tiles, Said("B. blue", 0.99, (0.01, 0.99))], Presence(), {}
    )
    assert (found.text, found.confidence) == ("B. blue", None)
    assert found.scores == pytest.approx({"B. blue": 0.56, "A. red": 0.44})
    assert list(found.scores) == ["B. blue", "A. red"]
    assert found.rule.startswith("the largest mean probability: 0.560 over 4 tiles, 1 of which")


def test_most_tiles_decide_where_no_probabilities_are_known() -> None:
    options = ("A. red", "B. blue")
    tiles = [Said("A. red"), Said("B. blue"), Said("B. blue"), Said("a mess")]
    found = combine("which?", options, tiles, Presence(), {})
    assert (found.text, found.scores["A. red"]) == ("B. blue", 1 / 3)
    assert found.rule.startswith("the answer of most tiles: 0.667 over 3 tiles, 2 of which")
    nothing = combine("which?", options, [Said("a mess")], Presence(), {})
    assert nothing.abstained
    assert "none of 1 tiles was answered with one of: A. red, B. blue" in nothing.rule


def test_open_answers_are_listed_with_their_counts() -> None:
    tiles = [Said("a fold.", None), Said("glands", None), Said("glands.", None)]
    found = combine("what?", (), tiles, Presence(), {})
    assert found.text == "glands (2 of 3 tiles); a fold (1 of 3 tiles)"
    assert found.confidence is None


# --- the shipped rule --------------------------------------------------------------------


def test_the_shipped_rule_is_of_the_shipped_model_alone(tmp_path: Path) -> None:
    model: Any = SimpleNamespace(name="painter")
    assert own_rule(model) == Presence()
    path = fetch("clover-mini").with_name("slide.yaml")
    model.name = "clover-mini"
    assert own_rule(model) == (Presence.read(path) if path.is_file() else Presence())
    if path.is_file():
        encoder, fitted = build_encoder("mini-clip"), Presence.read(path).conditions
        assert fitted["encoder"] == encoder.id
        assert fitted["kind of tiles"] == encoder.native.digest
        assert fitted["budget"] == BUDGET
    rule = Presence("share", 0.25, "made up", ("a",), {"budget": 3}, {"yes": 0.5})
    bench.write_rule(tmp_path / "slide.yaml", rule)
    assert Presence.read(tmp_path / "slide.yaml") == rule
    for text in ("statistic: most\nthreshold: 1\nwords: []\n", "threshold: 1\n"):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(DataError, match=r"bad\.yaml"):
            Presence.read(tmp_path / "bad.yaml")


# --- how the rule is fitted --------------------------------------------------------------


def mosaic(kind: str, *chances: float, site: str = "a") -> bench.Asked:
    tiles = [("similar", p, p > 0.8) for p in chances]
    tumor = kind == "tumor"
    seconds = {"choose": 0.1, "read": 1.9}
    return bench.Asked(f"m{chances}", site, tumor, 0.02 * tumor, tiles, 0, seconds)


def test_the_fit_finds_the_statistic_that_one_false_tile_does_not_fool() -> None:
    asked = [
        mosaic("normal", 0.95, 0.1, 0.1),  # the largest says nothing
        mosaic("normal", 0.2, 0.2, 0.1),
        mosaic("tumor", 0.9, 0.8, 0.1),
        mosaic("tumor", 0.99, 0.6, 0.1),
    ]
    rule = bench.fit(asked)
    assert rule.statistic == "largest-2"
    assert rule.threshold == pytest.approx(0.4)  # between 0.2 and 0.6
    shipped = bench.fitted(asked, {"budget": 3})
    assert shipped.right == {"yes": 0.75, "no": 0.75}
    assert "4 mosaics" in shipped.fitted_on
    figures = bench.report([*asked, mosaic("tumor", site="b")], shipped)
    assert figures["abstained"] == 1
    assert figures["sensitivity"]["value"] == figures["specificity"]["value"] == 1
    assert figures["sensitivity, lesion 1%-3%"]["n"] == 2
    assert figures["evidence in the outline, all read"]["value"] == pytest.approx(1 / 3, abs=1e-4)
    assert figures["random tiles in the outline"]["value"] == pytest.approx(0.02)
    assert figures["choosing, share of the time"] == 0.05


def test_mosaics_of_a_split_are_laid_from_its_groups_alone(data: Path) -> None:
    lung = data / "lc25000-lung"
    sides = {
        side: {row["group"] for row in bench.lung_mosaics.drawn_from(lung, side)}
        for side in ("train", "val", "test", None)
    }
    assert not sides["val"] & sides["test"]
    assert sides["train"] | sides["val"] | sides["test"] == sides[None]
    rows = bench.lung_mosaics.drawn_from(lung, "val")
    group = {row["image"]: row["group"] for row in rows}
    plans = [bench.lung_mosaics.plan(rows, number) for number in range(20)]
    assert {group[i] for p in plans for i in p.images} <= sides["val"]

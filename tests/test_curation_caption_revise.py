"""Edits of captions: read strictly, made where they are plain, and taken back exactly."""

from __future__ import annotations

import json

import numpy as np
import pytest
from conftest import DATA
from hypothesis import given
from hypothesis import strategies as st

from pathcli.curation.caption.revise import (
    Edit,
    apply,
    read_edits,
    sentences_of,
    spoil,
    spoil_by_rule,
    written,
)
from pathcli.errors import DataError
from pathcli.weights import asset
from pathcli.yaml12 import read_mapping

GOOD = "Small glands lie in fibrous stroma. Nuclei are large, round and pale. No mitoses are seen."


def rules() -> tuple[list[list[str]], list[str]]:
    found = read_mapping(asset("curation/contrasts.yaml"), "")
    return found["contrasts"], found["claims"]


# --- read --------------------------------------------------------------------------------


def test_a_reply_is_a_list_of_operations_and_what_is_written_is_read_again() -> None:
    edits = (
        Edit("add", "Mitoses are rare.", "pale."),
        Edit("add", "Tumour.", ""),
        Edit("delete", "No mitoses are seen."),
        Edit("modify", "large", "small"),
    )
    assert json.loads(written(edits))[0] == {
        "op": "add",
        "text": "Mitoses are rare.",
        "after": "pale.",
    }
    assert read_edits(written(edits)) == edits
    assert read_edits(" [] ") == ()


@pytest.mark.parametrize(
    ("reply", "fault"),
    [
        ("The caption is right.", "not JSON"),
        ('[{"op": "delete", "text": "a"', "not JSON"),
        ('{"op": "delete", "text": "a"}', "not a JSON list"),
        ('["delete a"]', "an object whose op is one of add, delete, modify"),
        ('[{"op": "replace", "text": "a", "to": "b"}]', "an object whose op is one of"),
        ('[{"op": ["add"], "text": "a"}]', "an object whose op is one of"),
        ('[{"op": "delete"}]', "has the texts text, and nothing else"),
        ('[{"op": "delete", "text": "a", "why": "b"}]', "and nothing else"),
        ('[{"op": "modify", "text": "a", "to": 3}]', "has the texts text and to"),
        ('[{"op": "modify", "text": "a", "to": " "}]', "is empty"),
        ('[{"op": "add", "text": "", "after": "a"}]', "is empty"),
    ],
)
def test_anything_else_is_a_fault_that_says_what_is_wrong(reply: str, fault: str) -> None:
    with pytest.raises(DataError, match=fault):
        read_edits(reply)


# --- made --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("edit", "wanted"),
    [
        (Edit("delete", "No mitoses are seen."), GOOD[: -len(" No mitoses are seen.")]),
        (
            Edit("delete", "Small glands lie in fibrous stroma."),
            GOOD[len("Small glands lie in fibrous stroma. ") :],
        ),
        (Edit("delete", "and pale"), GOOD.replace(" and pale", "")),
        (Edit("delete", "round"), GOOD.replace("round ", "")),
        (Edit("modify", "large, round", "small"), GOOD.replace("large, round", "small")),
        (Edit("add", "Pus.", ""), f"Pus. {GOOD}"),
        (Edit("add", "Pus.", "No mitoses are seen."), f"{GOOD} Pus."),
        (Edit("add", "and oval", "pale"), GOOD.replace("pale", "pale and oval")),
        (Edit("add", ", oval", "large"), GOOD.replace("large", "large, oval")),
    ],
)
def test_an_edit_changes_its_words_and_no_others(edit: Edit, wanted: str) -> None:
    assert apply(GOOD, [edit]) == wanted


def test_edits_are_made_in_order_on_what_the_one_before_has_left() -> None:
    edits = [
        Edit("modify", "large", "huge"),
        Edit("delete", "huge, round and"),
        Edit("add", "very", "are pale"),
    ]
    with pytest.raises(DataError, match="not in the caption"):
        apply(GOOD, edits[::-1])
    assert apply(GOOD, edits[:2]) == GOOD.replace("large, round and ", "")
    assert apply(GOOD, []) == GOOD


@pytest.mark.parametrize(
    ("text", "times"),
    [("necrosis", "not in"), ("mall", "not in"), ("nuclei", "not in"), ("are", "2 times in")],
)
def test_what_does_not_stand_there_exactly_once_as_whole_words_is_a_fault(
    text: str, times: str
) -> None:
    for edit in (Edit("delete", text), Edit("modify", text, "x"), Edit("add", "x", text)):
        with pytest.raises(DataError, match=f"{times} the caption"):
            apply(GOOD, [edit])


# --- spoilt ------------------------------------------------------------------------------


def test_edits_of_all_kinds_are_taken_back_exactly() -> None:
    edits = [
        Edit("add", "There is necrosis.", "stroma."),
        Edit("delete", "round and"),
        Edit("modify", "No mitoses", "Mitoses"),
        Edit("delete", "Small glands lie in fibrous stroma."),
    ]
    found = spoil(GOOD, edits)
    assert found.caption == "There is necrosis. Nuclei are large, pale. Mitoses are seen."
    assert apply(found.caption, found.edits) == GOOD
    assert [edit.op for edit in found.edits] == ["add", "modify", "add", "delete"]


def test_a_word_that_is_made_equal_to_another_is_told_apart_by_its_neighbours() -> None:
    found = spoil("Large cells beside small cells.", [Edit("modify", "small", "Large")])
    assert found.caption == "Large cells beside Large cells."
    assert found.edits == (Edit("modify", "beside Large", "beside small"),)


@pytest.mark.parametrize(
    "edit",
    [
        Edit("modify", "large", "large"),  # changes nothing
        Edit("add", "Nuclei are large, round and pale.", "stroma."),  # stands there twice then
        Edit("delete", "necrosis"),
    ],
)
def test_what_cannot_be_taken_back_is_refused(edit: Edit) -> None:
    with pytest.raises(DataError):
        spoil(GOOD, [edit])


def test_real_captions_spoilt_by_rule_are_restored_exactly() -> None:
    captions = [
        one["caption"]
        for one in json.loads((DATA / "captions" / "pathgen-sample.json").read_text())[:400]
    ]
    contrasts, claims = rules()
    rng, kinds = np.random.default_rng(0), set[str]()
    for caption in captions:
        found = spoil_by_rule(caption, contrasts, claims, rng)
        assert found.caption != caption
        assert 1 <= len(found.edits) <= 3
        assert apply(found.caption, read_edits(written(found.edits))) == caption
        kinds |= {edit.op for edit in found.edits}
    assert kinds == {"add", "delete", "modify"}
    again = [spoil_by_rule(c, contrasts, claims, np.random.default_rng(7)) for c in captions[:9]]
    assert again == [
        spoil_by_rule(c, contrasts, claims, np.random.default_rng(7)) for c in captions[:9]
    ]


words = st.lists(
    st.sampled_from(["large", "cells", "are", "seen,", "The", "(pale)", "x."]),
    min_size=1,
    max_size=9,
)


@given(words.map(" ".join), st.integers(0, 99))
def test_any_caption_is_spoilt_so_that_it_can_be_restored_or_not_at_all(
    caption: str, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    try:
        found = spoil_by_rule(caption, [["large", "small"], ["pale", "dark"]], ["A b."], rng)
    except DataError:
        return
    assert found.caption != caption
    assert apply(found.caption, found.edits) == caption


def test_a_caption_in_which_nothing_can_be_changed_is_refused() -> None:
    with pytest.raises(DataError, match="nothing in this caption can be changed"):
        spoil_by_rule("Fat.", [["large", "small"]], [], np.random.default_rng(0))


def test_sentences_end_where_another_begins() -> None:
    assert sentences_of("A 0.5 mm gland. It is red! Is it, e.g. benign?") == [
        "A 0.5 mm gland.",
        "It is red!",
        "Is it, e.g. benign?",
    ]

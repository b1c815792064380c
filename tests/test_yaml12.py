"""YAML in as people mean it, and out so that it is read back as it was."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pathcli.errors import DataError
from pathcli.yaml12 import dump_yaml, parse_yaml


def refusal(text: str) -> str:
    with pytest.raises(DataError) as caught:
        parse_yaml(text, "mine.yaml")
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E5", 1e5),
        ("-2.5e+3", -2500.0),
        (".5", 0.5),
        ("1.", 1.0),
        ("010", 10),
        ("+7", 7),
        ("true", True),
        ("False", False),
        ("~", None),
        ("", None),
        ("null", None),
        *((word, word) for word in ("no", "yes", "on", "off", "y", "N", "0o17", "0x1f", "1_000")),
        *((word, word) for word in ("2001-01-01", "1:30", "1e-4 mm", "e5", "<<", "=", ".inf")),
        ("'1e-4'", "1e-4"),
    ],
)
def test_plain_scalars_are_what_they_look_like(text: str, value: Any) -> None:
    found = parse_yaml(f"a: {text}", "mine.yaml")["a"]
    assert found == value
    assert type(found) is type(value)


def test_a_key_given_twice_is_refused_with_its_line() -> None:
    assert (
        refusal("a: 1\nb:\n  c: 2\n  c: 3\n") == "mine.yaml, line 4: not YAML: key 'c' given twice"
    )


@pytest.mark.parametrize(
    ("text", "line", "word"),
    [
        ("a:\n\t- b", 2, "\\t"),
        ("a: 1\nb: [1, 2\nc: 3\n", 3, "expected ',' or ']'"),
        ("a: b: c", 1, "mapping values"),
        ("a: 1\n---\nb: 2", 2, "another document"),
        ("a: &x [*x]", 1, "aliases"),
        ("a: &x {b: 1}\nc: *x", 2, "aliases"),
        ("a: !!timestamp 2001-01-01", 1, "timestamp"),
        ("a: !!binary aGk=", 1, "binary"),
        ("a: !!int 0x10", 1, "'0x10' is no int"),
        ("a: !!python/object/apply:os.system [ls]", 1, "os.system"),
        ("[1]: a", 1, "unhashable"),
    ],
)
def test_broken_yaml_is_one_line_with_the_line_number(text: str, line: int, word: str) -> None:
    said = refusal(text)
    assert said.startswith(f"mine.yaml, line {line}: not YAML: ")
    assert word in said


def test_a_control_character_is_refused_in_one_line() -> None:
    assert "x0001" in refusal("a: \x01")


plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
words = st.text(st.characters(exclude_categories=["C"])) | st.sampled_from(
    ["08", "-09", "1e-4", "1.", "010", "0o17", "no", "null", "~", "", "true", "2001-01-01", "<<"]
)


@given(st.recursive(plain | words, lambda x: st.lists(x) | st.dictionaries(words, x), max_leaves=8))
def test_what_is_written_is_read_back_as_it_was(value: Any) -> None:
    again = parse_yaml(dump_yaml(value), "x")
    assert again == value
    assert repr(again) == repr(value)  # 1 is not 1.0, nor True

"""Labelled images and words: what is trained on, what is asked, and what is kept apart."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pathcli.data.captions import ClassCaptions, read_wordings
from pathcli.errors import DataError, ResourceError

WORDS = """
version: 1
templates: ["{}", "an image of {}", "a slide of {}", "here is {}"]
classes: {a: [ash, acorn], b: [birch]}
prompts: {a: [ash], b: [birch]}
unseen: {a: [alder]}
"""


def table(folder: Path, *rows: str) -> Path:
    path = folder / "labels.csv"
    path.write_text("\n".join(["image,label,group,split", *rows]) + "\n")
    return path


@pytest.fixture
def words(tmp_path: Path) -> Path:
    path = tmp_path / "words.yaml"
    path.write_text(WORDS)
    return path


def test_only_train_and_validation_rows_are_read_and_the_rest_counted(
    tmp_path: Path, words: Path
) -> None:
    rows = ("1.png,a,g1,train", "2.png,b,g2,val", "3.png,a,g3,test", "4.png,z,g4,train")
    corpus = ClassCaptions(table=table(tmp_path, *rows), wordings=words).corpus()
    assert [s.name for s in corpus.train] == ["1.png"]
    assert corpus.train[0].images == (str(tmp_path / "1.png"),)
    assert [s.label for s in corpus.val] == ["b"]
    assert corpus.dropped == {"split test": 1, "no words for label z": 1}


def test_a_caption_is_any_phrase_of_the_label_in_any_template(tmp_path: Path, words: Path) -> None:
    rows = ("1.png,a,g1,train", "2.png,b,g2,val")
    corpus = ClassCaptions(table=table(tmp_path, *rows), wordings=words).corpus()
    rng = np.random.default_rng(0)
    drawn = {corpus.caption(corpus.train[0], rng) for _ in range(200)}
    assert drawn == {t.format(p) for t in read_wordings(words).templates for p in ("ash", "acorn")}
    assert corpus.prompts["b"] == ["birch", "an image of birch", "a slide of birch"]


def test_the_digest_follows_labels_groups_splits_and_words(tmp_path: Path, words: Path) -> None:
    def digest(*rows: str) -> str:
        return ClassCaptions(table=table(tmp_path, *rows), wordings=words).corpus().digest

    first = digest("1.png,a,g1,train", "2.png,b,g2,val")
    assert digest("2.png,b,g2,val", "1.png,a,g1,train") == first
    assert digest("1.png,b,g1,train", "2.png,b,g2,val") != first
    words.write_text(WORDS.replace("acorn", "apple"))
    assert digest("1.png,a,g1,train", "2.png,b,g2,val") != first


def test_a_group_on_both_sides_is_refused(tmp_path: Path, words: Path) -> None:
    path = table(tmp_path, "1.png,a,g1,train", "2.png,a,g1,val")
    with pytest.raises(DataError, match="'g1' is in train and in val"):
        ClassCaptions(table=path, wordings=words).corpus()


def test_an_image_on_both_sides_is_refused(tmp_path: Path, words: Path) -> None:
    path = table(tmp_path, "1.png,a,,train", "1.png,a,,val")
    with pytest.raises(DataError, match=r"image '1\.png' is in train and in val"):
        ClassCaptions(table=path, wordings=words).corpus()


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        ("{}, ", "{a}, ", "needs"),
        ("[birch]}\nprompts", "birch}\nprompts", "'birch' is no list of texts"),
        ("[ash, acorn]", "[]", "no list of texts"),
        ("templates:", "template:", "have templates"),
    ],
)
def test_wrong_wordings_are_named(words: Path, before: str, after: str, told: str) -> None:
    before, after = before.replace("{}, ", '"{}", '), after.replace("{a}, ", '"{a}", ')
    assert before in WORDS
    words.write_text(WORDS.replace(before, after))
    with pytest.raises(DataError, match=told):
        read_wordings(words)
    with pytest.raises(ResourceError, match="cannot be read"):
        read_wordings(words.parent / "none.yaml")


def test_an_empty_split_a_missing_column_and_a_missing_table_are_named(
    tmp_path: Path, words: Path
) -> None:
    with pytest.raises(DataError, match="no row of split val"):
        ClassCaptions(table=table(tmp_path, "1.png,a,g1,train"), wordings=words).corpus()
    bare = tmp_path / "bare.csv"
    bare.write_text("image,label\n1.png,a\n")
    with pytest.raises(DataError, match="no column split"):
        ClassCaptions(table=bare, wordings=words).corpus()
    with pytest.raises(ResourceError, match=r"none\.csv: no such file"):
        ClassCaptions(table=tmp_path / "none.csv", wordings=words).corpus()


def test_unseen_phrases_of_the_shipped_wordings_are_never_trained_on(words: Path) -> None:
    shipped = read_wordings()
    for label in ("lung_n", "lung_aca", "lung_scc"):
        assert len(shipped.unseen[label]) == 5
        captions = {c.casefold() for c in shipped.captions(label)}
        assert not any(p.casefold() in c for p in shipped.unseen[label] for c in captions)
    words.write_text(WORDS.replace("[alder]", "[Acorn]"))
    with pytest.raises(DataError, match="'acorn' is among the unseen"):
        read_wordings(words)

from dataclasses import replace
from pathlib import Path

import pytest

from pathcli.data.classes import NAMES, ClassSet, class_set, class_set_of
from pathcli.errors import DataError, ResourceError, UsageError

SIZES = {"lc-lung": 3, "lc-colon": 2, "crc-100k": 9, "bach": 4, "sicapv2": 4, "osteo": 3}
SIZES |= {"skincancer": 16, "wsss4luad": 2, "pcam": 2, "mhist": 2}


@pytest.mark.parametrize("name", NAMES)
def test_every_set_we_know_is_whole(name: str) -> None:
    found = class_set(name)
    assert len(found.classes) == SIZES[name]
    assert found.title
    assert found.source
    assert found.licence
    assert found.get
    assert found.layout is not None
    for key, texts in found.texts(ensemble=True).items():
        single = found.texts()[key]
        assert len(single) == 1
        assert texts[0] == single[0]
        assert len(set(texts)) == len(texts) >= 8, "an ensemble is many different texts"


def test_single_prompts_are_those_of_pathgen() -> None:
    def prompts(name: str) -> list[str]:
        return [text for (text,) in class_set(name).texts().values()]

    assert prompts("lc-lung") == [
        "An image of benign lung tissue",
        "An image of lung adenocarcinoma",
        "An image of lung squamous cell carcinomas",
    ]
    assert prompts("crc-100k")[0] == "An H&E patch of adipose"
    assert prompts("crc-100k")[8] == "An H&E patch of colorectal adenocarcinoma epithelium"
    assert prompts("bach")[1] == "An H&E image of in-situ carcinoma"
    assert prompts("osteo") == [
        f"An H&E image patch of {text}" for text in ("non-tumor", "necrotic tumor", "viable tumor")
    ]
    assert prompts("wsss4luad") == [
        "An H&E image of tumor tissue.",
        "An H&E image of normal tissue.",
    ]


def test_published_numbers_are_shares_with_their_source() -> None:
    rows = class_set("lc-lung").published_rows()
    assert {(row["encoder"], row["value"]) for row in rows} == {
        ("PathGen-CLIP", 0.8502),
        ("CONCH", 0.8951),
        ("PLIP", 0.8544),
    }
    for name in NAMES:
        for row in class_set(name).published_rows():
            assert 0 < row["value"] < 1
            assert row["source"]
            assert row["images"]
    assert not class_set("mhist").published_rows()


def test_a_label_is_known_by_key_and_alias_in_any_case() -> None:
    pcam = class_set("pcam")
    assert [pcam.key_of(label) for label in ("1", "Tumor", "0", "2")] == [
        "tumor",
        "tumor",
        "normal",
        None,
    ]


def test_other_words_replace_text_synonyms_and_templates() -> None:
    lung = class_set("lc-lung").reworded(["LUNG_N=healthy lung = fine"], "{}!")
    assert lung.texts(ensemble=True)["lung_n"] == ("healthy lung = fine!",)
    assert lung.texts()["lung_aca"] == ("lung adenocarcinoma!",)
    assert len(lung.texts(ensemble=True)["lung_aca"]) == 3


@pytest.mark.parametrize(
    ("prompts", "template", "told"),
    [
        (["lung_n"], None, "CLASS=TEXT"),
        (["lung_n= "], None, "CLASS=TEXT"),
        (["lung_m=x"], None, "did you mean 'lung_n'"),
        ([], "no place", "needs {} once"),
        ([], "{} and {}", "needs {} once"),
    ],
)
def test_wrong_words_are_refused(prompts: list[str], template: str | None, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        class_set("lc-lung").reworded(prompts, template)


def test_an_unknown_set_brings_a_suggestion() -> None:
    with pytest.raises(UsageError, match="did you mean 'lc-lung'"):
        class_set("lc-lungs")


def test_a_file_of_ones_own_is_a_set(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "title: Mine\nclasses:\n  - {key: no, text: benign}\n  - {key: yes, text: malignant}\n"
    )
    mine = class_set(str(path))
    assert (mine.name, mine.keys) == ("mine", ("no", "yes"))
    assert mine.texts() == {
        "no": ("An H&E image of benign",),
        "yes": ("An H&E image of malignant",),
    }


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("title: x\nclasses: [{key: a, text: b}]", "two classes are needed"),
        ("title: x\nclasses: [{key: a, text: b}, {key: A, text: c}]", "name of two classes"),
        ("title: x\nclasses: [{key: a}, {key: b, text: c}]", "classes.0.text: field required"),
        ("title: x\nclases: []", "clases|classes"),
        ("title: x\ntemplate: hm\nclasses: [{key: a, text: b}, {key: c, text: d}]", "needs {}"),
        ("just text", "not a data set"),
        ("a: [", "not YAML"),
    ],
)
def test_a_wrong_file_says_what_is_wrong(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    with pytest.raises(DataError, match=told):
        class_set(str(path))


def test_a_missing_file_is_named() -> None:
    with pytest.raises(ResourceError, match=r"absent\.yaml: cannot be read"):
        class_set("absent.yaml")


def test_labels_alone_make_a_set() -> None:
    found = class_set_of(["in_situ", "benign", "in_situ"], "polyps")
    assert found.texts() == {
        "benign": ("An H&E image of benign",),
        "in_situ": ("An H&E image of in situ",),
    }
    with pytest.raises(DataError, match="two classes are needed, there is benign"):
        class_set_of(["benign"], "polyps")


def test_a_set_is_a_value() -> None:
    first: ClassSet = class_set("bach")
    assert first == class_set("bach")
    assert replace(first, split="test") != first

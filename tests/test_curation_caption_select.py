"""Which patches are worth describing: nearest to texts, of every cluster, and no two alike."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from pathcli.curation.caption.select import Choice, best, patch_spec, select, spread
from pathcli.curation.caption.texts import Reports, attributes_of, findings_in
from pathcli.errors import DataError, UsageError
from pathcli.types import Features, Key
from pathcli.weights import asset
from pathcli.yaml12 import read_mapping

PROJECTS = (
    "acc blca brca cesc chol coad dlbc esca gbm hnsc kich kirc kirp lgg lihc luad lusc meso ov "
    "paad pcpg prad read sarc skcm stad tgct thca thym ucec ucs uvm"
)


def features(values: np.ndarray, bad: tuple[int, ...] = ()) -> Features:
    half, status = values.astype(np.float16), np.zeros(len(values), np.uint8)
    half[list(bad)], status[list(bad)] = np.nan, 1
    return Features(
        Key("a-00000000", 0.25, "t", "e"), half, np.zeros((len(values), 2), np.int32), status
    )


def drawn(n: int, d: int = 8) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(n, d)).astype(np.float32)


def unit(values: np.ndarray) -> np.ndarray:
    found: np.ndarray = values / np.linalg.norm(values, axis=1, keepdims=True)
    return found


# --- chosen ------------------------------------------------------------------------------


def test_a_patch_is_168_um_a_side_edge_to_edge() -> None:
    spec = patch_spec()
    assert spec.size_um == pytest.approx(672 * 0.25)
    assert spec.step_px == spec.size_px


def test_the_best_are_the_highest_and_unreadable_ones_never() -> None:
    scores = np.array([0.1, np.nan, 0.9, 0.9, -1.0], np.float32)
    assert best(scores, 3) == [2, 3, 0]
    assert best(scores, 9) == [2, 3, 0, 4]
    assert best(scores, 0) == []


def test_attributes_count_by_the_nearest_and_findings_by_their_sum() -> None:
    axes = np.eye(2, dtype=np.float32)
    near_one, between = [1.0, 0.0], [1.0, 1.0]
    found = features(np.array([between, near_one, [-1.0, -1.0]]), bad=(2,))
    texts = {"x": axes[0], "y": axes[1]}
    only = Choice(top=1, diverse=0)
    by_attribute = select(found, texts, {}, only).chosen
    by_report = select(found, {}, texts, only).chosen
    assert [(c.row, c.routes, c.text) for c in by_attribute] == [(1, ("attributes",), "x")]
    assert by_attribute[0].cosine == 1
    assert [(c.row, c.routes) for c in by_report] == [(0, ("report",))]
    both = select(found, texts, texts, Choice(top=2, diverse=9, duplicates=1)).chosen
    assert [c.row for c in both] == [1, 0]
    assert both[0].routes == ("attributes", "report", "diversity")


def test_near_duplicates_of_better_ones_are_left_out_as_a_plain_loop_would() -> None:
    values = np.repeat(drawn(60), 5, axis=0) + 0.4 * drawn(300)
    texts = {str(i): row for i, row in enumerate(unit(drawn(3)))}
    found = select(features(values), texts, {}, Choice(top=200, diverse=0))
    rows = unit(values.astype(np.float16).astype(np.float32))
    kept: list[int] = []
    left: list[int] = []
    for row in best((rows @ np.stack([*texts.values()]).T).max(1), 200):
        alike = any(rows[row] @ rows[other] >= 0.88 for other in kept)
        (left if alike else kept).append(row)
    assert [c.row for c in found.chosen] == kept
    assert list(found.duplicates) == left
    assert 20 < len(left) < 180


def test_without_texts_patches_come_from_clusters_alone() -> None:
    found = select(features(drawn(50)), {}, {}, Choice(top=5, diverse=7)).chosen
    assert len(found) == 7
    assert {(c.routes, c.text, c.cosine) for c in found} == {(("diversity",), "", None)}


def test_every_cluster_is_drawn_from_before_any_is_drawn_from_twice() -> None:
    rare = 4
    n, rng = 400, np.random.default_rng(1)
    common = np.array([1.0, 0, 0, 0, 0]) + 0.05 * rng.normal(size=(n - 2 * rare, 5))
    others = [np.eye(5)[k] + 0.01 * rng.normal(size=(rare, 5)) for k in (1, 2)]
    values = np.concatenate([common, *others]).astype(np.float16)
    first = spread(values, math.isqrt(n), seed=0)
    kinds = np.searchsorted([n - 2 * rare, n - rare], first, "right")
    assert {*kinds.tolist()} == {0, 1, 2}
    every = spread(values, 999, seed=0)
    assert sorted(every.tolist()) == list(range(n))
    assert np.array_equal(every[: len(first)], first)
    assert np.array_equal(spread(values, 999, seed=0), every)
    assert not np.array_equal(spread(values, 999, seed=1), every)


def test_patches_that_are_all_alike_are_no_trouble() -> None:
    assert sorted(spread(np.ones((9, 3), np.float16), 9, 0).tolist()) == list(range(9))
    assert spread(np.ones((1, 3), np.float16), 4, 0).tolist() == [0]


@pytest.mark.parametrize(
    "wrong",
    [{"top": -1}, {"diverse": -1}, {"duplicates": 1.1}, {"seed": -1}, {"top": 0, "diverse": 0}],
)
def test_numbers_that_choose_nothing_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(UsageError, match=r"--top|--diverse"):
        Choice(**wrong)


# --- by which texts ----------------------------------------------------------------------


def test_every_project_of_tcga_has_attributes_and_none_is_said_twice() -> None:
    known = read_mapping(asset("curation/attributes.yaml"), "")
    assert {*known} == {"common", *PROJECTS.split()}
    for name in PROJECTS.split():
        texts = attributes_of(f"TCGA-{name.upper()}", None, {})
        assert len(texts) == len({*texts}) == 18
        assert known[name]["name"]
    assert attributes_of("any", None, {}) == tuple(known["common"])


def test_another_cancer_is_met_with_the_nearest_name() -> None:
    with pytest.raises(UsageError, match=r"--cancer luda: did you mean 'luad'"):
        attributes_of("luda", None, {})
    with pytest.raises(UsageError, match="--cancer common"):
        attributes_of("common", None, {})


def test_a_report_without_a_model_is_taken_line_by_line() -> None:
    text = "Invasive carcinoma of the breast. Grade 2\n- Lymphatic invasion seen; no necrosis seen"
    found, fault = findings_in(text, None, {})
    wanted = ("Invasive carcinoma of the breast", "Lymphatic invasion seen", "no necrosis seen")
    assert (found, fault) == (wanted, "")
    assert findings_in("  ", None, {}) == ((), "")


def test_reports_are_found_by_slide_or_by_what_its_name_begins_with(tmp_path: Path) -> None:
    found = Reports({"TCGA-AA-0001": "patient", "TCGA-AA-0001-01Z-00-DX1": "slide", "a": "x"})
    assert found.find("TCGA-AA-0001-01Z-00-DX1.ABC") == "slide"
    assert found.find("TCGA-AA-0001-01Z-00-DX2") == "patient"
    assert found.find("TCGA-AA-00012") == found.find("ab") == ""


def test_reports_are_a_table_or_a_folder(tmp_path: Path) -> None:
    folder = tmp_path
    (folder / "r.csv").write_text('wsi_id,report\ns1,"A, b"\n')
    assert Reports.read(folder / "r.csv").texts == {"s1": "A, b"}
    with pytest.raises(DataError, match=r"SLIDE\.txt"):
        Reports.read(folder)
    (folder / "s2.txt").write_text("C.")
    assert Reports.read(folder).find("s2") == "C."
    (folder / "bad.csv").write_text("slide,words\ns1,x\n")
    with pytest.raises(DataError, match="columns wsi_id and report, not slide, words"):
        Reports.read(folder / "bad.csv")

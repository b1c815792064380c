"""The report of an evaluation on images says what was found, of how many, and shows the errors."""

from __future__ import annotations

import csv
import json
import re
import sys
import types
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree as ET

import numpy as np
import pytest
from PIL import Image

from pathcli.evals import patch_pictures
from pathcli.evals.patch_pictures import confusion_chart, feature_maps, worst_errors
from pathcli.evals.patch_report import (
    abstention_text,
    class_rows,
    metric_rows,
    patch_report,
    write_patches,
)
from pathcli.evals.patch_scores import Scored, measure_patches
from pathcli.report import Section
from pathcli.types import NOTICE, Sample

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def scored(tmp_path: Path) -> Scored:
    """24 images of 12 groups: of 3 <classes>, the last of which is wrong twice, once surely."""
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], 8)
    chances = np.full((24, 3), 0.1) + 0.7 * np.eye(3)[labels]
    chances[22], chances[23] = [0.05, 0.9, 0.05], [0.6, 0.2, 0.2]
    samples = []
    for i in range(24):
        path = tmp_path / f"image {i}.png"
        if i > 21:  # of the others no picture is shown
            Image.fromarray(rng.integers(0, 255, (300, 200, 3), np.uint8)).save(path)
        samples.append(Sample(f"image {i}", (str(path),), group=f"g{i // 2 if i < 22 else i}"))
    return Scored(
        "made: probe",
        ("a", "b<i>", "c"),
        samples,
        labels,
        chances,
        features=rng.normal(size=(24, 5)).astype(np.float32) + labels[:, None],
        dropped={"not an image": 3},
        warnings=("mind the gap",),
        published=(
            {"encoder": "X", "metric": "accuracy", "value": 0.5, "source": "a paper"},
            {"encoder": "X", "metric": "kappa", "value": 0.4, "source": "a paper"},
        ),
        texts={"a": [f"wording {i}" for i in range(10)], "b<i>": ["b"], "c": ["c"]},
        lead="What was done.",
        provenance={"encoder": "made-0123", "nested": {"x": 1}},
    )


def texts(svg: str) -> list[str]:
    return ["".join(node.itertext()) for node in ET.fromstring(svg).iter(f"{SVG}text")]  # noqa: S314


def test_the_three_files_say_the_same(scored: Scored, tmp_path: Path) -> None:
    numbers = measure_patches(scored, 50)
    extra = [Section("Few shots", rows=[{"shots": 1}])]
    page = write_patches(tmp_path / "out", scored, numbers, "pathcli probe made", extra)
    text = page.read_text()
    known = json.loads((page.parent / "report.json").read_text())
    rows = list(csv.DictReader((page.parent / "predictions.csv").read_text().splitlines()))
    assert known["metrics"]["accuracy"]["value"] == round(22 / 24, 4)
    assert "0.917 [" in text
    right = [row["label"] == row["predicted"] for row in rows]
    assert (sum(right), len(rows)) == (22, 24)
    assert rows[22]["p_b<i>"] == "0.900000"
    assert {row["note"] for row in rows} == {NOTICE}
    assert known["provenance"]["confusion"] == [[8, 0, 0], [0, 8, 0], [1, 1, 6]]
    assert known["provenance"]["dropped"] == {"not an image": 3}
    assert known["provenance"]["texts"]["a"][9] == "wording 9"
    assert known["provenance"]["units"] == 13
    for word in ("What was done.", "mind the gap", "pathcli probe made", "Few shots", "a paper"):
        assert word in text
    assert "left out: not an image" in text
    assert "made-0123" in text
    assert "24 images of 13 groups" in text
    assert "b<i>" not in text
    assert text.count("data:image/jpeg") == 2
    assert not re.search(r'(src|href)="http', text)


def test_a_published_number_stands_beside_ours_where_the_metric_is_ours(
    scored: Scored, tmp_path: Path
) -> None:
    text = write_patches(tmp_path, scored, measure_patches(scored, 50), "x").read_text()
    rows = re.findall(r"<tr><td>X</td>.*?</tr>", text)
    assert "<td>0.5</td><td>0.917 [" in rows[0]
    assert "<td>0.4</td><td></td>" in rows[1]


def test_a_report_without_extras_has_no_empty_sections(scored: Scored, tmp_path: Path) -> None:
    bare = replace(
        scored,
        probabilities=np.eye(3)[scored.labels],
        features=None,
        warnings=(),
        published=(),
        texts={},
        samples=[replace(sample, group="") for sample in scored.samples],
    )
    text = write_patches(tmp_path, bare, measure_patches(bare, 50), "x").read_text()
    titles = re.findall("<h2>(.*?)</h2>", text)
    assert titles == ["How good", "Class by class", "Images: used and left out", "To repeat it"]
    assert "No groups are known" in text


def test_undefined_numbers_are_null_in_json(scored: Scored) -> None:
    none = replace(scored, labels=np.minimum(scored.labels, 1))
    report = patch_report(none, measure_patches(none, 20))
    assert report.metrics["auroc"]["value"] is None
    json.dumps(report.metrics, allow_nan=False)
    rows = class_rows(none, measure_patches(none, 20))
    assert [row["images"] for row in rows] == [8, 16, 0]
    assert rows[2]["recall"] == "not defined"


def test_abstention_has_a_column_and_a_sentence(scored: Scored) -> None:
    stays = scored.probabilities.max(1) < 0.7
    shy = replace(scored, abstained=stays)
    numbers = measure_patches(shy, 50)
    rows = metric_rows(shy, numbers)
    assert list(rows[0]) == ["metric", "all 24 images", "23 answered"]
    assert rows[0]["23 answered"].startswith(f"{22 / 23:.3f} [")
    assert abstention_text(shy, numbers).startswith("1 of 24 images were not named: 0.042 [0.001,")
    assert abstention_text(scored, numbers) == ""


# --- pictures ----------------------------------------------------------------------------


def test_the_confusion_matrix_holds_shares_and_counts(scored: Scored) -> None:
    found = " ".join(texts(confusion_chart(scored)))
    for word in ("b<i>", "predicted", "0.75", "0.12", "1.00"):
        assert word in found


def test_the_worst_error_of_each_group_comes_first(scored: Scored) -> None:
    pictures, unseen = worst_errors(scored)
    assert [p.caption for p in pictures] == [
        "c, said b<i> with 0.90: image 22",
        "c, said a with 0.60: image 23",
    ]
    assert pictures[0].pixels.shape == (224, 149, 3)
    assert not unseen
    same = [*scored.samples[:22], *(replace(s, group="one") for s in scored.samples[22:])]
    assert len(worst_errors(replace(scored, samples=same))[0]) == 1


def test_an_error_that_cannot_be_read_is_told_not_hidden(scored: Scored) -> None:
    Path(str(scored.samples[22].images[0])).unlink()
    pictures, unseen = worst_errors(replace(scored, abstained=np.ones(24, bool)))
    assert len(pictures) == 1
    assert "image 22; not shown:" in unseen[0]
    assert "(abstained)" in unseen[0]


def test_the_map_has_every_class_and_the_components_of_scikit_learn(scored: Scored) -> None:
    maps, told = feature_maps(scored)
    words = " ".join(texts(maps[0]))
    values = np.linalg.svd(scored.features - scored.features.mean(0), compute_uv=False) ** 2
    assert f"component 1 ({values[0] / values.sum():.0%} of variance)" in words
    assert all(name in words for name in scored.classes)
    assert "Every point is an image" in told
    assert feature_maps(scored)[0] == maps
    assert feature_maps(replace(scored, features=None)) == ([], "")


@pytest.mark.parametrize("shape", [(24, 1), (24, 3)])
def test_features_that_say_nothing_still_make_a_map(scored: Scored, shape: tuple) -> None:
    flat = replace(scored, features=np.ones(shape, np.float32))
    assert feature_maps(flat)[0][0].startswith("<svg")


def test_umap_is_drawn_where_it_is_installed(
    scored: Scored, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {}

    class UMAP:
        def __init__(self, **settings: object) -> None:
            asked.update(settings)

        def fit_transform(self, features: np.ndarray) -> np.ndarray:
            return features[:, :2]

    module = types.ModuleType("umap")
    module.UMAP = UMAP
    monkeypatch.setitem(sys.modules, "umap", module)
    monkeypatch.setattr(patch_pictures, "find_spec", lambda _: object())
    maps, told = feature_maps(scored)
    assert "UMAP" in texts(maps[1])
    assert asked == {"n_neighbors": 15, "metric": "cosine", "random_state": 0, "n_jobs": 1}
    assert "UMAP" in told


def test_of_many_images_a_random_part_is_drawn(
    scored: Scored, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patch_pictures, "POINTS", 10)
    assert "A random 10 of 24 images" in feature_maps(scored)[1]

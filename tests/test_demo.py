import json
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from conftest import Run

from pathcli.errors import DataError
from pathcli.evals.demo import cluster, demo
from pathcli.report import Picture, Section, as_json, html_page, metric
from pathcli.store import Store
from pathcli.types import NOTICE, Report
from pathcli.weights import find


class Links(HTMLParser):
    """Collect every address a page would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [v or "" for k, v in attrs if k in {"src", "href"}]


def test_the_demo_leaves_a_page_that_needs_nothing_beside_it(
    slide_path: Path, store: Store, fake: type, tmp_path: Path
) -> None:
    report = demo(slide_path, out=tmp_path / "out", store=store, encoder="fake", ask=False)
    page = (tmp_path / "out" / "report.html").read_text()
    links = Links()
    links.feed(page)
    assert len(links.found) >= 4
    assert all(link.startswith("data:image/") for link in links.found)
    assert NOTICE in page
    told = json.loads((tmp_path / "out" / "demo.json").read_text())
    assert told == as_json(report)
    assert told["metrics"]["tiles"]["value"] == told["provenance"]["run"]["tiles"]
    assert set(told["metrics"]["tiles"]) == {"value", "low", "high", "n"}
    assert {"torch", "timm", "pathcli"} <= set(told["provenance"]["versions"])
    assert told["provenance"]["store_keys"]["encoder"].startswith("fake-")
    assert str(tmp_path) not in json.dumps(told["provenance"]["versions"])


def test_the_demo_takes_a_folder_of_one_slide_and_no_more(
    slide_path: Path, store: Store, fake: type, tmp_path: Path
) -> None:
    (tmp_path / "case").mkdir()
    one = slide_path.rename(tmp_path / "case" / "a.svs")
    report = demo(one.parent, out=tmp_path / "out", store=store, encoder="fake", mpp=1.0, ask=False)
    assert report.metrics["groups"]["value"] > 1
    page = (tmp_path / "out" / "report.html").read_text()
    assert "upsampled" in page  # what the terminal warns of, the page does too
    assert "--encoder fake --slide-mpp 1" in page
    (tmp_path / "case" / "b.svs").write_bytes(one.read_bytes())
    with pytest.raises(DataError, match="name one slide"):
        demo(one.parent, out=tmp_path / "out", store=store, encoder="fake", ask=False)


def test_a_slide_without_tissue_has_no_map(tmp_path: Path, store: Store, fake: type) -> None:
    import synthetic

    path = synthetic.slide(tmp_path / "glass.svs", synthetic.picture(900, 900, (0, 0, 0, 0)))
    with pytest.raises(DataError, match="nothing to map"):
        demo(path, out=tmp_path / "out", store=store, encoder="fake", ask=False)
    assert not (tmp_path / "out").exists()


def test_clusters_are_numbered_by_size_and_leave_unreadable_tiles_out(
    rng: np.random.Generator,
) -> None:
    centres = np.eye(3)[[0] * 30 + [1] * 20 + [2] * 10]
    values = (centres + rng.normal(0, 0.02, centres.shape)).astype(np.float16)
    status = np.zeros(60, np.uint8)
    values[5], status[5] = np.nan, 1
    labels, order = cluster(values, status, clusters=3)
    assert labels[5] == -1
    assert order[-1] == 5
    assert [int((labels == k).sum()) for k in range(3)] == [29, 20, 10]
    assert len(set(labels[30:50])) == 1
    assert np.array_equal(labels, cluster(values, status, clusters=3)[0])


def test_a_report_escapes_what_it_is_given() -> None:
    row = {"<b>": "a & b"}
    picture = Picture(np.zeros((4, 4, 3), np.uint8), '"quoted" <i>', (1, 2, 3))
    section = Section("<script>", "x < y", "a > b", [row], [picture])
    page = html_page("<title>", "lead", [section])
    assert "<script>" not in page
    assert "<b>" not in page
    assert "a &amp; b" in page


def test_a_metric_has_an_interval_or_says_none() -> None:
    assert metric(0.9, 0.8, 0.95, 100) == {"value": 0.9, "low": 0.8, "high": 0.95, "n": 100}
    report = Report("t", {"a": metric(1)}, (), {})
    assert as_json(report)["metrics"]["a"] == {"value": 1, "low": None, "high": None, "n": None}


@pytest.mark.slow
@pytest.mark.usefixtures("lite0")
def test_the_real_demo_separates_tissue_that_looks_different(tmp_path: Path, store: Store) -> None:
    if find("demo-slide") is None:
        pytest.skip("demo-slide is not in the cache; run: pathcli models pull demo-slide")
    report = demo(out=tmp_path / "out", store=store)
    assert report.metrics["tiles"]["value"] > 150
    assert 0.3 < (report.metrics["tissue_share"]["value"] or 0) < 0.45
    key = next(iter(store.features))
    features = store.features[key]
    labels, _ = cluster(features.values, features.status)
    # neighbours look alike: a map that ignored the tissue would agree by chance alone
    xy = {tuple(p): label for p, label in zip(features.xy.tolist(), labels, strict=True)}
    step = int(np.diff(np.unique(features.xy[:, 0])).min())
    pairs = [
        (label, xy[near])
        for (x, y), label in xy.items()
        for near in xy
        if near[1] == y and 0 < near[0] - x <= step + 1
    ]
    agree = np.mean([a == b for a, b in pairs])
    chance = sum((np.bincount(labels) / len(labels)) ** 2)
    assert agree > 2 * chance


def test_patches_that_cannot_be_shown_are_told_before_the_slide_is_worked_on(
    run: Run, tmp_path: Path
) -> None:
    for name, why in (("", "a folder without images"), ("a.png", "empty file")):
        if name:
            (tmp_path / name).write_bytes(b"")
        code, _, err = run("demo", "--slide", "none.svs", "--patches", str(tmp_path))
        assert code == 4
        assert why in err

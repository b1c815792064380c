"""What an evaluation owns up to: readings, what is missing, what is drawn anew, what is gone."""

from __future__ import annotations

import json
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import synthetic
from cohorts import lines, paint, planted, put, quick, recipe, split, table, values
from PIL import Image
from sklearn.metrics import roc_auc_score

from pathcli.encoders.embedding import Embedder
from pathcli.errors import UsageError
from pathcli.evals import mil_scores
from pathcli.evals.mil import Evaluation, mil_eval
from pathcli.evals.mil_errors import worst_errors
from pathcli.evals.mil_pages import cohort_flow
from pathcli.evals.mil_report import Measurements, mil_report, write_evaluation
from pathcli.evals.mil_scores import Scores, compare, measure_all
from pathcli.metrics.classification import macro_auroc
from pathcli.mil import bags as bags_module
from pathcli.mil.bags import BagData, Bags, look_up
from pathcli.mil.heatmap import draw_heatmap
from pathcli.mil.predict import Predictor
from pathcli.mil.tables import read_labels
from pathcli.recipe import Recipe, load_recipe
from pathcli.runs import train
from pathcli.slides import plain
from pathcli.slides.tiling import tile_spec
from pathcli.store import Store
from pathcli.store.store import FeatureEntries
from pathcli.types import Features, Key

pytestmark = pytest.mark.usefixtures("fake")


def numbers_of(found: Evaluation) -> Measurements:
    """Return the numbers of an evaluation, its intervals from few draws."""
    return Measurements({s.name: measure_all(s, 20) for s in found.heads}, compare(found.heads, 20))


def page_of(found: Evaluation, folder: Path) -> str:
    numbers = numbers_of(found)
    return write_evaluation(folder, found, numbers, mil_report(found, numbers), "").read_text()


def evaluate(labels: Path, runs: Path, store: Store, **more: Any) -> Evaluation:
    return mil_eval(str(labels), runs=runs, store=store, **more)


def of_head(kind: str, labels: Path, *settings: str) -> Recipe:
    """Return a recipe of one epoch with a head that has no settings, named after it."""
    given = [s for s in quick(1) if not s.startswith("head")]
    sets = [f"data.labels={labels}", *given, f"head={{kind: {kind}}}", *settings]
    return replace(load_recipe("mil-abmil", sets), name=kind)


# --- splits ------------------------------------------------------------------------------


def test_seed_s_has_fold_s_of_stamps_splits_and_the_validation_share_asked_for(
    store: Store, tmp_path: Path
) -> None:
    labels = planted(store, tmp_path / "labels.csv", 30)
    cases = [f"p{i}" for i in range(30)]
    folds = [
        {"train_patients": cases[:i] + cases[i + 10 :], "test_patients": cases[i : i + 10]}
        for i in (0, 10, 20)
    ]
    path = tmp_path / "splits.json"
    path.write_text(json.dumps({"splits": folds}))
    for share, size in ((0.2, 4), (0.5, 10)):
        data = BagData(labels=labels, splits=path, val=share)
        for seed, fold in enumerate(folds, 1):
            part = data.partition(seed)
            assert {slide.partition("-")[0] for slide in part.test} == set(fold["test_patients"])
            assert (len(part.val), len(part.train)) == (size, 20 - size)
    with pytest.raises(UsageError, match="fold 3 was asked for, the file has 3"):
        data.partition(4)
    known = recipe(labels, f"data.splits={path}", "train.epochs=1", "train.seed=[1,2,3]")
    train(known, out=tmp_path / "runs", store=store)
    (scores,) = evaluate(labels, tmp_path / "runs", store).heads
    assert sorted(p for t in scores.tested for p in t.patients) == sorted(cases)


# --- readings ----------------------------------------------------------------------------


def test_readings_of_the_same_test_slides_are_counted_whatever_reads_them(
    store: Store, tmp_path: Path
) -> None:
    labels = planted(store, tmp_path / "labels.csv")
    runs = {kind: tmp_path / f"{kind} runs" for kind in ("mean", "max")}
    for kind, folder in runs.items():
        train(of_head(kind, labels), out=folder, store=store)
    times = [evaluate(labels, runs[kind], store).times for kind in ("mean", "max", "mean")]
    assert times == [1, 2, 3]
    train(of_head("mean", labels, "train.seed=[2]"), out=tmp_path / "seed 2", store=store)
    # the other seed's split shares slides with the first: those are read once more
    assert evaluate(labels, tmp_path / "seed 2", store).times == 4
    found = evaluate(labels, runs["max"], store)
    assert found.times == 5
    assert len((store.root / "evaluations.jsonl").read_text().splitlines()) == 5
    assert "read as a test for time 5" in page_of(found, tmp_path / "out")


def test_a_count_that_cannot_be_written_or_read_is_not_the_first(
    store: Store, tmp_path: Path
) -> None:
    labels = planted(store, tmp_path / "labels.csv")
    train(of_head("mean", labels), out=tmp_path / "runs", store=store)
    count = store.root / "evaluations.jsonl"
    for text in ("half a li", "5", "{}"):
        count.write_text(text + "\n")
        assert evaluate(labels, tmp_path / "runs", store).times is None, text
    count.unlink()
    count.mkdir()  # not to be written, even by root
    found = evaluate(labels, tmp_path / "runs", store)
    assert found.times is None
    page = page_of(found, tmp_path / "out")
    assert "could not be counted" in page
    assert "first time" not in page
    assert mil_report(found, numbers_of(found)).provenance["test_slides_read_times"] is None


# --- what is missing ---------------------------------------------------------------------


def test_missing_test_slides_are_counted_by_class_and_head_and_all_are_named(
    store: Store, tmp_path: Path
) -> None:
    labels = planted(store, tmp_path / "labels.csv", 40)
    rows = read_labels(labels).rows
    for row in rows:
        put(store, row.slide, values(9), spec=tile_spec(32, 0.5))
    given = {"mean": "tiles={size_px: 64, mpp: 0.5}", "max": "tiles={size_px: 32, mpp: 0.5}"}
    lost: dict[str, list[str]] = {}
    for kind, tiles in given.items():
        known = of_head(kind, labels, tiles, "data.test=0.5")
        (one,) = train(known, out=tmp_path / "runs", store=store)
        held = {c: [s for s in one.facts["split"]["test"] if label(s) == c] for c in (0, 1)}
        lost[kind] = held[0][:4] + held[1][:1] if kind == "mean" else held[1][:2]
        for slide in lost[kind]:
            stem, spec = one.facts["store"][slide], one.facts["tiles_digest"]
            (entry,) = store.root.rglob(f"{spec}/{stem}.h5")
            entry.unlink()
    found = evaluate(labels, tmp_path / "runs", store)
    flow = {row["head"]: row for row in cohort_flow(found)}
    assert flow["mean"]["of class"] == "normal 4, tumor 1"
    assert flow["max"]["of class"] == "tumor 2"
    for kind, counts in flow.items():
        assert counts["test slides without features"] == len(lost[kind])
        assert counts["tested bags"] == counts["test slides"] - len(lost[kind])
        assert counts["with features"] == 40 - len(lost[kind])
    missing = mil_report(found, numbers_of(found)).provenance["missing"]
    assert {kind: sorted(named) for kind, named in missing.items()} == {
        kind: sorted(slides) for kind, slides in lost.items()
    }
    page = page_of(found, tmp_path / "out")
    assert all(slide in page for slides in lost.values() for slide in slides)


def label(slide: str) -> int:
    return int(slide[1:].partition("-")[0]) % 2


# --- what is drawn anew ------------------------------------------------------------------


def test_where_splits_keep_sites_whole_sites_are_what_is_drawn_anew(
    store: Store, tmp_path: Path
) -> None:
    labels = planted(store, tmp_path / "labels.csv", 40)
    names = [row.slide for row in read_labels(labels).rows]
    site = {name: "ABCDE"[i // 8] for i, name in enumerate(names)}
    test = [*names[16:32], *names[32::2]]  # the last site has no tumour there
    rows = [f"{n.partition('-')[0]},{n},{('no', 'yes')[label(n)]},{site[n]}\n" for n in names]
    labels.write_text("case_id,slide_id,label,site\n" + "".join(rows))
    drawn = split(tmp_path / "split.csv", names[:8], names[8:16], test)
    for by, sizes in (("site", (3, 2, 3)), ("patient", (20, 8, 12))):
        known = recipe(labels, f"data.splits={drawn}", f"data.by={by}", "train.epochs=1")
        train(known, out=tmp_path / by, store=store)
        found = evaluate(labels, tmp_path / by, store)
        numbers = numbers_of(found)
        report = mil_report(found, numbers)
        assert report.provenance["drawn_anew"] == {"abmil": by}
        assert numbers.heads["abmil"]["auroc"].interval.n == sizes[0]
        metrics = report.metrics
        shown = [metrics[f"abmil.{m}"]["n"] for m in ("auroc", "sensitivity", "specificity")]
        assert shown == list(sizes)
        assert report.rows[0][f"{by}s in all"] == sizes[0]
        ece = metrics["abmil.ece"]
        assert ece["value"] is not None
        assert (ece["low"], ece["high"]) == (None, None)
        assert metrics["abmil.brier"]["low"] is not None
        assert f"{by}s drawn anew" in page_of(found, tmp_path / "out")


def test_sensitivity_counts_patients_with_the_finding_and_each_but_once(
    store: Store, tmp_path: Path
) -> None:
    labels = planted(store, tmp_path / "labels.csv", 18, slides=2)
    names = [row.slide for row in read_labels(labels).rows]
    drawn = split(tmp_path / "split.csv", names[:16], names[16:24], names[24:])
    train(recipe(labels, f"data.splits={drawn}"), out=tmp_path / "runs", store=store)
    found = evaluate(labels, tmp_path / "runs", store)
    metrics = mil_report(found, numbers_of(found)).metrics
    assert metrics["abmil.sensitivity"]["n"] == metrics["abmil.specificity"]["n"] == 3
    assert metrics["abmil.auroc"]["n"] == 6
    assert len(found.heads[0].tested[0].names) == 12


def test_a_class_of_few_test_patients_is_warned_of(store: Store, tmp_path: Path) -> None:
    labels = planted(store, tmp_path / "labels.csv", 34, slides=2)
    names = [row.slide for row in read_labels(labels).rows]
    few = ("only 4 test patients of class normal", "only 3 test patients of class tumor")
    for name, test, told in (("enough", names[:20], ()), ("few", names[:14], few)):
        drawn = split(tmp_path / f"{name}.csv", names[20:44], names[44:], test)
        train(of_head("mean", labels, f"data.splits={drawn}"), out=tmp_path / name, store=store)
        warned = [w for w in evaluate(labels, tmp_path / name, store).warnings if "only" in w]
        assert warned == [f"{text}: the numbers say little" for text in told]


# --- what is gone ------------------------------------------------------------------------


def test_a_slide_whose_file_was_replaced_is_not_shown_among_the_errors(
    store: Store, tmp_path: Path, fake: type
) -> None:
    labels = planted(store, tmp_path / "labels.csv", 16)
    real = paint(tmp_path / "real.tif")
    Embedder(fake(), store)(real, spec=tile_spec(64, 0.5))
    rows = [(r["case_id"], r["slide_id"], r["label"]) for r in lines(labels)]
    table(labels, [*rows, ("real", "real", "normal")])
    names = [slide for _, slide, _ in rows]
    drawn = split(tmp_path / "split.csv", names[:8], names[8:14], ["real", names[15]])
    train(of_head("mean", labels, f"data.splits={drawn}"), out=tmp_path / "runs", store=store)
    found = evaluate(labels, tmp_path / "runs", store)
    (scores,) = found.heads
    (tested,) = scores.tested
    wrong = np.eye(2)[1 - tested.labels]
    found = replace(found, heads=(replace(scores, tested=(replace(tested, chances=wrong),)),))

    def shown() -> tuple[dict[str, str], int]:
        (section,) = worst_errors(found)
        return {str(row["bag"]): str(row["tiles"]) for row in section.rows}, len(section.pictures)

    told, pictures = shown()
    assert (told["real"], pictures) == ("below", 1)
    assert told[names[15]].startswith("not shown: the slide's card or tiles are not in the store")
    paint(real, seed=9)
    told, pictures = shown()
    assert told["real"] == f"not shown: {real} is another slide now"
    assert pictures == 0
    real.unlink()
    told, pictures = shown()
    assert told["real"].startswith("not shown: ")
    assert pictures == 0


# --- bags and annotations ----------------------------------------------------------------


def test_no_more_bags_are_mapped_at_once_than_may_be(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert bags_module._OPEN <= 256  # two lists of them stay below the usual limit of 1,024 files
    monkeypatch.setattr(bags_module, "_OPEN", 3)
    labels = planted(store, tmp_path / "labels.csv", 8)
    table_ = read_labels(labels)
    cohort = look_up(table_, store, "fake-000000000000", tile_spec(64, 0.5))
    opened: list[weakref.ref[Any]] = []
    real = FeatureEntries.mapped

    def mapped(self: FeatureEntries, key: Key) -> Features:
        entry = real(self, key)
        assert isinstance(entry.values, np.memmap)
        opened.append(weakref.ref(entry.values))
        return entry

    monkeypatch.setattr(FeatureEntries, "mapped", mapped)
    bags = Bags(cohort, [row.slide for row in table_.rows])
    for again in (1, 2):
        for i in range(len(bags)):
            assert len(bags[i].features) == 30
            assert bags[i].name == bags.names[i]  # the last few are kept, not mapped again
            assert sum(ref() is not None for ref in opened) <= 3
        assert len(opened) == again * 8
    assert sum(ref() is not None for ref in opened) == 3


@pytest.mark.parametrize("suffix", [".json", ".geojson"])
def test_geojson_counts_from_the_scans_bounds_whatever_its_suffix(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    real = plain.ImageReader.__init__

    def init(self: plain.ImageReader, path: Path | str) -> None:
        real(self, path)
        self.info = replace(self.info, bounds=(256, 192, 640, 512))

    monkeypatch.setattr(plain.ImageReader, "__init__", init)
    slide = tmp_path / "bounded.png"
    Image.fromarray(synthetic.picture(1024, 768, (256, 192, 640, 512))).save(slide)
    ring = [[64, 64], [256, 64], [256, 192], [64, 192], [64, 64]]
    feature = {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [ring]}}
    (tmp_path / f"bounded{suffix}").write_text(json.dumps(feature))
    labels = planted(store, tmp_path / "labels.csv", 12)
    (one,) = train(of_head("max", labels), out=tmp_path / "runs", store=store)
    drawn: list[Any] = []

    def draw(*given: Any, lesions: list[Any]) -> Any:
        drawn.extend(lesions)
        return draw_heatmap(*given, lesions=lesions)

    monkeypatch.setattr("pathcli.mil.predict.draw_heatmap", draw)
    ready = Predictor(one, store, out=tmp_path / "out", lesions=tmp_path)
    assert ready(slide, mpp=0.5).candidates is not None
    assert [polygon.bounds for polygon in drawn] == [(320, 256, 512, 384)]


# --- comparisons -------------------------------------------------------------------------


def head(labels: np.ndarray, *seeds: np.ndarray) -> Scores:
    """Return made-up scores: logits [n] of each seed, one slide a patient."""
    names = tuple(f"s{i}" for i in range(len(labels)))
    tested = []
    for seed, logit in enumerate(seeds, 1):
        chance = 1 / (1 + np.exp(-logit))
        rows = (names, names, (None,) * len(labels), labels, np.stack([1 - chance, chance], 1))
        run: Any = SimpleNamespace(seed=seed)
        tested.append(mil_scores.Tested(run, *rows, threshold=0.5, listed=len(labels), lost={}))
    return Scores("head", tuple(tested), cohort=None)  # type: ignore[arg-type]


def test_a_delong_row_is_of_the_averaged_score_where_one_seed_is_inverted(
    rng: np.random.Generator,
) -> None:
    labels = np.arange(60) % 2
    clear = rng.normal(size=60) + 4 * labels - 2
    weak = rng.normal(size=60) + 0.9 * labels
    a, b = head(labels, clear, -clear / 20), head(labels, weak, weak)
    (row,) = compare([a, b], 200)
    means = [np.mean([t.chances[:, 1] for t in s.tested], axis=0) for s in (a, b)]
    averaged = roc_auc_score(labels, means[0]) - roc_auc_score(labels, means[1])
    of_seeds = [np.mean([macro_auroc(t.labels, t.chances) for t in s.tested]) for s in (a, b)]
    assert of_seeds[0] - of_seeds[1] < -0.1 < 0.1 < averaged
    assert row["auroc_difference"] == pytest.approx(averaged)
    assert 0 < row["low"] < averaged < row["high"] <= 1
    assert row["p"] < 0.05


def test_a_delong_interval_holds_zero_just_when_p_says_so() -> None:
    significant = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        labels, shared = np.arange(30) % 2, rng.normal(size=30) / 2
        a, b = (head(labels, shared + rng.normal(size=30) + k * labels) for k in (2.0, 0.8))
        (row,) = compare([a, b], 20)
        assert row["test"].startswith("DeLong")
        assert (row["low"] <= 0 <= row["high"]) == (row["p"] >= 0.05), seed
        significant += row["p"] < 0.05
    assert 10 < significant < 50


def test_two_perfect_heads_differ_by_nothing_with_a_bound() -> None:
    labels = np.arange(20) % 2
    (row,) = compare([head(labels, labels * 1.0), head(labels, labels * 2.0)], 20)
    assert (row["auroc_difference"], row["p"]) == (0, 1)
    assert row["low"] < 0 < row["high"]


def test_seeds_are_folds_and_each_once(store: Store, tmp_path: Path) -> None:
    labels = planted(store, tmp_path / "labels.csv")
    folds = ("data.split=k-fold", "data.folds=3")
    with pytest.raises(UsageError, match=r"set train.seed=\[1, 2, 3\]"):
        train(of_head("mean", labels, *folds, "train.seed=[1,4]"), out=tmp_path, store=store)
    (run,) = train(of_head("mean", labels, *folds, "train.seed=[3]"), out=tmp_path, store=store)
    assert "k-fold: 2 of 3 folds are not run" in run.facts["warnings"]

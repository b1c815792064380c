"""An evaluation in; `report.json`, `report.html` and `predictions.csv` out."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pathcli.charts import Line, chart
from pathcli.evals.mil_errors import worst_errors
from pathcli.evals.mil_pages import (
    flow_section,
    heads_compared,
    lead,
    repeat_sections,
    report_of,
    sizes_of,
)
from pathcli.evals.mil_scores import compare, confusions, mean_curve, measure_all
from pathcli.evals.patch_report import interval_text
from pathcli.metrics.calibration import reliability
from pathcli.report import Section, html_page, json_text
from pathcli.store.files import write_bytes
from pathcli.types import NOTICE

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from pathcli.evals.mil import Evaluation
    from pathcli.evals.mil_scores import Measured, Scores
    from pathcli.mil.benchmarks import Benchmark
    from pathcli.types import Report

_TWO = 2


@dataclass(frozen=True)
class Measurements:
    """All numbers of an evaluation: metrics by head, and the comparisons of heads."""

    heads: Mapping[str, Mapping[str, Measured]]
    pairs: Sequence[Mapping[str, Any]]


def measure_evaluation(found: Evaluation) -> Measurements:
    """Return every metric of every head with its interval, and compare the heads."""
    return Measurements({s.name: measure_all(s) for s in found.heads}, compare(found.heads))


def mil_report(found: Evaluation, numbers: Measurements) -> Report:
    """Return metrics by `<head>.<metric>`, a row a head, and where all came from."""
    more = {
        "classes": list(found.classes),
        "positive_class": found.classes[1] if len(found.classes) == _TWO else None,
        "specificity_asked": found.specificity,
        "confusion": {s.name: confusions(s).round(2).tolist() for s in found.heads},
    }
    what = "slide classification"
    return report_of(found, numbers, what, sizes=_sizes, count=_count, more=more)


def _sizes(scores: Scores) -> dict[str, Any]:
    """Return what stands behind a head's row; of two classes the positive bags, too."""
    sizes = sizes_of(scores)
    if scores.classes == _TWO:
        sizes["positive bags, all seeds"] = int(scores.labels.sum())
    return sizes


_OF_CLASS = {"sensitivity": 1, "specificity": 0}


def _count(scores: Scores, name: str, n: int) -> int:
    """Return the units behind a metric: of one class, where it is of one."""
    if name not in _OF_CLASS:
        return n
    units = zip(scores.units, scores.labels, strict=True)
    return len({unit for unit, label in units if label == _OF_CLASS[name]})


def write_evaluation(
    folder: Path, found: Evaluation, numbers: Measurements, report: Report, command: str
) -> Path:
    """Write the three files; return the page's path.

    Raises:
        ResourceError: the disk is full, or the folder may not be written.
    """
    page = html_page(report.title, lead(found), _sections(found, numbers, report, command))
    write_bytes(folder / "predictions.csv", _predictions(found).encode(), lambda _: None, "--out")
    write_bytes(folder / "report.json", json_text(report).encode(), lambda _: None, "--out")
    write_bytes(folder / "report.html", page.encode(), lambda _: None, "--out")
    return folder / "report.html"


def _predictions(found: Evaluation) -> str:
    text = io.StringIO()
    writer = csv.writer(text)
    classes = found.classes
    header = ["head", "seed", "name", "patient", "label", *(f"p_{c}" for c in classes), "note"]
    writer.writerow(header)
    for scores in found.heads:
        for t in scores.tested:
            for i, name in enumerate(t.names):
                chances = [f"{p:.6f}" for p in t.chances[i]]
                label = classes[int(t.labels[i])]
                row = [scores.name, t.run.seed, name, t.patients[i], label, *chances, NOTICE]
                writer.writerow(row)
    return text.getvalue()


def _sections(
    found: Evaluation, numbers: Measurements, report: Report, command: str
) -> list[Section]:
    warnings = [Section("Mind this", rows=[{"warning": w} for w in found.warnings])]
    return [
        *(warnings if found.warnings else []),
        flow_section(found),
        _table(found, numbers),
        *heads_compared(found, numbers, "auroc_difference"),
        *([_published(found.benchmark)] if found.benchmark else []),
        _curves(found),
        _confusion(found),
        *worst_errors(found),
        *repeat_sections(report, command),
    ]


def metric_rows(found: Evaluation, numbers: Measurements) -> list[dict[str, Any]]:
    """Return a row a metric and a column a head: counts, then values with intervals."""
    counts: dict[str, dict[str, Any]] = {}
    for scores in found.heads:
        for what, size in _sizes(scores).items():
            counts.setdefault(what, {"metric": what})[scores.name] = size
    rows = list(counts.values())
    for name in next(iter(numbers.heads.values())):
        asked = f" (threshold: {found.specificity:g} specificity on validation)"
        rows.append({"metric": name + asked * (name in _OF_CLASS)})
        for head, of_head in numbers.heads.items():
            rows[-1][head] = interval_text(of_head[name].interval, of_head[name].spread)
    return rows


def _table(found: Evaluation, numbers: Measurements) -> Section:
    return Section("How good", " ".join(_how_made(found)), rows=metric_rows(found, numbers))


def _how_made(found: Evaluation) -> list[str]:
    """Return the sentences that say what the table's numbers are."""
    units = " and ".join(sorted({f"{s.unit}s" for s in found.heads}))
    first = (
        f"Mean over seeds; in brackets the 95 % interval (BCa bootstrap, {units} drawn anew; an "
        "exact bound where every draw agrees). It holds the trained models and the splits fixed."
    )
    text = [first]
    if any(len(s.tested) > 1 for s in found.heads):
        same = all(s.shared_test for s in found.heads)
        why = "all share one test set" if same else "and their test sets differ"
        text.append(f"sd is over seeds: training noise, {why}.")
    if len(found.classes) == _TWO:
        counts = [
            t.run.facts["validation"]["labels"].count(0) for s in found.heads for t in s.tested
        ]
        few = f"{min(counts)}" if min(counts) == max(counts) else f"{min(counts)}-{max(counts)}"
        text.append(
            f"Sensitivity is for class {found.classes[1]}, specificity for {found.classes[0]}, at "
            f"a threshold fixed on validation for a specificity of {found.specificity:g} (from "
            f"{few} validation bags of {found.classes[0]})."
        )
    return [*text, "ECE (10 bins) is biased upwards with few slides, so it has no interval."]


def _published(known: Benchmark) -> Section:
    rows = [
        {"head": p.head, "encoder": p.encoder, "metric": p.metric, "value": p.value}
        | {"sd": "" if p.sd is None else p.sd, "source": p.source}
        for p in known.published
    ]
    text = "Other encoders, other code, the splits their authors drew: a scale, not a contest. "
    return Section("Published numbers", text + "; ".join(known.metrics), rows=rows)


def _curves(found: Evaluation) -> Section:
    roc = [Line(s.name, **mean_curve(s)) for s in found.heads]
    calibration = []
    for scores in found.heads:
        bins = [b for b in reliability(scores.labels, scores.chances) if b.n]
        line = Line(scores.name, [b.confidence for b in bins], [b.accuracy for b in bins])
        calibration.append(line)
    return Section(
        "Curves",
        "ROC: mean over seeds, band 95 % of curves drawn anew likewise. Calibration, all seeds: "
        "how often the predicted class was right, by how probable it was said to be.",
        charts=[
            chart(roc, x="1 - specificity", y="sensitivity", unit=True, diagonal=True),
            chart(calibration, x="said probability", y="share right", unit=True, diagonal=True),
        ],
    )


def _confusion(found: Evaluation) -> Section:
    rows = []
    for scores in found.heads:
        for name, counts in zip(found.classes, confusions(scores), strict=True):
            said = {
                f"said {c}": f"{k:g}" for c, k in zip(found.classes, counts.round(1), strict=True)
            }
            rows.append({"head": scores.name, "truth": name} | said)
    return Section(
        "Confusion", "Bags, mean of the seeds; the most probable class is said.", rows=rows
    )

"""An evaluation in; `report.json`, `report.html` and `predictions.csv` out."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pathcli.charts import Line, chart
from pathcli.evals.mil_errors import worst_errors
from pathcli.evals.mil_scores import compare, confusions, mean_curve, measure_all
from pathcli.evals.patch_report import interval_text
from pathcli.metrics.calibration import reliability
from pathcli.report import Section, html_page, json_text, metric, pairs, versions
from pathcli.runs import git_commit
from pathcli.store.files import write_bytes
from pathcli.types import NOTICE, Report, digest
from pathcli.weights import sha256

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pathcli.evals.mil import Evaluation
    from pathcli.evals.mil_scores import Measured, Scores, Tested
    from pathcli.mil.benchmarks import Benchmark

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
    metrics = {
        f"{s.name}.{name}": _metric(s, name, measured)
        for s in found.heads
        for name, measured in numbers.heads[s.name].items()
    }
    rows = [
        {"head": s.name, **_sizes(s)}
        | {name: _rounded(m.interval.value) for name, m in numbers.heads[s.name].items()}
        | {f"{name}_sd": _rounded(m.spread) for name, m in numbers.heads[s.name].items()}
        for s in found.heads
    ]
    labels = found.heads[0].cohort.table
    return Report(
        title=f"{Path(found.name).name}: slide classification",
        metrics=metrics,
        rows=tuple(rows),
        provenance={
            "labels": {"source": labels.source, "digest": labels.digest},
            "classes": list(found.classes),
            "positive_class": found.classes[1] if len(found.classes) == _TWO else None,
            "kind": {s.name: s.kind for s in found.heads},
            "drawn_anew": {s.name: s.unit for s in found.heads},
            "test_slides_of_patients_learnt_from": {s.name: s.shared for s in found.heads},
            "test_slides_read_times": found.times,
            "specificity_asked": found.specificity,
            "flow": cohort_flow(found),
            "missing": {s.name: dict(s.cohort.missing) for s in found.heads},
            "comparisons": [
                {k: _rounded(v) if isinstance(v, float) else v for k, v in row.items()}
                for row in numbers.pairs
            ],
            "confusion": {s.name: confusions(s).round(2).tolist() for s in found.heads},
            "runs": {s.name: [_source(t) for t in s.tested] for s in found.heads},
            "warnings": list(found.warnings),
            "git": git_commit(),
            "versions": versions(),
        },
    )


def _sizes(scores: Scores) -> dict[str, Any]:
    """Return how many seeds, bags a seed, and independent units stand behind a head's row."""
    bags = sorted({len(t.names) for t in scores.tested})
    sizes = {
        "seeds": len(scores.tested),
        "bags a seed": bags[0] if len(bags) == 1 else f"{bags[0]}-{bags[-1]}",
        f"{scores.unit}s in all": len(set(scores.units)),
    }
    if scores.classes == _TWO:
        sizes["positive bags, all seeds"] = int(scores.labels.sum())
    return sizes


def _source(tested: Tested) -> dict[str, Any]:
    """Return what one tested run is, to find or repeat it."""
    run = tested.run
    return {
        "folder": str(run.folder.absolute()),
        "seed": run.seed,
        "lr": run.recipe.values["train"]["lr"],
        "epoch": run.provenance["chosen_epoch"],
        "threshold": tested.threshold if np.isfinite(tested.threshold or 0.0) else None,
        "weights_sha256": sha256(run.folder / "weights.safetensors"),
        "encoder": run.facts["encoder"],
        "tiles": run.facts["tiles_digest"],
        "features": run.facts["features_digest"],
        "test": digest(sorted(tested.names)),
    }


_OF_CLASS = {"sensitivity": 1, "specificity": 0}


def _metric(scores: Scores, name: str, measured: Measured) -> dict[str, float | None]:
    found, n = measured.interval, measured.interval.n
    if name in _OF_CLASS:
        units = zip(scores.units, scores.labels, strict=True)
        n = len({unit for unit, label in units if label == _OF_CLASS[name]})
    return metric(_rounded(found.value), _rounded(found.low), _rounded(found.high), n)


def _rounded(value: float) -> float | None:
    return round(float(value), 4) if np.isfinite(value) else None


def cohort_flow(found: Evaluation) -> list[dict[str, Any]]:
    """Return for each head and seed how many test slides were listed, used and lost, by class."""
    rows: list[dict[str, Any]] = []
    for scores in found.heads:
        table, missing = scores.cohort.table, scores.cohort.missing
        for t in scores.tested:
            row = {
                "head": scores.name,
                "seeds": str(t.run.seed),
                "slides in the table": len(table.rows),
                "with features": len(table.rows) - len(missing),
                "test slides": t.listed,
                "tested bags": len(t.names),
                "test slides without features": sum(t.lost.values()),
                "of class": ", ".join(f"{c} {n}" for c, n in sorted(t.lost.items())) or "-",
            }
            if rows and {**rows[-1], "seeds": ""} == {**row, "seeds": ""}:
                rows[-1]["seeds"] += f", {t.run.seed}"
            else:
                rows.append(row)
    return rows


def write_evaluation(
    folder: Path, found: Evaluation, numbers: Measurements, report: Report, command: str
) -> Path:
    """Write the three files; return the page's path.

    Raises:
        ResourceError: the disk is full, or the folder may not be written.
    """
    page = html_page(report.title, _lead(found), _sections(found, numbers, report, command))
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


_KINDS = {
    "own": "Test slides of the split that the runs were trained on: no run was trained or chosen "
    "on one of them.",
    "part": "Slides of the runs' own test split, under another table: not an external validation.",
    "external": "External validation: no patient, name or file of these slides was learnt from.",
}


def _lead(found: Evaluation) -> str:
    shared = max(s.shared for s in found.heads)
    kinds = {s.kind: [h.name for h in found.heads if h.kind == s.kind] for s in found.heads}
    kind = " ".join(
        (f"{', '.join(heads)}: " if len(kinds) > 1 else "") + _KINDS[name]
        for name, heads in kinds.items()
    )
    if shared:
        kind = f"{shared} of the test slides are of patients or files that were learnt from."
    if found.times is None:
        return f"{kind} How often these slides were read before could not be counted."
    if found.times == 1:
        return f"{kind} By this store's count none of them was read as a test before."
    return f"{kind} By this store's count some of them are read as a test for time {found.times}."


def _sections(
    found: Evaluation, numbers: Measurements, report: Report, command: str
) -> list[Section]:
    warnings = [Section("Mind this", rows=[{"warning": w} for w in found.warnings])]
    return [
        *(warnings if found.warnings else []),
        _flow(found),
        _table(found, numbers),
        *_compared(found, numbers),
        *([_published(found.benchmark)] if found.benchmark else []),
        _curves(found),
        _confusion(found),
        *worst_errors(found),
        *_repeat(report, command),
    ]


def _flow(found: Evaluation) -> Section:
    rows = cohort_flow(found)
    reasons: dict[str, list[str]] = {}
    for scores in found.heads:
        for slide, why in scores.cohort.missing.items():
            reasons.setdefault(why, []).append(slide)
    why = "; ".join(f"{reason}: {', '.join(sorted(set(s)))}" for reason, s in reasons.items())
    return Section("Slides: in, out, used", f"Without features: {why}." if why else "", rows=rows)


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


def _compared(found: Evaluation, numbers: Measurements) -> list[Section]:
    if len(found.heads) == 1:
        return []
    rows = [
        {
            "heads": row["heads"],
            "AUROC difference": f"{row['auroc_difference']:+.3f} "
            f"[{row['low']:+.3f}, {row['high']:+.3f}]",
            "test": row["test"],
            "p": f"{row['p']:.3g}",
            "p, corrected (Holm)": f"{row['p_holm']:.3g}",
        }
        for row in numbers.pairs
    ]
    n = len(found.heads)
    left = n * (n - 1) // 2 - len(rows)
    text = f"{left} pairs were tested on different slides and are not compared." if left else ""
    return [Section("Heads against each other", text, rows=rows)]


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


def _repeat(report: Report, command: str) -> list[Section]:
    known: dict[str, Any] = dict(report.provenance)
    runs = [
        {"head": head, "run": run["folder"], "weights": run["weights_sha256"][:12]}
        | {name: run[name] for name in ("lr", "epoch", "threshold", "test")}
        for head, runs in known["runs"].items()
        for run in runs
    ]
    facts = {"labels": known["labels"]["digest"], "git": known["git"], **known["versions"]}
    features = {f"features of {head}": runs[0]["encoder"] for head, runs in known["runs"].items()}
    return [
        Section("To repeat it", code=command, rows=pairs(facts | features)),
        Section("The runs", "All digests are in report.json.", rows=runs),
    ]

"""An evaluation of outcomes in; metrics beside blind ones, and the three files, out."""

from __future__ import annotations

import csv
import io
from typing import TYPE_CHECKING, Any

import numpy as np

from pathcli.evals.mil_outcome import runs_of
from pathcli.evals.mil_outcome_scores import parted, risk_groups
from pathcli.evals.mil_pages import (
    flow_section,
    heads_compared,
    lead,
    repeat_sections,
    report_of,
    rounded,
    sizes_of,
)
from pathcli.evals.patch_report import interval_text
from pathcli.metrics.survival import kaplan_meier, logrank
from pathcli.mil.outcome_charts import Survived, scatter_chart, survival_chart
from pathcli.mil.outcome_task import run_outcome
from pathcli.report import Section, html_page, json_text
from pathcli.store.files import write_bytes
from pathcli.types import NOTICE

if TYPE_CHECKING:
    from pathlib import Path

    from pathcli.evals.mil_outcome import OutcomeEvaluation
    from pathcli.evals.mil_outcome_scores import OutcomeMeasurements
    from pathcli.evals.mil_scores import Scores
    from pathcli.types import Report


def outcome_report(found: OutcomeEvaluation, numbers: OutcomeMeasurements) -> Report:
    """Return metrics by `<head>.<metric>`, a row a head, and where all came from."""
    more = {
        "columns": found.what,
        "unit": found.unit,
        "blind": {
            head: {name: rounded(x) for name, x in blind.items()}
            for head, blind in numbers.blind.items()
        },
        "risk_groups": {s.name: risk_groups(s) for s in found.heads if found.survival},
    }
    return report_of(found, numbers, found.what, sizes=_sizes, more=more)


def _sizes(scores: Scores) -> dict[str, Any]:
    """Return what stands behind a head's row; of survival the events, too."""
    sizes, tested = sizes_of(scores), runs_of(scores)
    if run_outcome(tested[0].run)[0].survival:
        sizes["events, all seeds"] = int(sum(t.targets[:, 1].sum() for t in tested))
    return sizes


def outcome_rows(found: OutcomeEvaluation, numbers: OutcomeMeasurements) -> list[dict[str, Any]]:
    """Return a row a metric and a column a head, each beside what is blind to the slides."""
    counts: dict[str, dict[str, Any]] = {}
    for scores in found.heads:
        for what, size in _sizes(scores).items():
            row = counts.setdefault(what, {"metric": what})
            row |= {scores.name: size, f"{scores.name}, blind": ""}
    rows = list(counts.values())
    for name in next(iter(numbers.heads.values())):
        unit = f" ({found.unit})" * bool(found.unit and name in {"mae", "rmse"})
        rows.append({"metric": name + unit})
        for head, of_head in numbers.heads.items():
            rows[-1][head] = interval_text(of_head[name].interval, of_head[name].spread)
            blind = numbers.blind[head][name]
            rows[-1][f"{head}, blind"] = f"{blind:.3f}" if np.isfinite(blind) else "-"
    return rows


def write_outcomes(
    folder: Path,
    found: OutcomeEvaluation,
    numbers: OutcomeMeasurements,
    report: Report,
    command: str,
) -> Path:
    """Write the three files; return the page's path.

    Raises:
        ResourceError: the disk is full, or the folder may not be written.
    """
    page = html_page(report.title, lead(found), _sections(found, numbers, report, command))
    for name, text in (
        ("predictions.csv", _predictions(found)),
        ("report.json", json_text(report)),
        ("report.html", page),
    ):
        write_bytes(folder / name, text.encode(), lambda _: None, "--out")
    return folder / "report.html"


def _predictions(found: OutcomeEvaluation) -> str:
    text = io.StringIO()
    writer = csv.writer(text)
    said = ["risk", "group", "median"] if found.survival else ["predicted"]
    writer.writerow(["head", "seed", "name", "patient", *found.columns, *said, "unit", "note"])
    for scores in found.heads:
        for t in runs_of(scores):
            known: Any
            known, fit = run_outcome(t.run)
            medians = known.median(t.chances, fit) if found.survival else []
            for i, name in enumerate(t.names):
                row = [scores.name, t.run.seed, name, t.patients[i]]
                row += [f"{x:.12g}" for x in t.targets[i]] + [f"{t.predicted[i]:.6f}"]
                if found.survival:
                    median = medians[i]
                    row += ["high" if t.predicted[i] > fit["cut"] else "low"]
                    row += ["" if median is None else f"{median:.6g}"]
                writer.writerow([*row, found.unit, NOTICE])
    return text.getvalue()


def _sections(
    found: OutcomeEvaluation, numbers: OutcomeMeasurements, report: Report, command: str
) -> list[Section]:
    warnings = [Section("Mind this", rows=[{"warning": w} for w in found.warnings])]
    return [
        *(warnings if found.warnings else []),
        flow_section(found),
        Section("How good", " ".join(_how_made(found)), rows=outcome_rows(found, numbers)),
        *heads_compared(found, numbers, "difference"),
        *([_curves(found)] if found.survival else [_scatter(found)]),
        *repeat_sections(report, command),
    ]


def _how_made(found: OutcomeEvaluation) -> list[str]:
    """Return the sentences that say what the table's numbers are."""
    units = " and ".join(sorted({f"{s.unit}s" for s in found.heads}))
    first = (
        f"Mean over seeds; in brackets the 95 % interval (BCa bootstrap, {units} drawn anew). It "
        "holds the trained models and the splits fixed."
    )
    text = [first]
    if any(len(s.tested) > 1 for s in found.heads):
        text.append("sd is over seeds: training noise, and other test patients where they differ.")
    if not found.survival:
        return [*text, "Blind: the train part's mean is said of every bag."]
    about = (
        "c_index is Harrell's: the share of comparable pairs whose higher risk had the event "
        "first; 0.5 is blind. integrated_brier is the squared distance of the survival curves from "
        "what happened, weighted for censoring, up to the time by which 80 % of the train part's "
        "events had come, or until which test patients are followed; lower is better, and blind is "
        "the train part's Kaplan-Meier curve."
    )
    return [*text, about]


def _scatter(found: OutcomeEvaluation) -> Section:
    points = {}
    for scores in found.heads:
        tested = runs_of(scores)
        truth = np.concatenate([t.targets[:, 0] for t in tested])
        points[scores.name] = truth, np.concatenate([t.predicted for t in tested])
    what = found.what + f" ({found.unit})" * bool(found.unit)
    return Section(
        "Predicted and true",
        "Test bags of all seeds; on the dashed line a prediction is right.",
        charts=[scatter_chart(points, what)],
    )


def _curves(found: OutcomeEvaluation) -> Section:
    charts = []
    for scores in found.heads:
        t = runs_of(scores)[0]
        high, times, events = parted(t)
        curves = []
        for name, part in (("high", high), ("low", ~high)):
            if part.any():
                km = kaplan_meier(times[part], events[part])
                steps = (x.tolist() for x in (km.times, km.survival))
                band = {"low": np.nan_to_num(km.low).tolist()}
                band |= {"high": np.nan_to_num(km.high, nan=0).tolist()}
                curves.append(Survived(f"{name} risk, n {part.sum()}", *steps, **band))
        p = logrank(times, events, high)
        told = f"logrank p {p:.3g}" if np.isfinite(p) else "no logrank test"
        title = f"{scores.name}, seed {t.run.seed}: {told}"
        charts.append(survival_chart(curves, found.unit, title))
    return Section(
        "Two groups of risk",
        "Kaplan-Meier curves of the first seed's test patients with 95 % bands, parted at the "
        "train part's median risk. The p value is of that one cut and that one seed; all seeds "
        "are in the table, uncorrected.",
        rows=[row for scores in found.heads for row in risk_groups(scores)],
        charts=charts,
    )

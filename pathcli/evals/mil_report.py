"""An evaluation in; `report.json`, `report.html` and `predictions.csv` out."""

from __future__ import annotations

import csv
import io
from collections import Counter
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pathcli.charts import Line, chart
from pathcli.evals.mil_scores import compare, confusions, mean_curve, measure_all
from pathcli.metrics.calibration import reliability
from pathcli.mil.bags import Bags
from pathcli.mil.heatmap import extreme_tiles, strip
from pathcli.mil.task import load_head, predict_bags
from pathcli.report import Picture, Section, html_page, json_text, metric, pairs, versions
from pathcli.slides.readers import open_slide
from pathcli.store.files import write_bytes
from pathcli.types import NOTICE, PathcliError, Report

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pathcli.evals.mil import Evaluation
    from pathcli.evals.mil_scores import Measured, Tested

WORST = 5
TILES = 8
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
        f"{head}.{name}": _metric(measured)
        for head, of_head in numbers.heads.items()
        for name, measured in of_head.items()
    }
    rows = [
        {"head": s.name, "seeds": len(s.tested), "bags": len(s.tested[0].names)}
        | {name: _rounded(m.interval.value) for name, m in numbers.heads[s.name].items()}
        | {f"{name}_sd": _rounded(m.spread) for name, m in numbers.heads[s.name].items()}
        for s in found.heads
    ]
    return Report(
        title=f"{Path(found.name).name}: slide classification",
        metrics=metrics,
        rows=tuple(rows),
        provenance={
            "labels": {"source": found.table.source, "digest": found.table.digest},
            "classes": list(found.table.classes),
            "external": found.external,
            "test_slides_read_times": found.times,
            "specificity_asked": found.specificity,
            "flow": cohort_flow(found),
            "comparisons": [
                {k: _rounded(v) if isinstance(v, float) else v for k, v in row.items()}
                for row in numbers.pairs
            ],
            "confusion": {s.name: confusions(s).tolist() for s in found.heads},
            "runs": {s.name: [str(t.run.folder) for t in s.tested] for s in found.heads},
            "features": {s.name: s.tested[0].run.facts["encoder"] for s in found.heads},
            "warnings": list(found.warnings),
            "versions": versions(),
        },
    )


def _metric(measured: Measured) -> dict[str, float | None]:
    found = measured.interval
    value, low, high = (_rounded(v) for v in (found.value, found.low, found.high))
    return metric(value, low, high, found.n)


def _rounded(value: float) -> float | None:
    return round(float(value), 4) if np.isfinite(value) else None


def cohort_flow(found: Evaluation) -> dict[str, Any]:
    """Return how many slides came in, which could not be used and why, and what was tested."""
    missing = dict(found.cohorts[0].missing)
    return {
        "slides in the table": len(found.table.rows),
        "patients": len({row.case for row in found.table.rows}),
        "not usable": len(missing),
        "usable": len(found.table.rows) - len(missing),
        "tested, each seed": [len(t.names) for t in found.heads[0].tested],
        "tested patients": len(set(found.heads[0].patients)),
        "missing": missing,
    }


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
    classes = found.table.classes
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


def _lead(found: Evaluation) -> str:
    kind = (
        "External validation: none of the runs was trained on these labels."
        if found.external
        else "Test slides that no run was trained or chosen on."
    )
    seen = f" These test slides have now been read {found.times} times with these runs."
    return kind + (seen if found.times > 1 else " This is the first time they were read.")


def _sections(
    found: Evaluation, numbers: Measurements, report: Report, command: str
) -> list[Section]:
    warnings = [Section("Mind this", rows=[{"warning": w} for w in found.warnings])]
    return [
        *(warnings if found.warnings else []),
        _flow(found),
        _table(found, numbers),
        *_compared(numbers),
        *([_published(found)] if found.benchmark else []),
        _curves(found),
        _confusion(found),
        *_worst(found),
        Section("To repeat it", code=command, rows=pairs(_repeat(report))),
    ]


def _flow(found: Evaluation) -> Section:
    flow = cohort_flow(found)
    missing = flow.pop("missing")
    why = Counter(missing.values())
    rows = pairs(flow)
    for reason, count in why.most_common():
        names = [slide for slide, told in missing.items() if told == reason]
        some = ", ".join(names[:10]) + (f" and {count - 10} more" if count > 10 else "")  # noqa: PLR2004
        rows.append({"what": f"not usable: {reason}", "value": f"{count}: {some}"})
    return Section("Slides: in, out, used", rows=rows)


def _table(found: Evaluation, numbers: Measurements) -> Section:
    rows = []
    for head, of_head in numbers.heads.items():
        row = {"head": head}
        for name, m in of_head.items():
            low, high = m.interval.low, m.interval.high
            spread = f" (sd {m.spread:.3f})" if np.isfinite(m.spread) else ""
            row[name] = f"{m.interval.value:.3f} [{low:.3f}, {high:.3f}]{spread}"
        rows.append(row)
    text = (
        "Mean over seeds, in brackets the 95 % interval (BCa bootstrap, patients drawn anew; an "
        "exact bound where every draw agrees). sd is over seeds: training noise, "
        + ("for all seeds share one test set. " if found.heads[0].shared else "and other splits. ")
        + f"Sensitivity and specificity are at a threshold fixed on validation for a specificity "
        f"of {found.specificity:g}. ECE (10 bins) is biased upwards with few slides."
    )
    return Section("How good", text, rows=rows)


def _compared(numbers: Measurements) -> list[Section]:
    if not numbers.pairs:
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
    return [Section("Heads against each other", rows=rows)]


def _published(found: Evaluation) -> Section:
    assert found.benchmark is not None  # noqa: S101 - the caller asked
    rows = [
        {"head": p.head, "encoder": p.encoder, "metric": p.metric, "value": p.value}
        | {"sd": "" if p.sd is None else p.sd, "source": p.source}
        for p in found.benchmark.published
    ]
    text = "Other encoders, other code, the splits their authors drew: a scale, not a contest. "
    return Section("Published numbers", text + " ".join(found.benchmark.metrics), rows=rows)


def _curves(found: Evaluation) -> Section:
    roc = [Line(s.name, **mean_curve(s)) for s in found.heads]
    calibration = []
    for scores in found.heads:
        bins = [b for b in reliability(scores.labels, scores.chances) if b.n]
        line = Line(scores.name, [b.confidence for b in bins], [b.accuracy for b in bins])
        calibration.append(line)
    return Section(
        "Curves",
        "ROC: mean over seeds, band 95 % of curves with patients drawn anew. Calibration: how "
        "often the predicted class was right, by how probable it was said to be.",
        charts=[
            chart(roc, x="1 - specificity", y="sensitivity", unit=True, diagonal=True),
            chart(calibration, x="said probability", y="share right", unit=True, diagonal=True),
        ],
    )


def _confusion(found: Evaluation) -> Section:
    rows = []
    for scores in found.heads:
        for name, counts in zip(found.table.classes, confusions(scores), strict=True):
            said = {f"said {c}": int(k) for c, k in zip(found.table.classes, counts, strict=True)}
            rows.append({"head": scores.name, "truth": name} | said)
    return Section("Confusion", "Summed over seeds; the most probable class is said.", rows=rows)


def _repeat(report: Report) -> dict[str, Any]:
    known: dict[str, Any] = dict(report.provenance)
    facts = {f"features of {head}": text for head, text in known["features"].items()}
    runs = {f"runs of {head}": ", ".join(folders) for head, folders in known["runs"].items()}
    return {"labels": known["labels"]["digest"], **facts, **runs, **known["versions"]}


# --- the worst errors --------------------------------------------------------------------


def _worst(found: Evaluation) -> list[Section]:
    """Return the most confident errors of each head's first seed, with what it looked at."""
    sections = []
    for scores, cohort in zip(found.heads, found.cohorts, strict=True):
        first = scores.tested[0]
        own = first.chances[np.arange(len(first.labels)), first.labels]
        wrong = [i for i in np.argsort(own) if first.chances[i].argmax() != first.labels[i]]
        if not wrong:
            continue
        bags = Bags(cohort, _slides_of(cohort, first), first.run.facts["bag"])
        shown = [_error(found, first, bags, i) for i in wrong[:WORST]]
        title = f"Worst errors of {scores.name}, seed {first.run.seed} ({len(wrong)} in all)"
        pictures = [picture for _, picture in shown if picture]
        sections.append(Section(title, rows=[row for row, _ in shown], pictures=pictures))
    return sections


def _slides_of(cohort: Any, tested: Tested) -> list[str]:  # noqa: ANN401 - a Cohort
    wanted = set(tested.names)
    return [r.slide for r in cohort.table.rows if r.slide in wanted or r.case in wanted]


def _error(
    found: Evaluation, tested: Tested, bags: Bags, i: int
) -> tuple[dict[str, Any], Picture | None]:
    name, classes = tested.names[i], found.table.classes
    said = int(tested.chances[i].argmax())
    row = {
        "bag": name,
        "truth": classes[int(tested.labels[i])],
        "said": f"{classes[said]} ({tested.chances[i][said]:.2f})",
    }
    try:
        picture = Picture(_attended(tested, bags, name), f"{name}: most attended tiles", strip=True)
    except PathcliError as error:
        return row | {"tiles": f"not shown: {error}"}, None
    return row | {"tiles": "below"}, picture


def _attended(tested: Tested, bags: Bags, name: str) -> Any:  # noqa: ANN401 - a picture
    """Return the most attended tiles of the first slide of a bag, read where it was last seen."""
    import torch  # noqa: PLC0415

    bag = bags[bags.names.index(name)]
    head = load_head(tested.run)
    said = next(predict_bags(head, [bag], torch.device("cpu")))
    store, key = bags.source(bag.slides[0])
    card = store.slides()[key.item]
    entry = store.tiles[replace(key, encoder=None)]
    tiles = replace(entry, status=store.features.mapped(key).status)
    with closing(open_slide(Path(card["last_seen"]))) as slide:
        mine = said.attention[bag.slide_of == 0]
        most, _ = extreme_tiles(slide, tiles, mine, TILES)
        return strip([tile.pixels for tile in most], TILES)

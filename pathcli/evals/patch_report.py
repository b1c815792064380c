"""Scored images and their metrics in; `report.json`, `report.html` and `predictions.csv` out."""

from __future__ import annotations

import csv
import io
import re
from typing import TYPE_CHECKING, Any

import numpy as np

from pathcli.evals.patch_pictures import confusion_chart, feature_maps, worst_errors
from pathcli.report import Section, html_page, json_text, metric, pairs, versions
from pathcli.runs import git_commit
from pathcli.store.files import write_bytes
from pathcli.types import NOTICE, Report, digest

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from pathcli.evals.patch_scores import Scored
    from pathcli.metrics.statistics import Interval

_SHOWN = 8
_GLUE = "\N{NO-BREAK SPACE}"
NAMES = {
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "weighted_f1": "weighted F1",
    "macro_f1": "macro F1",
    "auroc": "macro AUROC",
}
"""What people call the metrics."""


_ASKED = ("dataset", "labels_digest", "encoder", "split", "method", "shots", "draws", "seed")


def folder_name(command: str, scored: Scored) -> str:
    """Return the name of a report's folder: other images, texts or encoder, another folder."""
    known = scored.provenance
    texts = {name: list(of_class) for name, of_class in scored.texts.items()}
    asked = digest([*(known.get(name) for name in _ASKED), texts])[:6]
    words = (command, known["dataset"], known["encoder"].rpartition("-")[0])
    return "-".join([*(re.sub(r"[^\w.]+", "-", word).strip("-.") for word in words), asked])


def patch_report(scored: Scored, numbers: Mapping[str, Interval]) -> Report:
    """Return every metric with its interval, a row a metric, and where all came from."""
    return Report(
        title=scored.title,
        metrics={
            name: metric(_rounded(i.value), _rounded(i.low), _rounded(i.high), i.n)
            for name, i in numbers.items()
        },
        rows=tuple(
            {"metric": name, "value": _rounded(i.value), "low": _rounded(i.low)}
            | {"high": _rounded(i.high), "n": i.n, "level": i.level, "interval": i.method}
            for name, i in numbers.items()
        ),
        provenance={
            **scored.provenance,
            "classes": list(scored.classes),
            "images": len(scored.labels),
            "units": len(set(scored.units)),
            "drawn_anew": _unit(scored),
            "dropped": dict(scored.dropped),
            "texts": {name: list(texts) for name, texts in scored.texts.items()},
            "published": [dict(row) for row in scored.published],
            "confusion": scored.confusion.tolist(),
            "warnings": list(scored.warnings),
            "git": git_commit(),
            "versions": versions(),
        },
    )


def write_patches(
    folder: Path,
    scored: Scored,
    numbers: Mapping[str, Interval],
    command: str,
    extra: Sequence[Section] = (),
) -> Path:
    """Write the three files, `extra` sections after the metrics; return the page's path.

    Raises:
        ResourceError: the disk is full, or the folder may not be written.
    """
    report = patch_report(scored, numbers)
    page = html_page(report.title, scored.lead, _sections(scored, numbers, report, command, extra))
    files = {
        "predictions.csv": _predictions(scored),
        "report.json": json_text(report),
        "report.html": page,
    }
    for name, text in files.items():
        write_bytes(folder / name, text.encode(), lambda _: None, "--out")
    return folder / "report.html"


def metric_rows(scored: Scored, numbers: Mapping[str, Interval]) -> list[dict[str, Any]]:
    """Return a row a metric, with its interval: over all images, and over answered ones."""
    rows = []
    for name, title in NAMES.items():
        row = {"metric": title, f"all {len(scored.labels):,} images": interval_text(numbers[name])}
        if scored.abstained is not None:
            answered = int((~scored.abstained).sum())
            row[f"{answered:,} answered"] = interval_text(numbers[f"answered.{name}"])
        rows.append(row)
    return rows


def class_rows(scored: Scored, numbers: Mapping[str, Interval]) -> list[dict[str, Any]]:
    """Return a row a class: its images, its groups, how many were predicted, and its recall."""
    rows = []
    for k, name in enumerate(scored.classes):
        recall = numbers[f"recall.{name}"]
        row: dict[str, Any] = {"class": name, "images": int((scored.labels == k).sum())}
        row |= {"groups": recall.n} if scored.grouped else {}
        row |= {"predicted": int((scored.predicted == k).sum()), "recall": interval_text(recall)}
        rows.append(row)
    return rows


def interval_text(found: Interval, spread: float = float("nan")) -> str:
    """Return a value with its interval, or why there is none, and the spread where it is known.

    No line breaks inside the brackets, nor between sd and its number.
    """
    if not np.isfinite(found.value):
        return "not defined"
    told = f"{found.value:.3f}"
    if np.isfinite(found.low):
        told += f" [{found.low:.3f},{_GLUE}{found.high:.3f}]"
    elif found.method != "none":
        told += " (no interval)"
    return f"{told}, sd{_GLUE}{spread:.3f}" if np.isfinite(spread) else told


def abstention_text(scored: Scored, numbers: Mapping[str, Interval]) -> str:
    """Return how many images were not named, with the exact interval; "" if all were."""
    if scored.abstained is None:
        return ""
    share = interval_text(numbers["abstained"])
    told = (
        f"{int(scored.abstained.sum()):,} of {len(scored.labels):,} images were not named: {share}"
    )
    if "abstained_groups" not in numbers:
        return f"{told} (exact binomial)."
    groups = numbers["abstained_groups"]
    return (
        f"{told} (exact binomial, as if images were independent), {interval_text(groups)} "
        "with groups drawn anew."
    )


def _sections(
    scored: Scored,
    numbers: Mapping[str, Interval],
    report: Report,
    command: str,
    extra: Sequence[Section],
) -> list[Section]:
    warnings = [Section("Mind this", rows=[{"warning": w} for w in scored.warnings])]
    maps, told = feature_maps(scored)
    return [
        *(warnings if scored.warnings else []),
        Section("How good", _how_made(scored, numbers), rows=metric_rows(scored, numbers)),
        *extra,
        *([_published(scored, numbers)] if scored.published else []),
        _classes(scored, numbers),
        *([Section("Map of the features", told, charts=maps)] if maps else []),
        *_worst(scored),
        *([_texts(scored)] if scored.texts else []),
        _data(scored),
        _repeat(scored, report, command),
    ]


def _unit(scored: Scored) -> str:
    return "group" if scored.grouped else "image"


def _how_made(scored: Scored, numbers: Mapping[str, Interval]) -> str:
    text = (
        f"In brackets the 95 % interval (BCa bootstrap, {_unit(scored)}s drawn anew, the number "
        "of each class kept; an exact bound where every draw agrees). It holds the model fixed. "
    )
    units = len(set(scored.units))
    text += (
        f"{len(scored.labels):,} images of {units:,} groups. "
        if scored.grouped
        else (
            "No groups are known: images of one patient or tile would make intervals too narrow. "
        )
    )
    if scored.abstained is None:
        return text
    text += "Over all images the most probable class counts even where the model abstained. "
    return text + abstention_text(scored, numbers)


def _published(scored: Scored, numbers: Mapping[str, Interval]) -> Section:
    rows = [
        {k: v for k, v in row.items() if k != "source"}
        | {"here": interval_text(numbers[row["metric"]]) if row["metric"] in numbers else ""}
        | {"source": row["source"]}
        for row in scored.published
    ]
    text = "Other encoders, other splits and prompts: a scale, not a contest."
    return Section("Published numbers", text, rows=rows)


def _classes(scored: Scored, numbers: Mapping[str, Interval]) -> Section:
    return Section(
        "Class by class",
        "In the matrix: share of the true class, and number of images.",
        rows=class_rows(scored, numbers),
        charts=[confusion_chart(scored)],
    )


def _worst(scored: Scored) -> list[Section]:
    wrong = int((scored.predicted != scored.labels).sum())
    if not wrong:
        return []
    pictures, unseen = worst_errors(scored)
    text = f"Errors: {wrong:,}. The most confident come first"
    text += ", one a group" if scored.grouped else ""
    text += ": the true class, then what was said and how probable it seemed."
    return [Section("Worst errors", " ".join([text, *unseen]), pictures=pictures)]


def _texts(scored: Scored) -> Section:
    rows = [
        {"class": name, "texts": len(texts), "as shown to the model": " | ".join(texts[:_SHOWN])}
        for name, texts in scored.texts.items()
    ]
    more = any(len(texts) > _SHOWN for texts in scored.texts.values())
    told = f"The first {_SHOWN} of each class; all are in report.json." if more else ""
    return Section("What the classes are called", told, rows=rows)


def _data(scored: Scored) -> Section:
    rows = {"images measured": f"{len(scored.labels):,}"}
    rows |= {f"left out: {why}": f"{n:,}" for why, n in scored.dropped.items()}
    return Section("Images: used and left out", rows=pairs(rows))


def _repeat(scored: Scored, report: Report, command: str) -> Section:
    known = report.provenance
    facts = {k: v for k, v in scored.provenance.items() if isinstance(v, str | int | float)}
    return Section(
        "To repeat it", code=command, rows=pairs(facts | {"git": known["git"], **known["versions"]})
    )


def _predictions(scored: Scored) -> str:
    text = io.StringIO()
    writer = csv.writer(text)
    stays = scored.abstained is not None
    header = ["name", "group", "label", "predicted", *(f"p_{c}" for c in scored.classes)]
    writer.writerow([*header, *(["abstained"] if stays else []), "note"])
    for i, sample in enumerate(scored.samples):
        said = [scored.classes[int(of[i])] for of in (scored.labels, scored.predicted)]
        row = [sample.name, sample.group, *said, *(f"{p:.6f}" for p in scored.probabilities[i])]
        stay = [] if scored.abstained is None else [int(scored.abstained[i])]
        writer.writerow([*row, *stay, NOTICE])
    return text.getvalue()


def _rounded(value: float) -> float | None:
    return round(float(value), 4) if np.isfinite(value) else None

"""What was cleaned in; `report.html`, `report.json` and `provenance.json` out."""

from __future__ import annotations

import json
from textwrap import shorten
from typing import TYPE_CHECKING, Any

import numpy as np

from pathcli.curation.report import flat
from pathcli.report import Picture, Section, html_page, pairs, versions
from pathcli.store.files import write_bytes
from pathcli.types import NOTICE

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from pathcli.curation.agreement import Agreement
    from pathcli.curation.clean import Cleaned, Example, Judges
    from pathcli.types import ByteArray

_SIDE_PX, _LONG = 160, 220
_WARNING = (
    "No rule is right about every row. Look at what was dropped; the cheap judges are calibrated "
    "on little (see below), and the words of a lexicon miss what they do not name."
)


def summary(done: Cleaned) -> dict[str, Any]:
    """Return the counts as one JSON object."""
    return {
        "kept": str(done.path),
        "format": done.layout,
        "rows": done.rows,
        "pairs": done.kept + done.dropped.total(),
        "pairs_kept": done.kept,
        "dropped": dict(done.dropped.most_common()),
        "undecided": {name: n for name, n in done.undecided.items() if n},
        "agreement": {what: _told(found) for what, found in done.agreements.items()},
        "spent": done.spent,
        "warnings": done.warnings,
        "notice": NOTICE,
    }


def _told(found: Agreement) -> dict[str, Any]:
    table = {"both keep": found.table[0][0], "cheap alone drops": found.table[0][1]}
    table |= {"dear alone drops": found.table[1][0], "both drop": found.table[1][1]}
    measures = {row.pop("measure"): row for row in found.rows()}
    return {"n": found.n, "undecided": found.undecided, **table, **measures}


def facts(
    judges: Judges, settings: Mapping[str, Any], given: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return everything that decides what is kept; `given` says what was read."""
    named = {
        "texts": judges.texts,
        "images": judges.images,
        "dear texts": judges.dear_texts,
        "dear images": judges.dear_images,
    }
    told = {what: {"judge": j.name, **j.facts} for what, j in named.items() if j}
    used = {"settings": dict(settings), "judges": told, "versions": versions()}
    return {**(given or {}), **used}


def write_report(done: Cleaned, provenance: Mapping[str, Any], command: str) -> Path:
    """Write the three files beside what was kept; return the page's path.

    Raises:
        ResourceError: the disk is full, or the folder may not be written.
    """
    folder, told = done.path.parent, summary(done)
    lead = (
        f"{done.kept:,} of {told['pairs']:,} pairs are kept; every other one stands in "
        "dropped.csv with its reason."
    )
    page = html_page("Cleaned pairs", lead, [*_sections(done, provenance, command)])
    files = {
        "report.html": page,
        "report.json": _json(told),
        "provenance.json": _json({**provenance, "command": command}),
    }
    for name, text in files.items():
        write_bytes(folder / name, text.encode(errors="backslashreplace"), lambda _: None, "--out")
    return folder / "report.html"


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _sections(done: Cleaned, provenance: Mapping[str, Any], command: str) -> Iterator[Section]:
    total = max(done.kept + done.dropped.total(), 1)
    counts = [("kept", done.kept), *done.dropped.most_common()]
    rows = [{"what": name, "pairs": f"{n:,}", "share": f"{n / total:.1%}"} for name, n in counts]
    yield Section("What became of them", f"The first reason found counts. {_WARNING}", rows=rows)
    if left := {name: n for name, n in done.undecided.items() if n}:
        text = "A model said neither yes nor no, or failed; nothing was dropped for that."
        yield Section("No verdict", text, rows=pairs(left))
    if done.spent:
        yield Section("What the models took", rows=pairs(flat(done.spent)))
    for what, found in done.agreements.items():
        text = (
            f"{found.n:,} of the {what} the cheap judge saw, drawn at random, were put to the dear "
            f"one, which had no verdict on {found.undecided}. Precision and recall are of what is "
            "dropped, the dear judge taken as right; in between low and high lies the 95 % "
            "interval (kappa: BCa bootstrap; shares: Wilson)."
        )
        table = {k: v for k, v in _told(found).items() if "drop" in k or "keep" in k}
        yield Section(f"Cheap against dear: {what}", text, rows=found.rows())
        yield Section(f"Counts: {what}", rows=pairs(table))
    for reason, examples in done.examples.items():
        shown = [_picture(each) for each in examples if each.pixels is not None]
        text = f"{done.dropped[reason]:,} pairs; the first {len(examples)}."
        yield Section(f"Dropped: {reason}", text, rows=[*map(_row, examples)], pictures=shown)
    for name, told in provenance["judges"].items():
        plain = {k: v for k, v in told.items() if not isinstance(v, dict)}
        yield Section(f"Who judged: {name}", rows=pairs(plain))
    for warning in done.warnings:
        yield Section("Mind this", warning)
    told = {k: v for k, v in provenance.items() if not isinstance(v, dict)}
    used = {**told, **provenance["settings"], **provenance["versions"]}
    yield Section("To repeat it", code=command, rows=pairs(used))


def _row(example: Example) -> dict[str, str]:
    caption = shorten(example.caption, _LONG, placeholder="...")
    return {"id": example.name, "why": example.detail, "caption": caption}


def _picture(example: Example) -> Picture:
    pixels: ByteArray = example.pixels if example.pixels is not None else np.zeros((1, 1, 3), "u1")
    return Picture(_small(pixels), f"{example.name}: {example.detail}")


def _small(pixels: ByteArray) -> ByteArray:
    from PIL import Image  # noqa: PLC0415 - only when there are pictures

    image = Image.fromarray(pixels)
    image.thumbnail((_SIDE_PX, _SIDE_PX))
    return np.asarray(image)

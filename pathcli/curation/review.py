"""A file of images and texts in, a page for a person to judge them out; the judgement applied.

The page (assets/curation/review.html and .js) needs nothing beside itself: images are inside it,
made smaller. Texts reach it as data, never as HTML, and its policy runs no script but its own.
It keeps decisions in the browser and exports them, one line of JSON each:

    {"id": "0f3c...", "decision": "keep|drop|edit", "text": "...", "original": "..."}

`id` is a digest of a record's images' names, turns and answer; `text` is the answer that stays.
"""

from __future__ import annotations

import base64
import hashlib
import html
import io
import json
import random
import re
from collections import Counter
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import TYPE_CHECKING, Any

from PIL import Image

from pathcli.data.formats import TALKS, Source, samples
from pathcli.data.formats.tables import read_rows
from pathcli.data.images import image_name, read_image
from pathcli.data.writers import Form, Written, form_of, write_samples
from pathcli.errors import DataError, UsageError
from pathcli.store.files import write_bytes
from pathcli.types import NOTICE, digest, silent
from pathcli.weights import asset

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from pathcli.types import ImageRef, Progress, Sample

SIDE_PX, QUALITY = 640, 82
DECISIONS = ("keep", "drop", "edit")


def record_id(sample: Sample) -> str:
    """Return the 12 hex digits that name a record: its images' names and its texts."""
    return digest([sample.name, *sample.turns, sample.answer])


# --- the page ----------------------------------------------------------------------------


def write_review(
    path: Path,
    out: Path,
    *,
    layout: str = "auto",
    images: Path | None = None,
    sample: int | None = 200,
    seed: int = 0,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Write the page of a file and return how many records it has, of how many.

    Args:
        path: the table, folder or shards.
        out: the page.
        layout: that of `path` (`pathcli.data.formats`).
        images: the folder of its images or slides (default: beside it).
        sample: so many records, drawn at random; None for all.
        seed: of the draw.
        progress: told of each record.

    Raises:
        DataError: no record can be read.
        ResourceError: something is not there, or the page cannot be written.
    """
    source = _source(path, images)
    chosen, total = _drawn(samples(source, layout, TALKS), sample, random.Random(seed))  # noqa: S311 - no secret
    if not chosen:
        msg = f"{path}: no record to review; pathcli data check says why"
        raise DataError(msg)
    distinct = {record_id(each): each for each in chosen}
    records = []
    for number, (name, each) in enumerate(distinct.items(), start=1):
        records.append({"id": name} | _record(each))
        progress(number, len(distinct))
    page = _page(records, path.name, out)
    write_bytes(out.expanduser().absolute(), page.encode(), lambda _: None, "--out")
    faults = sum("fault" in image for record in records for image in record["images"])
    told = {"page": str(out), "records": len(records), "of": total, "broken_images": faults}
    return told | {"not_read": dict(source.dropped)}


def _source(path: Path, images: Path | None) -> Source:
    folder = images.expanduser().absolute() if images else None
    return Source(path.expanduser().absolute(), folder, bare=True)


def _drawn(
    found: Iterator[Sample], count: int | None, rng: random.Random
) -> tuple[list[Sample], int]:
    """Return `count` of the samples at random, in their order, and how many there are.

    One pass with room for `count` (J. Vitter 1985, algorithm R).
    """
    chosen: list[tuple[int, Sample]] = []
    total = 0
    for number, sample in enumerate(found):
        total += 1
        if count is None or number < count:
            chosen.append((number, sample))
        elif (place := rng.randrange(total)) < count:
            chosen[place] = (number, sample)
    return [sample for _, sample in sorted(chosen, key=lambda pair: pair[0])], total


def _record(sample: Sample) -> dict[str, Any]:
    known = {"label": sample.label, "group": sample.group}
    return {
        "name": sample.name,
        "facts": ", ".join(f"{what} {text}" for what, text in known.items() if text),
        "turns": list(sample.turns),
        "original": sample.answer,
        "images": [_picture(ref) for ref in sample.images],
    }


def _picture(ref: ImageRef) -> dict[str, str]:
    """Return an image as a data URL of a JPEG of at most `SIDE_PX` a side, or its fault."""
    try:
        picture = Image.fromarray(read_image(ref))
    except DataError as error:
        return {"name": image_name(ref), "fault": str(error)}
    picture.thumbnail((SIDE_PX, SIDE_PX))
    memory = io.BytesIO()
    picture.save(memory, "JPEG", quality=QUALITY)
    data = base64.b64encode(memory.getvalue()).decode()
    return {"name": image_name(ref), "data": f"data:image/jpeg;base64,{data}"}


def _page(records: list[dict[str, Any]], name: str, out: Path) -> str:
    key = digest([record["id"] for record in records])
    value = {"key": f"pathcli-review-{key}", "file": f"{out.stem}.decisions.jsonl"}
    data = json.dumps(value | {"records": records})
    for sign in "<>&":  # JSON may stand in HTML if nothing in it can end the element
        data = data.replace(sign, f"\\u{ord(sign):04x}")
    script = asset("curation/review.js").read_text(encoding="utf-8")
    policy = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    filled = {
        "@TITLE@": html.escape(f"Review of {name}"),
        "@NOTICE@": html.escape(NOTICE),
        "@HASH@": f"sha256-{policy}",
        "@SCRIPT@": script,
        "@DATA@": data,
    }
    text = asset("curation/review.html").read_text(encoding="utf-8")
    return re.sub("@[A-Z]+@", lambda mark: filled[mark[0]], text)


# --- the decisions -----------------------------------------------------------------------


@dataclass
class Applied:
    """What became of a reviewed file: rows by decision, and what was written of them."""

    written: Written
    counts: Counter[str] = field(default_factory=Counter)


def apply_review(
    path: Path,
    decisions: Path,
    out: Path,
    *,
    layout: str = "auto",
    images: Path | None = None,
    write_images: Path | None = None,
) -> Applied:
    """Write a file without the records dropped and with the texts edited, and count.

    Records without a decision stay as they are. The form is that of `out`'s ending, or
    PathGen's where the images are regions; `write_images` is that of `write_samples`.

    Raises:
        DataError: a decision is none, or its record is not in the file as it was reviewed.
        UsageError: `out` is the file itself, or has an ending of no form.
        ResourceError: something is not there.
    """
    if out.expanduser().resolve() == path.expanduser().resolve():
        msg = f"{out}: would be written over the reviewed file; give another with --out"
        raise UsageError(msg)
    made = _decisions(decisions)
    source, left, counts = _source(path, images), set(made), Counter[str]()
    found = samples(source, layout, TALKS)
    first = next(found, None)
    if first is None:
        msg = f"{path}: no record can be read; pathcli data check says why"
        raise DataError(msg)
    form: Form = form_of(out, first)
    judged = _judged(chain([first], found), made, left, counts)
    root = None if write_images else source.images
    written = write_samples(judged, out, form, root=root, write_images=write_images)
    written.unread, written.examples = source.dropped, source.examples | written.examples
    return Applied(written, counts)


def _judged(
    found: Iterator[Sample],
    made: Mapping[str, tuple[str, str]],
    left: set[str],
    counts: Counter[str],
) -> Iterator[Sample]:
    for sample in found:
        name = record_id(sample)
        decision, text = made.get(name, ("undecided", ""))
        left.discard(name)
        counts[decision] += 1
        if decision != "drop":
            yield replace(sample, answer=text) if decision == "edit" else sample
    if left:
        msg = (
            f"{len(left)} of {len(made)} decisions are of records that are not in the file "
            f"(e.g. {min(left)}); was it changed since the page was made?"
        )
        raise DataError(msg)


def _decisions(path: Path) -> dict[str, tuple[str, str]]:
    """Return decision and text of each record; of two decisions on one the later stays.

    Raises:
        DataError: a line is no decision.
    """
    made = {}
    for number, row in enumerate(read_rows(path), start=1):
        name, decision, text = (row.get(what) for what in ("id", "decision", "text"))
        whole = isinstance(name, str) and isinstance(text, str) and text.strip()
        if not whole or decision not in DECISIONS:
            msg = f"{path}: record {number} is no decision {{id, decision: keep|drop|edit, text}}"
            raise DataError(msg)
        made[str(name)] = (str(decision), str(text).strip())
    return made

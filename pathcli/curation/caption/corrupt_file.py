"""A table of captions in; wrong ones, what mends them, and a report of both, out as files."""

from __future__ import annotations

import csv
import json
from collections import Counter
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Any

from pathcli.curation.caption.agents import prompts
from pathcli.curation.caption.corrupt import corrupted
from pathcli.curation.report import flat, given
from pathcli.data.formats import samples
from pathcli.data.outputs import whole
from pathcli.data.writers import write_samples
from pathcli.endpoints import spent
from pathcli.errors import DataError
from pathcli.report import Section, html_page, pairs, versions
from pathcli.store.files import write_bytes
from pathcli.types import NOTICE, Region, digest

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    from pathcli.curation.models import Opened
    from pathcli.data.formats import Source
    from pathcli.data.writers import Form, Written
    from pathcli.types import Sample

EXAMPLES = 12


@dataclass
class _Counts:
    """What became of captions: `left` stay right, `edits` are operations that mend the others."""

    wrong: int = 0
    left: int = 0
    edits: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    examples: list[dict[str, str]] = field(default_factory=list)

    def seen(self, found: Iterable[Sample]) -> Iterator[Sample]:
        """Yield samples, counted."""
        for sample in found:
            edits = json.loads(sample.answer)
            self.wrong += bool(edits)
            self.left += not edits
            self.edits.update(edit["op"] for edit in edits)
            if edits and len(self.examples) < EXAMPLES:
                self.examples.append({"asked": sample.turns[0], "mended by": sample.answer})
            yield sample


def corrupt_file(
    source: Source,
    out: Path,
    *,
    model: Opened | None = None,
    untouched: float,
    seed: int,
    command: str = "",
) -> tuple[dict[str, Any], Written]:
    """Write wrong captions as `out`, and beside it what was dropped, a report and provenance.

    They are called as `out` is, with `.dropped.csv`, `.report.html`, `.report.json` and
    `.provenance.json` for its ending.

    Args:
        source: images and captions, in any layout of captions.
        out: the file; squares of slides make PathGen's form, other images LLaVA's.
        model: makes the mistakes; without it they follow rules.
        untouched: share of captions left right.
        seed: of every draw.
        command: how this is run again, for the report.

    Returns:
        The counts, and what became of the rows.

    Raises:
        DataError: no caption could be spoilt.
        ResourceError: the endpoint, its budget or the disk is at its end; what was answered is
            kept, and the same call again goes on.
        UsageError: a share outside 0 to 1, or `out` has another ending.
    """
    counts, read = _Counts(), given(source.path, source.images, "auto")
    done = _written(source, out, counts, model=model, untouched=untouched, seed=seed)
    told = {
        "written": done.rows,
        "wrong": counts.wrong,
        "left right": counts.left,
        "operations": dict(counts.edits),
        "not spoilt": counts.dropped.total(),
        "reasons": dict(counts.dropped),
        "not read": dict(done.unread),
        "out": str(out),
        "notice": NOTICE,
    }
    told |= spent([model.budget]) if model else {}
    how = {"untouched": untouched, "seed": seed, "command": command, "versions": versions()}
    who = {"model": model.name, "model_digest": model.digest} if model else {"model": "none"}
    asked = {name: digest(prompts()[name]) for name in ("revise", "corrupt")}
    _report(out, told, {**read, **who, "prompts": asked, **how}, counts.examples)
    return told | {"report": str(out.with_suffix(".report.html"))}, done


def _written(
    source: Source,
    out: Path,
    counts: _Counts,
    *,
    model: Opened | None,
    untouched: float,
    seed: int,
) -> Written:
    """Write the samples, and what was dropped, and count."""
    with (
        whole(out.with_suffix(".dropped.csv")) as lost,
        lost.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file,
    ):
        table = csv.writer(file)
        table.writerow(["id", "reason"])

        def drop(sample: Sample, why: str) -> None:
            counts.dropped[why] += 1
            table.writerow([sample.name, why])

        found = corrupted(samples(source), drop, model=model, untouched=untouched, seed=seed)
        first = next(found, None)
        if first is None:
            why = next(iter(counts.dropped), "there is none")
            msg = f"{source.path}: no caption could be spoilt: {why}"
            raise DataError(msg)
        form: Form = "pathgen" if isinstance(first.images[0], Region) else "llava"
        made = counts.seen(chain([first], found))
        done = write_samples(made, out, form, root=source.images)
        table.writerows((name, why) for why, name in source.examples.items())
    done.unread, done.examples = source.dropped, source.examples | done.examples
    return done


def _report(
    out: Path,
    told: Mapping[str, Any],
    facts: Mapping[str, Any],
    examples: list[dict[str, str]],
) -> None:
    lead = (
        f"{told['wrong']:,} captions made wrong on purpose, and {told['left right']:,} left right."
    )
    page = html_page(
        "Wrong captions",
        lead,
        [
            Section("What came of it", rows=pairs(flat(told))),
            Section("Examples", f"The first {len(examples)}.", rows=examples),
            Section("To repeat it", code=str(facts["command"]), rows=pairs(flat(facts))),
        ],
    )
    files = {
        ".report.html": page,
        ".report.json": json.dumps(told, indent=1, ensure_ascii=False) + "\n",
        ".provenance.json": json.dumps(facts, indent=1, ensure_ascii=False) + "\n",
    }
    for ending, text in files.items():
        data = text.encode(errors="backslashreplace")
        write_bytes(out.with_suffix(ending), data, lambda _: None, "OUT")

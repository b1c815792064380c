"""Questions and answers in, one by one; what a data set of them holds out: numbers and a page."""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import dataclass, field
from textwrap import shorten
from typing import TYPE_CHECKING, Any

from pathcli.charts import COLOURS, drawing
from pathcli.curation.pairs import whole_words
from pathcli.metrics.statistics import wilson
from pathcli.report import Section, html_page, metric, pairs
from pathcli.store.files import write_bytes
from pathcli.types import NOTICE, digest
from pathcli.weights import sha256

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from matplotlib.axes import Axes

    from pathcli.curation.pairs import Fault, Pair

_SHOWN = 10
_BARS = 15
_LONG = 240
_ELSEWHERE = "not named"


@dataclass
class Dataset:
    """What is counted of a data set; `parts` maps parts of the body to the words that name them."""

    parts: Mapping[str, Sequence[str]]
    captions: int = 0
    kept: Counter[str] = field(default_factory=Counter)
    dropped: dict[str, Counter[str]] = field(default_factory=dict)
    body: Counter[str] = field(default_factory=Counter)
    asks: Counter[str] = field(default_factory=Counter)
    question_words: Counter[int] = field(default_factory=Counter)
    answer_words: Counter[int] = field(default_factory=Counter)
    examples: list[dict[str, str]] = field(default_factory=list)
    lost: dict[str, dict[str, str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Compile the words, and seed what draws examples."""
        self._parts = {part: whole_words(words) for part, words in self.parts.items()}
        self._rng = random.Random(0)  # noqa: S311 - draws examples
        self._last = ("", "")

    def add(self, kind: str, name: str, pair: Pair, caption: str) -> None:
        """Count a pair that is kept."""
        self.kept[kind] += 1
        if self._last[0] != caption:
            self._last = (caption, self._part(caption))
        self.body[self._last[1]] += 1
        self.asks[pair.question.split()[0].strip(",.:").capitalize()] += 1
        self.question_words[len(pair.question.split())] += 1
        self.answer_words[len(pair.answer.split())] += 1
        shown = {"caption": name, "kind": kind, "question": pair.question, "answer": pair.answer}
        total = self.kept.total()
        if total <= _SHOWN:
            self.examples.append(shown)
        elif (at := self._rng.randrange(total)) < _SHOWN:  # each is as likely to be shown
            self.examples[at] = shown

    def drop(self, kind: str, name: str, fault: Fault, pair: Pair) -> None:
        """Count what is dropped."""
        self.dropped.setdefault(kind, Counter())[fault.reason] += 1
        told = " / ".join(filter(None, pair)) or fault.detail
        shown = {"why": fault.detail, "caption": name, "pair": told}
        self.lost.setdefault(fault.reason, {"reason": fault.reason, **shown})

    def _part(self, caption: str) -> str:
        """Return the part of the body a caption names first."""
        found = [(m.start(), part) for part, p in self._parts.items() if (m := p.search(caption))]
        return min(found)[1] if found else _ELSEWHERE

    def passed(self, kind: str) -> dict[str, float | None]:
        """Return the share of pairs that passed, with its 95 % interval (Wilson)."""
        kept = self.kept[kind]
        total = kept + sum(self.dropped.get(kind, Counter()).values())
        if not total:
            return metric(None, n=0)
        between = wilson(kept, total)
        return metric(kept / total, between.low, between.high, total)

    def summary(self) -> dict[str, Any]:
        """Return the counts as one JSON object."""
        kinds = sorted({*self.kept, *self.dropped})
        return {
            "captions": self.captions,
            "kept": dict(self.kept),
            "passed": {kind: self.passed(kind) for kind in kinds},
            "dropped": {kind: dict(each.most_common()) for kind, each in self.dropped.items()},
            "body_parts": dict(self.body.most_common()),
            "question_types": dict(self.asks.most_common()),
            "question_words": _lengths(self.question_words),
            "answer_words": _lengths(self.answer_words),
            "examples": self.examples,
        }

    def sections(self) -> Iterator[Section]:
        """Yield a page's sections about what is in the data set and what was left out."""
        text = (
            "A pair is a question with its answer; what is no pair counts as one that was dropped. "
            "In between low and high lies the 95 % interval (Wilson)."
        )
        yield Section("What passed", text, rows=[*self._shares()])
        rows = [
            {"kind": kind, "reason": reason, "pairs": f"{n:,}"}
            for kind, each in self.dropped.items()
            for reason, n in each.most_common()
        ]
        yield Section("What was dropped", "The first reason found counts.", rows=rows)
        if not self.kept:
            return
        text = "By the first word of a list in the caption; counted are pairs."
        yield Section("Parts of the body", text, charts=[bars(self.body, "pairs")])
        text = "By a question's first word."
        yield Section("Questions", text, charts=[bars(self.asks, "questions")])
        drawn = [
            histogram(self.question_words, "words of a question"),
            histogram(self.answer_words, "words of an answer"),
        ]
        yield Section("Lengths", charts=drawn)
        text = f"{len(self.examples)} drawn at random."
        yield Section("Examples", text, rows=[_short(row) for row in self.examples])
        if self.lost:
            text = "The first of each reason."
            yield Section("Dropped", text, rows=[_short(row) for row in self.lost.values()])

    def _shares(self) -> Iterator[dict[str, Any]]:
        for kind in sorted({*self.kept, *self.dropped}):
            told = self.passed(kind)
            shares = {k: f"{told[k]:.1%}" for k in ("value", "low", "high") if told[k] is not None}
            row = {"kind": kind, "kept": f"{self.kept[kind]:,}", "of": f"{told['n']:,.0f}"}
            yield row | {("share" if k == "value" else k): text for k, text in shares.items()}


def _short(row: Mapping[str, str]) -> dict[str, str]:
    return {k: shorten(text, _LONG, placeholder="...") for k, text in row.items()}


def _lengths(counts: Counter[int]) -> dict[str, float]:
    """Return mean, median and extremes of lengths."""
    if not counts:
        return {}
    every = sorted(counts.elements())
    mean = round(sum(every) / len(every), 2)
    return {"mean": mean, "median": every[len(every) // 2], "min": every[0], "max": every[-1]}


# --- pictures ----------------------------------------------------------------------------


def bars(counts: Counter[str], what: str) -> str:
    """Return an SVG of the most frequent names, the rest in one bar."""
    top = counts.most_common(_BARS)
    if rest := counts.total() - sum(n for _, n in top):
        top.append(("others", rest))
    names = [name.encode(errors="backslashreplace").decode() for name, _ in reversed(top)]
    numbers = [number for _, number in reversed(top)]

    def draw(axes: Axes) -> None:
        drawn = axes.barh(names, numbers, color=COLOURS[0])
        axes.bar_label(drawn, fmt="{:,.0f}", padding=3)
        axes.set(xlabel=what)
        axes.spines[["top", "right"]].set_visible(False)

    return drawing((5.6, 0.9 + 0.26 * len(top)), draw)


def histogram(counts: Counter[int], what: str) -> str:
    """Return an SVG of how often each number occurs, in at most 30 bins of whole numbers."""
    low, high = min(counts), max(counts)
    width = (high - low) // 30 + 1

    def draw(axes: Axes) -> None:
        edges = [*range(low, high + width + 1, width)]
        weights = list(counts.values())
        axes.hist(list(counts), bins=edges, weights=weights, align="left", color=COLOURS[0])
        axes.set(xlabel=what, ylabel="pairs")
        axes.spines[["top", "right"]].set_visible(False)

    return drawing((5.6, 3.2), draw)


# --- files -------------------------------------------------------------------------------


def given(path: Path, images: Path | None, layout: str) -> dict[str, Any]:
    """Return what was read, for provenance: the input, its digest, its layout, and its images.

    A file's digest is the SHA-256 of its bytes, a folder's that of its files' names and sizes.
    """
    if path.is_dir():
        files = sorted(each for each in path.rglob("*") if each.is_file())
        listed = [[str(each.relative_to(path)), each.stat().st_size] for each in files]
        known = digest(listed)
    else:
        known = sha256(path)
    return {"input": str(path), "input_digest": known, "format": layout, "images": str(images)}


def flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a mapping of mappings as one, in whose names "a: b" is b of a."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        inner = flat(value) if isinstance(value, dict) else {"": value}
        found |= {f"{name}: {k}" if k else name: v for k, v in inner.items()}
    return found


def write_report(
    out: Path,
    title: str,
    lead: str,
    data: Dataset,
    provenance: Mapping[str, Any],
    *,
    told: Mapping[str, Any],
    command: str,
) -> Path:
    """Write report.html, report.json and provenance.json into `out`; return the page's path.

    `told` are counts beside those of the data: what was spent, say.

    Raises:
        ResourceError: the disk is full, or the folder may not be written.
    """
    used = {name: value for name, value in provenance.items() if not isinstance(value, dict)}
    nested = [value for value in provenance.values() if isinstance(value, dict)]
    for each in nested:
        used |= each
    sections = [*data.sections()]
    if told:
        sections.append(Section("What it took", rows=pairs(flat(told))))
    sections.append(Section("To repeat it", code=command, rows=pairs(used)))
    files = {
        "report.html": html_page(title, lead, sections),
        "report.json": _json({**data.summary(), **told, "notice": NOTICE}),
        "provenance.json": _json({**provenance, "command": command}),
    }
    for name, text in files.items():
        write_bytes(out / name, text.encode(errors="backslashreplace"), lambda _: None, "--out")
    return out / "report.html"


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"

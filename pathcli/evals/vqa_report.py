"""An evaluation of answers in; `metrics.json`, `report.html` and `predictions.jsonl` out."""

from __future__ import annotations

import logging
import re
from contextlib import suppress
from dataclasses import replace
from textwrap import shorten
from typing import TYPE_CHECKING, Any

import numpy as np

from pathcli.errors import PathcliError, ResourceError
from pathcli.evals.patch_report import interval_text
from pathcli.evals.vqa import prediction_lines
from pathcli.evals.vqa_cards import published
from pathcli.evals.vqa_data import with_images
from pathcli.evals.vqa_judge import ABOUT
from pathcli.evals.vqa_scores import HEADLINE, MADE_OF, OVERALL, guessing
from pathcli.report import Picture, Section, html_page, json_text, metric, pairs, versions
from pathcli.runs import git_commit
from pathcli.store.files import write_bytes
from pathcli.types import Report, digest

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from pathcli.evals.vqa_data import Question
    from pathcli.evals.vqa_scores import Answered, Outcome
    from pathcli.metrics.statistics import Interval
    from pathcli.types import ByteArray

log = logging.getLogger("pathcli")

SHOWN = 6
"""Right answers shown, and wrong ones."""

NOT_OURS = (
    "As published, of another model and protocol: a scale, not a contest. Here stands our number "
    "by the rule that comes nearest, on the questions measured here."
)
_SIDE_PX, _LONG, _CELL = 224, 280, 400
_RIGHT = 1.0


def folder_name(outcome: Outcome) -> str:
    """Return the name of a report's folder: other questions, words or model, another folder."""
    ours, facts = outcome.ours, outcome.facts
    told = {k: v for k, v in facts.items() if k not in {"scope", "as_read"}}
    orders = sorted({len(said) for said in ours.answers.values()})
    asked = digest([ours.asked.digest, told, orders])[:6]
    words = ("vqa", ours.asked.name, ours.model)
    return "-".join([*(re.sub(r"[^\w.]+", "-", word).strip("-.") for word in words), asked])


def vqa_report(outcome: Outcome) -> Report:
    """Return every number with its interval, a row a type, and where all came from."""
    ours, asked = outcome.ours, outcome.ours.asked
    return Report(
        title=_title(outcome),
        metrics={name: _metric(found) for name, found in outcome.numbers.items()},
        rows=tuple(type_rows(outcome, plain=True)),
        provenance={
            **outcome.facts,
            "dataset": asked.name,
            "dataset_source": asked.card.source,
            "questions_from": asked.source,
            "questions_digest": asked.digest,
            "drawn_anew": "group, else image",
            "units": len({q.unit for q in ours.questions}),
            "counts": ours.counts(),
            "dropped": dict(asked.dropped),
            "warnings": list(asked.warnings),
            "rules": {n: ours.rules[n].about for n in ours.values if n in ours.rules},
            "baselines": baseline_rows(outcome),
            "compared_with": outcome.rival.model if outcome.rival else None,
            "comparison": [
                {"rule": d.rule, "ours": d.ours, "theirs": d.theirs, "p_holm": _number(d.p)}
                | {"difference": _metric(d.difference)}
                for d in outcome.differences
            ],
            "published": published(asked.name, asked.split),
            "split": asked.split,
            "git": git_commit(),
            "versions": versions(),
        },
    )


def write_vqa(folder: Path, outcome: Outcome, command: str) -> Path:
    """Write the three files; return the page's path.

    Raises:
        ResourceError: the disk is full, or the folder may not be written.
    """
    report = vqa_report(outcome)
    lead = (
        f"{len(outcome.ours.questions):,} questions about images, answered by "
        f"{outcome.ours.model}. Every rule states what it counts."
    )
    files = {
        "predictions.jsonl": "\n".join(prediction_lines(outcome.ours)) + "\n",
        "metrics.json": json_text(report),
        "report.html": html_page(report.title, lead, [*_sections(outcome, report, command)]),
    }
    for name, text in files.items():
        write_bytes(folder / name, text.encode(), lambda _: None, "--out")
    return folder / "report.html"


# --- rows --------------------------------------------------------------------------------


def rule_rows(outcome: Outcome, *, full: bool = False) -> list[dict[str, Any]]:
    """Return a row for each number; the few that matter, or all with what they count."""
    made = MADE_OF | {"judge": ABOUT}
    shown, rows = (
        {*HEADLINE.values(), "exact", *made, *(rule.name for rule in outcome.ours.more)},
        [],
    )
    for name, found in outcome.numbers.items():
        base, _, part = name.partition(".")
        if part == "macro" or not (full or name in shown):
            continue
        rule, large = outcome.ours.rules.get(base), outcome.numbers.get(f"{name}.macro")
        row: dict[str, Any] = {
            "number": name,
            "of": part or (rule.applies if rule else "open" if base == "judge" else "all"),
        }
        row |= {"questions": _count(outcome.ours, base, part)}
        row |= {"mean [95 % interval]": interval_text(found)}
        row |= {"mean of types": interval_text(large) if large else ""}
        if full:
            row |= {"what it counts": rule.about if rule else made.get(base, "")}
            row |= {"whose rule": rule.source if rule else "ours"}
        rows.append(row)
    return sorted(rows, key=lambda row: row["number"] not in made)


def _count(ours: Answered, name: str, kind: str) -> int | str:
    """Return how many questions a number is the mean of."""
    row = (ours.values | ours.steady).get(name)
    if row is None:
        return len(ours.questions) if name.startswith("macro") else ""
    kinds = [q.kind for q, no in zip(ours.questions, np.isnan(row), strict=True) if not no]
    return sum(kind in {"", each} for each in kinds)


def type_rows(outcome: Outcome, *, plain: bool = False) -> list[dict[str, Any]]:
    """Return a row for each type of question: the model, and the majority answer beside it."""
    rows = []
    for name, kind, n, found, (known,) in outcome.types:
        row: dict[str, Any] = {"type": name, "kind": kind, "rule": HEADLINE[kind], "questions": n}
        if plain:
            row |= _metric(found)
        else:
            row |= {"mean [95 % interval]": interval_text(found)}
        rows.append(row | {"majority answer": round(known, 4)})
    return rows


def baseline_rows(outcome: Outcome) -> list[dict[str, Any]]:
    """Return what knowing no image gives, beside the model."""
    ours = outcome.ours
    others = [outcome.majority, *([outcome.blind] if outcome.blind else [])]
    rows = [{"answered by": a.model, **_means(a)} for a in (ours, *others)]
    guess = guessing(ours.asked)
    if np.isfinite(guess):
        rows.append({"answered by": "guessing", HEADLINE["choice"]: round(guess, 4)})
    return rows


def table_rows(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return rows that all have every column, as a terminal's table wants them."""
    columns = dict.fromkeys(name for row in rows for name in row)
    return [{name: row.get(name) for name in columns} for row in rows]


def _means(answered: Answered) -> dict[str, float]:
    return {name: round(float(np.nanmean(row)), 4) for name, row in answered.headline.items()}


def published_rows(outcome: Outcome) -> list[dict[str, Any]]:
    """Return other people's numbers, a model a row, and ours by the rule that comes nearest."""
    numbers = outcome.numbers
    return [
        {"model": model, "measure": told["metric"], "published": f"{value:.4f}"}
        | {"here": _here(numbers, told["rule"]), "source": told["source"]}
        for told in published(outcome.ours.asked.name, outcome.ours.asked.split)
        for model, value in told["values"].items()
    ]


def _here(numbers: Mapping[str, Interval], rule: str) -> str:
    return f"{interval_text(numbers[rule])}, {rule}" if rule in numbers else ""


def difference_rows(outcome: Outcome) -> list[dict[str, Any]]:
    """Return a row a rule: both means, the difference with its interval, and p."""
    rival = outcome.rival.model if outcome.rival else ""
    return [
        {"rule": d.rule, outcome.ours.model: f"{d.ours:.3f}", f"{rival} ": f"{d.theirs:.3f}"}
        | {"difference": interval_text(d.difference), "p (Holm)": f"{d.p:.3g}"}
        for d in outcome.differences
    ]


# --- page --------------------------------------------------------------------------------


def _title(outcome: Outcome) -> str:
    return f"{outcome.ours.asked.card.title or outcome.ours.asked.name}: {outcome.ours.model}"


def _sections(outcome: Outcome, report: Report, command: str) -> Iterator[Section]:
    asked = outcome.ours.asked
    if asked.warnings:
        yield Section("Mind this", rows=[{"warning": w} for w in asked.warnings])
    units = report.provenance["units"]
    yield Section(
        "How good",
        f"In brackets the 95 % interval (BCa bootstrap; {units:,} groups or images with all their "
        "questions drawn anew, the model held fixed). Rules disagree about the same answers: "
        "compare only numbers of one rule.",
        rows=rule_rows(outcome, full=True),
    )
    yield Section("Empty and unmapped answers", rows=pairs(report.provenance["counts"]))
    yield Section("Knowing no image", _BASELINES, rows=baseline_rows(outcome))
    yield Section("Type by type", "By the rule of each kind.", rows=type_rows(outcome))
    if outcome.rival:
        text = f"{outcome.ours.model} less {outcome.rival.model}, units drawn in pairs."
        yield Section("Against another model", text, rows=difference_rows(outcome))
    if rows := published_rows(outcome):
        yield Section("Published numbers", NOT_OURS, rows=rows)
    yield from _examples(outcome)
    yield from _how_asked(outcome.facts)
    used = {"questions measured": f"{len(asked.questions):,}", "from": asked.source}
    used |= {f"left out: {why}": f"{n:,}" for why, n in asked.dropped.items()}
    yield Section("Questions: used and left out", rows=pairs(used))
    told = _short(report.provenance)
    told |= {"git": report.provenance["git"], **report.provenance["versions"]}
    yield Section("To repeat it", code=command, rows=pairs(told))


_BASELINES = (
    "The majority answer is the commonest reference of each type, or the place where the right "
    "option stands most often, read off these very questions; blind is the model with another "
    "question's images."
)


def _how_asked(facts: Mapping[str, Any]) -> Iterator[Section]:
    if "judge" in facts:
        text = (
            f"{facts['judge']} marked open answers; it gave no mark {facts['judge_unread']} times."
        )
        yield Section("What the judge is told", text, code=facts["judge_prompt"])
    if "decoding" not in facts:
        text = "The answers are from a file; how they were made it does not say."
        yield Section("How it was asked", text, rows=pairs(_short(facts)))
        return
    rows = {"prompt": facts["prompt"], "which is": facts["prompt_about"]}
    rows |= {"from": facts["prompt_source"], **facts["decoding"], "scope": facts["scope"]}
    yield Section("How it was asked", "Settings of generation and words.", rows=pairs(rows))
    for kind, read in facts["as_read"].items():
        text = f"All that the model reads of question {read['id']}, exactly."
        yield Section(f"As it is read: {kind}", text, code=read["text"])


def _short(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the facts that fit in a cell."""
    one_line = {k: v for k, v in facts.items() if isinstance(v, str | int | float)}
    return {k: v for k, v in one_line.items() if "\n" not in str(v)}


def _examples(outcome: Outcome) -> Iterator[Section]:
    """Yield right and wrong answers drawn at random, one a unit, with pictures where there are."""
    ours = outcome.ours
    value = ours.headline[OVERALL]
    order = np.random.default_rng(0).permutation(len(value)).tolist()
    for title, wanted in (("Right answers", value >= _RIGHT), ("Wrong answers", value == 0)):
        chosen: dict[str, Question] = {}
        for i in order:
            if wanted[i] and len(chosen) < SHOWN:
                chosen.setdefault(ours.questions[i].unit, ours.questions[i])
        if not chosen:
            continue
        text = f"{int(wanted.sum()):,} questions; {len(chosen)} drawn at random."
        shown = [*_pictures(outcome, list(chosen.values()))]
        rows = [] if shown else [_row(q, ours) for q in chosen.values()]
        yield Section(title, text, rows=rows, pictures=shown)


def _row(question: Question, ours: Answered) -> dict[str, str]:
    said = [each.text for each in ours.answers[question.id]]
    row = {"id": question.id, "question": question.question, "right": question.answer}
    row |= {"said": " / ".join(said) or "(nothing)"}
    return {key: shorten(value, _CELL, placeholder="...") for key, value in row.items()}


def _pictures(outcome: Outcome, questions: Sequence[Question]) -> Iterator[Picture]:
    from pathcli.data.images import read_image  # noqa: PLC0415 - slides, archives

    asked = replace(outcome.ours.asked, questions=tuple(questions))
    with suppress(ResourceError):
        for question in with_images(asked, missing=1).questions:
            row = _row(question, outcome.ours)
            caption = f"{row['question']} Right: {row['right']}. Said: {row['said']}"
            try:
                pixels = read_image(question.images[0])
            except PathcliError as error:
                log.debug("not shown: %s", error)
                continue
            yield Picture(_small(pixels), shorten(caption, _LONG, placeholder="..."))


def _small(pixels: ByteArray) -> ByteArray:
    from PIL import Image  # noqa: PLC0415 - only when there are pictures

    image = Image.fromarray(pixels)
    image.thumbnail((_SIDE_PX, _SIDE_PX))
    return np.asarray(image)


def _metric(found: Interval) -> dict[str, float | None]:
    return metric(_number(found.value), _number(found.low), _number(found.high), found.n)


def _number(value: float) -> float | None:
    return round(float(value), 4) if np.isfinite(value) else None

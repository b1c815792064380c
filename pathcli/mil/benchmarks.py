"""A benchmark's name in, its labels, classes, official test rule and published numbers out.

Each is a JSON file in assets/benchmarks. Slides and features are the user's; where the label
table may not be shipped or is not at hand, the user gives it too.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pathcli.errors import DataError, ResourceError, UsageError
from pathcli.mil.tables import LabelTable, Row, label_table, read_labels
from pathcli.registry import did_you_mean
from pathcli.weights import asset

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

BENCHMARKS = ("camelyon16", "camelyon17", "bracs")
SHIPPED = ("camelyon16",)
"""Benchmarks whose label table is one of our assets."""


@dataclass(frozen=True)
class Published:
    """A number from the literature; `sd` is over seeds, None where it was not found."""

    head: str
    encoder: str
    metric: str
    value: float
    sd: float | None
    source: str


@dataclass(frozen=True)
class Benchmark:
    """What is compared with what; `table` is None until the user gives the labels.

    `class_map` maps a label as the table has it to the name of its class, `test_rule` says
    which slides are the official test set, `metrics` how the numbers are meant.
    """

    name: str
    title: str
    labels: str
    publisher: str
    columns: tuple[str, ...]
    table: LabelTable | None
    classes: tuple[str, ...]
    class_map: Mapping[str, str]
    test_rule: str
    metrics: tuple[str, ...]
    published: tuple[Published, ...]

    def need_table(self) -> LabelTable:
        """Return the label table, its test slides marked.

        Raises:
            ResourceError: it does not ship with pathcli and was not given.
        """
        if self.table is None:
            msg = (
                f"{self.name}: pathcli does not ship its labels; give a table with the columns "
                f"{', '.join(self.columns)} (train: --set data.labels=FILE, mil-eval: --labels "
                f"FILE; published at {self.publisher})"
            )
            raise ResourceError(msg)
        return self.table


def benchmark(
    name: str, labels: Path | str | None = None, *, classes: Mapping[str, str] | None = None
) -> Benchmark:
    """Return a benchmark, with the user's label table if it is given.

    Args:
        name: one of `BENCHMARKS`.
        labels: a table as `read_labels` takes it, with the benchmark's columns.
        classes: a class map in place of the benchmark's own.

    Raises:
        UsageError: no benchmark is called `name`.
        DataError: the table is not one of this benchmark, or no slide is in its test set.
    """
    if name not in BENCHMARKS:
        msg = f"no benchmark is called {name!r}: {did_you_mean(name, list(BENCHMARKS))}"
        raise UsageError(msg)
    card = json.loads(asset(f"benchmarks/{name}.json").read_text(encoding="utf-8"))
    mapping = dict(classes or card["classes"])
    path = labels or (asset(f"benchmarks/{name}.csv") if name in SHIPPED else None)
    return Benchmark(
        name=name,
        title=card["title"],
        labels=card["labels"] if labels is None else str(labels),
        publisher=card["publisher"],
        columns=tuple(card["columns"]),
        table=_marked(read_labels(path, classes=mapping), card) if path else None,
        classes=tuple(dict.fromkeys(mapping.values())),
        class_map=mapping,
        test_rule=card["test"]["rule"],
        metrics=tuple(card["metrics"]),
        published=tuple(Published(**row) for row in card["published"]),
    )


def _marked(table: LabelTable, card: Mapping[str, Any]) -> LabelTable:
    """Return the table with the split that the benchmark's test rule gives."""
    rule = card["test"]
    if bare := next((row for row in table.rows if getattr(row, rule["field"]) is None), None):
        msg = (
            f"{table.source}: slide {bare.slide} has no {rule['field']}; {card['title']} needs "
            f"the columns {', '.join(card['columns'])}"
        )
        raise DataError(msg)

    def part(row: Row) -> str:
        if re.fullmatch(rule["match"], getattr(row, rule["field"])):
            return "test"
        return "val" if row.split == "val" else "train"

    rows = [replace(row, split=part(row)) for row in table.rows]
    if all(row.split != "test" for row in rows):
        msg = f"{table.source}: no test slide; by the rule they are {rule['rule']}"
        raise DataError(msg)
    named = {label: label for label in table.classes}
    return label_table(rows, source=table.source, classes=named, warnings=table.warnings)

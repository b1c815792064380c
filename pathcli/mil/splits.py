"""A label table in, train, validation and test slides out: drawn here, or read from a file.

Drawn splits keep every patient whole (or every site), hold each class's share within one
patient, and depend on the seed and the set of rows alone, not on their order. Validation
slides are always drawn from what is not test.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from pathcli.errors import DataError, UsageError
from pathcli.mil.sheets import read_sheet
from pathcli.mil.tables import counted, natural, slide_name

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

    from numpy.typing import NDArray

    from pathcli.mil.tables import LabelTable, Row

    Counts = NDArray[np.float64]

By = Literal["patient", "site"]
PARTS = ("train", "val", "test")
SITE_TRIALS, SITE_PASSES = 20, 10
"""Sites are dealt in so many random orders, each mended so often; the best is kept."""
_EMPTY = 1e3
"""Cost of a class without a patient in a part: more than any imbalance."""


@dataclass(frozen=True)
class Split:
    """Slide ids of the three parts; `warnings` is what a report should say of them."""

    train: tuple[str, ...]
    val: tuple[str, ...]
    test: tuple[str, ...]
    name: str
    warnings: tuple[str, ...] = ()

    def parts(self) -> dict[str, tuple[str, ...]]:
        """Return the slide ids by part."""
        return {"train": self.train, "val": self.val, "test": self.test}


# --- drawn -------------------------------------------------------------------------------


def monte_carlo(
    table: LabelTable, *, seed: int, val: float = 0.1, test: float = 0.2, by: By = "patient"
) -> Split:
    """Return one random split: `test` of all patients, `val` of those that are not test.

    Raises:
        DataError: a class is missing from a part, or `by` is "site" and a row has none.
        UsageError: a share outside 0..1, or a negative seed.
    """
    _check(seed, val, test)
    rng = np.random.default_rng(seed)
    groups = _groups(table, table.rows, by)
    tested = _draw(groups, test, rng, by, keep=2)
    rest = {name: counts for name, counts in groups.items() if name not in tested}
    chosen = _draw(rest, val, rng, by)
    return _split(table, by, chosen, tested, f"random by {by}, seed {seed}")


def k_fold(
    table: LabelTable, *, folds: int, fold: int, seed: int, val: float = 0.1, by: By = "patient"
) -> Split:
    """Return fold `fold` (from 0): every slide is in the test part of exactly one fold.

    Raises:
        DataError: as `monte_carlo`, or there are fewer patients (sites) than folds.
        UsageError: as `monte_carlo`, fewer than two folds, or no such fold.
    """
    _check(seed, val)
    if folds < 2 or not 0 <= fold < folds:  # noqa: PLR2004 - one fold has nothing to train on
        msg = f"fold {fold} of {folds}: two folds or more, counted from 0, are possible"
        raise UsageError(msg)
    groups = _groups(table, table.rows, by)
    if len(groups) < folds:
        msg = f"{table.source}: {folds} folds need as many {by}s, there are {len(groups)}"
        raise DataError(msg)
    total = sum(groups.values(), np.zeros(len(table.classes)))
    dealt = _deal(groups, np.tile(total / folds, (folds, 1)), np.random.default_rng(seed), by)
    rest = {name: counts for name, counts in groups.items() if dealt[name] != fold}
    chosen = _draw(rest, val, np.random.default_rng([seed, fold]), by)
    name = f"fold {fold} of {folds} by {by}, seed {seed}"
    return _split(table, by, chosen, groups.keys() - rest.keys(), name)


def official(table: LabelTable, *, seed: int, val: float = 0.1) -> Split:
    """Return the split the table itself gives; val is drawn from the rest if it names none.

    Raises:
        DataError: no row is marked as test, or a class is missing from a part.
        UsageError: as `monte_carlo`.
    """
    _check(seed, val)
    marked = {part: [r.slide for r in table.rows if r.split == part] for part in PARTS}
    if not marked["test"]:
        msg = f"{table.source}: no row is marked as test; give a column split (train, val, test)"
        raise DataError(msg)
    rest = {r.slide for r in table.rows} - {*marked["val"], *marked["test"]}
    parts = {"train": sorted(rest), "val": marked["val"], "test": marked["test"]}
    return _completed(table, parts, val, seed, f"official, seed {seed}")


def _check(seed: int, *shares: float) -> None:
    if seed < 0 or not all(0 < share < 1 for share in shares):
        shown = ", ".join(f"{share:g}" for share in shares)
        msg = f"seed {seed}, shares {shown}: a seed is 0 or more, a share between 0 and 1"
        raise UsageError(msg)


def _groups(table: LabelTable, rows: Iterable[Row], by: By) -> dict[str, Counts]:
    """Return what may not be torn, sorted by name, each with its patients per class [c]."""
    label: dict[str, int] = {}
    home: dict[str, str] = {}
    for row in rows:
        label[row.case] = max(label.get(row.case, 0), table.index(row))
        name = _group(row, by)
        if name is None:
            msg = f"{table.source}: slide {row.slide} has no site; give every row one"
            raise DataError(msg)
        if home.setdefault(row.case, name) != name:
            msg = f"{table.source}: patient {row.case} has slides of two sites; split by patient"
            raise DataError(msg)
    one_hot = np.eye(len(table.classes))
    groups = {name: np.zeros(len(table.classes)) for name in sorted(set(home.values()))}
    for case, name in home.items():
        groups[name] += one_hot[label[case]]
    return groups


def _group(row: Row, by: By) -> str | None:
    return row.case if by == "patient" else row.site


def _draw(
    groups: Mapping[str, Counts], share: float, rng: np.random.Generator, by: By, *, keep: int = 1
) -> set[str]:
    """Return the names of about `share` of the patients of each class.

    At least one patient of a class is wanted in the draw, and `keep` outside it.
    """
    total = sum(groups.values(), np.zeros(1))
    wanted = np.clip(share * total, np.minimum(total, 1), np.maximum(total - keep, 0))
    dealt = _deal(groups, np.stack([wanted, total - wanted]), rng, by)
    return {name for name, part in dealt.items() if part == 0}


def _deal(
    groups: Mapping[str, Counts], targets: Counts, rng: np.random.Generator, by: By
) -> dict[str, int]:
    """Deal groups to parts so that the counts come near `targets` [p, c], in squared shares.

    Each group goes where it helps most. For patients one pass leaves every count less than
    one from its target, as a part only takes a patient while it lacks the most of that
    class. Sites are then moved while that helps, and all that is tried in several orders.
    """
    names, counts = list(groups), np.array(list(groups.values()))
    scale = 1 / np.maximum(counts.sum(0), 1)
    trials, passes = (SITE_TRIALS, SITE_PASSES) if by == "site" else (1, 1)
    best, cheapest = np.zeros(len(names), int), np.inf
    for _ in range(trials):
        have, dealt = np.zeros_like(targets), np.full(len(names), -1)
        order = rng.permutation(len(names))
        for i in np.tile(order, passes):
            if dealt[i] >= 0:
                have[dealt[i]] -= counts[i]
            gap = (have - targets) * scale
            dearer = ((gap + counts[i] * scale) ** 2 - gap**2).sum(1)
            dearer -= _EMPTY * ((have == 0) & (counts[i] > 0)).sum(1)
            dealt[i] = np.lexsort((have.sum(1), dearer))[0]
            have[dealt[i]] += counts[i]
        cost = float((((have - targets) * scale) ** 2).sum() + _EMPTY * (have == 0).sum())
        if cost < cheapest:
            best, cheapest = dealt, cost
    return dict(zip(names, best.tolist(), strict=True))


def _split(
    table: LabelTable, by: By, val: Collection[str], test: Collection[str], name: str
) -> Split:
    parts: dict[str, list[str]] = {part: [] for part in PARTS}
    for row in table.rows:
        group = _group(row, by)
        parts["test" if group in test else "val" if group in val else "train"].append(row.slide)
    return _guarded(table, parts, name, ())


def _completed(
    table: LabelTable,
    parts: dict[str, list[str]],
    val: float,
    seed: int,
    name: str,
    *,
    warnings: tuple[str, ...] = (),
) -> Split:
    """Return the split of `parts`, its val drawn by patient from train if it has none."""
    if not parts["val"]:
        rows = [table.by_slide[slide] for slide in parts["train"]]
        groups = _groups(table, rows, "patient")
        drawn = _draw(groups, val, np.random.default_rng(seed), "patient")
        parts = parts | {
            "val": [row.slide for row in rows if row.case in drawn],
            "train": [row.slide for row in rows if row.case not in drawn],
        }
    return _guarded(table, parts, name, warnings)


def _guarded(
    table: LabelTable, parts: Mapping[str, Iterable[str]], name: str, warnings: tuple[str, ...]
) -> Split:
    train, val, test = (tuple(sorted(parts[part])) for part in PARTS)
    split = Split(train, val, test, name, warnings)
    for part, slides in split.parts().items():
        present = {table.by_slide[slide].label for slide in slides}
        for label in table.needed:
            if label not in present:
                msg = f"{table.source}: {name}: {table.lacking(label, part)}"
                raise DataError(msg)
    return split


# --- leaks -------------------------------------------------------------------------------


def check_leaks(
    split: Split, table: LabelTable, *, allow: bool, by: By = "patient"
) -> tuple[str, ...]:
    """Return warnings on patients (with `by` site: and sites) that two parts share.

    Raises:
        DataError: test shares one with train or val, and `allow` is False.
    """
    warnings: tuple[str, ...] = ()
    kinds: tuple[By, ...] = ("patient", "site") if by == "site" else ("patient",)
    for kind in kinds:
        train, val, test = (
            {group for slide in slides if (group := _group(table.by_slide[slide], kind))}
            for slides in split.parts().values()
        )
        leak = sorted(test & (train | val), key=natural)
        told = counted(f"{kind}s in test and in train or val", leak)
        if leak and not allow:
            msg = f"{split.name}: {told[0]}; mend the split, or accept it: data.allow_leak=true"
            raise DataError(msg)
        shared = sorted(train & val, key=natural)
        warnings += (*told, *counted(f"{kind}s in both train and val", shared))
    return warnings


# --- read --------------------------------------------------------------------------------


def read_split(
    path: Path | str, table: LabelTable, *, fold: int = 0, seed: int = 0, val: float = 0.1
) -> Split:
    """Return a split that somebody else made.

    Known forms: CLAM's `splits_<i>.csv` (columns train, val, test of slide ids) and
    `splits_<i>_bool.csv`, TransMIL's fold (the same with columns of labels between), ACMIL's
    JSON (`train_names`, `val_names`, `test_names`), STAMP's `splits.json` (`splits`, each with
    `train_patients` and `test_patients`), of which `fold` picks one, from 0; a file with one
    split gives it whatever `fold` is.
    Where the file has no validation slides, `val` of its training patients are drawn by `seed`.

    Raises:
        DataError: no such form; a slide that is listed twice or is not in the table; a class
            that is missing from a part.
        UsageError: no such fold, or as `monte_carlo`.
    """
    _check(seed, val)
    path = Path(path)
    folds = _json_folds(path, table) if path.suffix.lower() == ".json" else [_sheet_fold(path)]
    fold = 0 if len(folds) == 1 else fold
    if not 0 <= fold < len(folds):
        msg = f"{path}: fold {fold} was asked for, the file has {len(folds)}, counted from 0"
        raise UsageError(msg)
    parts = {part: [slide_name(slide) for slide in folds[fold][part]] for part in PARTS}
    listing = Counter(slide for slides in parts.values() for slide in slides)
    for fault, slides in (
        ("slides listed twice", [slide for slide, n in listing.items() if n > 1]),
        (f"slides that {table.source} does not have", listing.keys() - table.by_slide.keys()),
    ):
        if slides:
            msg = f"{path}: {counted(fault, sorted(slides, key=natural))[0]}"
            raise DataError(msg)
    unused = sorted(table.by_slide.keys() - listing.keys(), key=natural)
    warnings = counted(f"slides of {table.source} that the split leaves out", unused)
    name = path.name if len(folds) == 1 else f"{path.name}, fold {fold} of {len(folds)}"
    return _completed(table, parts, val, seed, name, warnings=warnings)


def file_of(splits: Path, seed: int) -> Path:
    """Return the split file of a seed: the file itself, or the one that ends in the seed.

    Raises:
        DataError: the folder has none, or several.
    """
    if not splits.is_dir():
        return splits
    files = sorted(p for p in splits.iterdir() if p.suffix.lower() in {".csv", ".json"})
    mine = [
        p
        for p in files
        if re.search(r"\d+", p.stem) and int(re.findall(r"\d+", p.stem)[-1]) == seed
    ]
    if len(mine) != 1:
        msg = f"{splits}: {len(mine)} split files end in _{seed}, one is needed a seed"
        raise DataError(msg)
    return mine[0]


def _sheet_fold(path: Path) -> dict[str, list[str]]:
    sheet = read_sheet(path)
    columns = {part: sheet.column((part,)) for part in PARTS}
    cells = {part: [line[i] for _, line in sheet.lines] for part, i in columns.items()}
    if {text.lower() for texts in cells.values() for text in texts} <= {"true", "false"}:
        slides = [line[0] for _, line in sheet.lines]
        flags = cells.items()
        return {
            part: [
                slide for slide, text in zip(slides, texts, strict=True) if text.lower() == "true"
            ]
            for part, texts in flags
        }
    return {part: [text for text in texts if text] for part, texts in cells.items()}


def _json_folds(path: Path, table: LabelTable) -> list[dict[str, list[str]]]:
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
        if "splits" not in value:
            return [{part: _names(value[f"{part}_names"]) for part in PARTS}]
        train = [_names(split["train_patients"]) for split in value["splits"]]
        test = [_names(split["test_patients"]) for split in value["splits"]]
    except FileNotFoundError as error:
        msg = f"{path}: no such file"
        raise DataError(msg) from error
    except (ValueError, KeyError, TypeError) as error:
        msg = f"{path}: neither ACMIL's split nor STAMP's splits.json ({error!r})"
        raise DataError(msg) from error
    slides: dict[str, list[str]] = {}
    for row in table.rows:
        slides.setdefault(row.case, []).append(row.slide)
    if unknown := {case for cases in train + test for case in cases} - slides.keys():
        what = f"patients that {table.source} does not have"
        msg = f"{path}: {counted(what, sorted(unknown, key=natural))[0]}"
        raise DataError(msg)
    return [
        {
            "train": [slide for case in trained for slide in slides[case]],
            "val": [],
            "test": [slide for case in tested for slide in slides[case]],
        }
        for trained, tested in zip(train, test, strict=True)
    ]


def _names(value: Any) -> list[str]:  # noqa: ANN401 - whatever the file holds
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        msg = "not a list of names"
        raise TypeError(msg)
    return value

"""A data set's folder in, its labelled images out: labels.csv, its own layout, or class folders.

labels.csv (image,label[,group][,split]) goes before the set's own layout, class folders come
last. What cannot be used is counted by reason, never passed over in silence.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from pathcli.data.classes import (
    NAMES,
    Arrays,
    ClassSet,
    FileNames,
    Folders,
    Table,
    class_set,
    class_set_of,
)
from pathcli.data.layouts import (
    ALL,
    Row,
    array_rows,
    class_folders,
    file_names,
    own_table,
    spelt,
    table_rows,
)
from pathcli.errors import DataError, ResourceError, UsageError
from pathcli.registry import did_you_mean
from pathcli.types import Sample, digest

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

LABELS = "labels.csv"


@dataclass(frozen=True)
class Labelled:
    """Labelled images, a sample each: `name` is its path in the set, `label` its class's key.

    `splits` has a name for each sample, "" where nobody says; train, val and test are spelt so
    whatever the set calls them. `dropped` counts rows left out, by reason; `source` says which
    table, layout or folders gave the labels.
    """

    samples: tuple[Sample, ...]
    splits: tuple[str, ...]
    dropped: Mapping[str, int]
    warnings: tuple[str, ...]
    source: str

    @cached_property
    def digest(self) -> str:
        """Return 12 hex digits over names, labels, groups and splits, whatever their order."""
        rows = zip(self.samples, self.splits, strict=True)
        return digest(sorted([s.name, s.label, s.group, split] for s, split in rows))


def open_dataset(
    name: str,
    data: Path | str | None = None,
    *,
    labels: Path | str | None = None,
    split: str | None = None,
) -> tuple[ClassSet, Labelled]:
    """Return a data set's classes and its images.

    Args:
        name: a name we know or a YAML file, with `data`; or a folder or a table of one's own,
            whose labels are the classes (`./bach` where a folder is called as a set we know).
        data: the folder of the images (default for one's own: `name`, or the table's folder).
        labels: as `read_labelled` takes it.
        split: as `read_labelled` takes it.

    Raises:
        UsageError: no set is called `name`, or it is one that needs `data`.
        DataError, ResourceError: as `read_labelled`.
    """
    own = Path(name)
    if own.suffix.lower() in {".csv", ".tsv", ".xlsx"}:
        folder, labels = Path(data or own.parent), labels or own
    elif name not in NAMES and own.is_dir():
        folder = Path(data or own)
    else:
        classes = class_set(name)
        if data is None:
            msg = f"{name}: where is it? give --data DIR; {classes.get or 'the folder of images'}"
            raise UsageError(msg)
        return classes, read_labelled(classes, data, split=split, labels=labels)
    table = Path(labels) if labels else folder / LABELS
    rows = own_table(table, folder) if labels or table.is_file() else class_folders(folder, {})
    classes = class_set_of((row.label for row in rows if row.label), folder.resolve().name)
    return classes, read_labelled(classes, folder, split=split, labels=labels)


def read_labelled(
    classes: ClassSet,
    folder: Path | str,
    *,
    split: str | None = None,
    labels: Path | str | None = None,
) -> Labelled:
    """Return the labelled images below a folder.

    Args:
        classes: the classes and the layout.
        folder: where the set is.
        split: the part to take: a name, or "all" (default: the set's own choice, else all).
        labels: a table of images below `folder`, used instead of its labels.csv.

    Raises:
        ResourceError: no such folder, or neither labels nor the set's own files are in it.
        DataError: a table is wrong, an image has two labels, or nothing is left.
        UsageError: no image is of the split asked for.
    """
    folder = Path(folder)
    if not folder.is_dir():
        msg = f"{folder}: no such folder; it should hold {classes.title}"
        raise ResourceError(msg)
    wanted = spelt(classes.split if split is None else split)
    source, rows = _rows(classes, folder, Path(labels) if labels else None, wanted)
    rows, notes = _of_split(classes, rows, wanted, must=split is not None)
    kept, dropped = _usable(classes, rows)
    if not kept:
        why = ", ".join(f"{what}: {n}" for what, n in dropped.items()) or "there is none"
        msg = f"{source}: no image of {classes.title} can be used ({why})"
        raise DataError(msg)
    samples = tuple(Sample(r.name, (str(r.path),), label=r.label, group=r.group) for r in kept)
    notes = (*notes, *_remarks(classes, samples))
    return Labelled(samples, tuple(r.split for r in kept), dropped, notes, source)


def _rows(
    classes: ClassSet, folder: Path, labels: Path | None, wanted: str
) -> tuple[str, list[Row]]:
    """Return where the labels are from, and what it says of each image.

    Raises:
        ResourceError: nothing here says what an image is.
    """
    table = labels or folder / LABELS
    if labels or table.is_file():
        return str(table), own_table(table, folder)
    layout, rows = classes.layout, []
    if isinstance(layout, Table):
        rows = list(table_rows(layout, folder, classes))
    elif isinstance(layout, FileNames):
        rows = list(file_names(layout, folder))
    elif isinstance(layout, Arrays):
        rows = list(array_rows(layout, folder, wanted))
    if rows and layout:
        return f"{folder} ({layout.kind})", rows
    rows = class_folders(folder, layout.splits if isinstance(layout, Folders) else {})
    if any(classes.key_of(row.label) for row in rows):
        return f"{folder} (folders)", rows
    wants = f"; to get it: {classes.get}" if classes.get else ""
    msg = (
        f"{folder}: neither {LABELS} nor the files of {classes.title} nor folders called "
        f"{', '.join(classes.keys[:3])}...{wants}"
    )
    raise ResourceError(msg)


def _of_split(
    classes: ClassSet, rows: list[Row], wanted: str, *, must: bool
) -> tuple[list[Row], tuple[str, ...]]:
    """Return the rows of a split; all of them, with a warning, where nobody asked for one."""
    if wanted in {"", ALL}:
        return rows, ()
    known = sorted({row.split for row in rows if row.split})
    if not known and not must:
        note = f"nobody says which images are of split {wanted}, so all are taken"
        return rows, (note,)
    if wanted not in known:
        hint = did_you_mean(wanted, [*known, ALL]) if known else "no image has one; leave it out"
        msg = f"--split: {classes.title} has no split {wanted!r} here: {hint}"
        raise UsageError(msg)
    return [row for row in rows if row.split == wanted], ()


def _usable(classes: ClassSet, rows: Sequence[Row]) -> tuple[list[Row], dict[str, int]]:
    """Return the rows with the key of their class, each image once, and the rest by reason.

    Raises:
        DataError: an image has two labels.
    """
    kept: dict[Path, Row] = {}
    dropped: Counter[str] = Counter()
    for row in rows:
        key = classes.key_of(row.label)
        if row.fault:
            dropped[row.fault] += 1
        elif not row.label:
            dropped["no label"] += 1
        elif key is None:
            dropped[f"label {row.label!r} is no class of {classes.name}"] += 1
        elif not row.path.is_file():
            dropped["no such file"] += 1
        elif row.path not in kept:
            kept[row.path] = Row(row.name, row.path, key, row.group, row.split)
        elif kept[row.path].label == key:
            dropped["listed again"] += 1
        else:
            msg = f"{row.path}: has two labels, {kept[row.path].label} and {key}; keep one"
            raise DataError(msg)
    return list(kept.values()), dict(dropped)


def _remarks(classes: ClassSet, samples: Sequence[Sample]) -> Iterator[str]:
    """Yield what the user should know of the images that are left."""
    bare = sum(not s.group for s in samples)
    if bare == len(samples):
        yield (
            "no groups are known (patient, slide, original tile): each image counts as "
            "independent, so intervals are too narrow where some belong together; a labels.csv "
            "with a column group says so"
        )
    elif bare:
        yield f"{bare} of {len(samples)} images have no group; each of them counts by itself"
    there = {s.label for s in samples}
    if absent := [key for key in classes.keys if key not in there]:
        yield f"no image is of class {', '.join(absent)}"

"""A label table and the store in, bags out: which slides are used, and why others are not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Literal, overload

import numpy as np

from pathcli.encoders.embedding import Embedder
from pathcli.errors import DataError, ResourceError, UsageError
from pathcli.mil.benchmarks import benchmark
from pathcli.mil.splits import (
    Split,
    check_leaks,
    file_of,
    k_fold,
    monte_carlo,
    official,
    read_split,
)
from pathcli.mil.tables import LabelTable, Row, counted, mixed, read_labels
from pathcli.slides.discovery import discover
from pathcli.store.store import item_name
from pathcli.types import Bag, Progress, TileStatus

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from pathcli.slides.discovery import Found
    from pathcli.store import Store
    from pathcli.types import Encoder, Key, TileSpec

_OPEN = 256  # bags mapped at a time, each an open file

Started = Callable[[str], Progress]
"""Called with the name of a part of the work; gives that part's progress callback."""

BagKind = Literal["slide", "patient"]


class BagData:
    """Where labels, splits and slides of a MIL recipe come from: `data: {kind: bags, ...}`."""

    def __init__(
        self,
        *,
        slides: Path | None = None,
        benchmark: str | None = None,
        labels: Path | None = None,
        target: str | None = None,
        slide_table: Path | None = None,
        classes: Mapping[str, str] | None = None,
        splits: Path | None = None,
        split: Literal["official", "monte-carlo", "k-fold"] | None = None,
        val: float = 0.1,
        test: float = 0.2,
        folds: int = 5,
        by: Literal["patient", "site"] = "patient",
        bag: BagKind = "slide",
        allow_leak: bool = False,
    ) -> None:
        """Keep the settings; files are read by `table`.

        Args:
            slides: folder or list of slides; without it features are looked up in the store.
            benchmark: a published cohort, whose labels and test split we know.
            labels: a label table of one's own (see `read_labels`), or the benchmark's where
                its organisers alone may give it out.
            target: the label's column, when the table is a clinical one of STAMP's form.
            slide_table: STAMP's table of slides and patients.
            classes: labels as the table has them -> names of classes, in rising order: of two
                classes the last is the positive one (default: natural order of the labels).
            splits: a split file, or a folder with one file a seed.
            split: how to split without files (default: official for a benchmark, else
                monte-carlo). With k-fold, seed s is fold s of one partition.
            val: share of the training patients that choose epoch and learning rate.
            test: share of the patients held out by monte-carlo.
            folds: number of folds of k-fold.
            by: what a split keeps whole: patients, or whole sites.
            bag: one bag a slide, or one a patient with all its slides.
            allow_leak: only warn of patients in both test and train.

        Raises:
            UsageError: neither `benchmark` nor `labels`, or a number out of its range.
        """
        if benchmark is None and labels is None:
            msg = "data.benchmark or data.labels is needed, a table case_id,slide_id,label"
            raise UsageError(msg)
        wrong = [
            f"{n} is a share above 0 and below 1"
            for n, x in (("val", val), ("test", test))
            if not 0 < x < 1
        ]
        if wrong or folds < 2:  # noqa: PLR2004 - one fold has nothing to train on
            raise UsageError(", ".join(wrong or ["folds must be at least 2"]))
        self.slides, self.benchmark, self.labels = slides, benchmark, labels
        self.target, self.slide_table, self.classes = target, slide_table, classes
        self.splits, self.val, self.test, self.folds = splits, val, test, folds
        self.split = split or ("official" if benchmark else "monte-carlo")
        self.by, self.bag, self.allow_leak = by, bag, allow_leak
        self._table: LabelTable | None = None
        self._outcome: Callable[[BagData], LabelTable] | None = None

    def of(self, outcome: Callable[[BagData], LabelTable]) -> BagData:
        """Return these data with the table that an outcome reads instead of one of classes."""
        other = copy(self)
        other._table, other._outcome = None, outcome  # noqa: SLF001 - its own class
        return other

    @property
    def table(self) -> LabelTable:
        """The label table, read once."""
        if self._table is None and self._outcome:
            self._table = self._outcome(self)
        if self._table is None:
            if self.benchmark:
                known = benchmark(self.benchmark, self.labels, classes=self.classes)
                self._table = known.need_table()
            else:
                self._table = read_labels(
                    self.labels,  # type: ignore[arg-type]  # one of the two is given
                    classes=self.classes,
                    slides=self.slide_table,
                    target=self.target,
                )
            self._refuse_unordered(self._table)
        return self._table

    def _refuse_unordered(self, table: LabelTable) -> None:
        """Refuse a patient of two labels whose order nobody gave: the higher one would count.

        Raises:
            DataError: bags are patients, and the classes are in alphabetical order.
        """
        if self.bag != "patient" or self.classes or self.benchmark:
            return
        if torn := mixed(table.rows):
            msg = (
                f"{table.source}: {counted('patients have slides of different labels', torn)[0]}; "
                "a patient has the highest label of its slides: give data.classes in rising order, "
                f"--set 'data.classes={{{', '.join(f'{c}: {c}' for c in table.classes)}}}'"
            )
            raise DataError(msg)

    def check_seeds(self, seeds: Sequence[int]) -> list[str]:
        """Return a warning when seeds leave folds out; with k-fold, seeds are folds.

        Raises:
            UsageError: two seeds mean the same fold.
        """
        if self.split != "k-fold" or self.splits is not None:
            return []
        folds = {(seed - 1) % self.folds for seed in seeds}
        if len(folds) < len(seeds):
            every = list(range(1, self.folds + 1))
            msg = f"k-fold: seed s is fold s of data.folds={self.folds}, so set train.seed={every}"
            raise UsageError(msg)
        left = self.folds - len(folds)
        return [f"k-fold: {left} of {self.folds} folds are not run"] if left else []

    def partition(self, seed: int) -> Split:
        """Return train, val and test slides of one seed, with its warnings.

        Raises:
            DataError: the split file and the table do not fit, a class is missing in a part,
                or a patient is in both test and train or val.
        """
        split = self._split(seed)
        leaks = check_leaks(split, self.table, allow=self.allow_leak, by=self.by)
        return replace(split, warnings=(*split.warnings, *leaks))

    def _split(self, seed: int) -> Split:
        if self.splits is not None:
            path = file_of(self.splits, seed)
            return read_split(path, self.table, fold=seed - 1, seed=seed, val=self.val)
        if self.split == "official":
            return official(self.table, seed=seed, val=self.val)
        if self.split == "k-fold":
            fold = (seed - 1) % self.folds
            return k_fold(self.table, folds=self.folds, fold=fold, seed=0, val=self.val, by=self.by)
        return monte_carlo(self.table, seed=seed, val=self.val, test=self.test, by=self.by)

    def cohort(
        self,
        store: Store,
        encoder: Encoder,
        spec: TileSpec,
        *,
        device: str = "auto",
        progress: Started | None = None,
    ) -> Cohort:
        """Return which slides of the table have features, making them where slides are given."""
        if self.slides is None:
            return look_up(self.table, store, encoder.id, spec)
        return make(
            self.table,
            discover([str(self.slides)]),
            Embedder(encoder, store, device=device),
            spec,
            progress,
        )


@dataclass(frozen=True)
class Cohort:
    """The slides of a table: the store's keys of those that are used, why others are not."""

    table: LabelTable
    store: Store
    keys: Mapping[str, Key]
    missing: Mapping[str, str]


def look_up(table: LabelTable, store: Store, encoder: str, spec: TileSpec) -> Cohort:
    """Find the table's slides in the store by name.

    Raises:
        ResourceError: none of them is there.
    """
    having: dict[str, list[Key]] = {}
    for key in store.features.having(encoder, spec.digest):
        having.setdefault(key.item.rpartition("-")[0], []).append(key)
    keys, missing = {}, {}
    names = {row.slide: item_name(row.slide, "").removesuffix("-") for row in table.rows}
    alike = Counter(names.values())
    for row in table.rows:
        found = having.get(names[row.slide], [])
        if found and alike[names[row.slide]] > 1:
            told = f"{alike[names[row.slide]]} slides of the table have this name in the store"
            missing[row.slide] = f"{told} ({names[row.slide]})"
        elif len(found) == 1:
            keys[row.slide] = found[0]
        elif found:
            items = ", ".join(key.stem for key in found[:3])
            missing[row.slide] = f"{len(found)} slides of this name are in the store ({items})"
        else:
            missing[row.slide] = "no features in the store"
    doubtful = [why for why in missing.values() if why != "no features in the store"]
    if not keys and doubtful:
        msg = f"none of the slides of {table.source} can be used; {doubtful[0]}; name the slides"
        raise ResourceError(msg)
    if not keys:
        name, _, weights = encoder.rpartition("-")
        how = "store import" if weights == "imported" else f"embed DIR --encoder {name}"
        msg = f"none of the {len(table.rows)} slides of {table.source} has features of {encoder} "
        msg += f"(tiles of {spec.size_px} px at {spec.mpp:g} um per pixel) in {store.root}; "
        msg += "name the slides (train: --set data.slides=DIR, mil-eval: --slides DIR), "
        msg += f"or first run: pathcli {how}"
        raise ResourceError(msg)
    return Cohort(table, store, keys, missing)


def make(
    table: LabelTable,
    found: Sequence[Found],
    embedder: Embedder,
    spec: TileSpec,
    progress: Started | None = None,
) -> Cohort:
    """Embed the table's slides, or find them done; what fails is missing, and named.

    Raises:
        DataError: there are no slides in the folder.
        ResourceError: the folder, the weights or the device are not here, or no slide can be used.
    """
    files: dict[str, list[Found]] = {}
    if len(found) == 1:
        path = found[0].checked().path
        if isinstance(path, Path) and not path.exists():
            msg = f"{path}: no such folder or list; name the folder of the slides"
            raise ResourceError(msg)
    for slide in found:
        files.setdefault(PurePath(str(slide.path)).stem, []).append(slide)
    keys: dict[str, Key] = {}
    missing: dict[str, str] = {}
    embedder.load()
    for number, row in enumerate(table.rows, start=1):
        mine = files.get(row.slide, [])
        if len(mine) != 1:
            missing[row.slide] = (
                f"{len(mine)} files of this name" if mine else "no file of this name"
            )
            continue
        step = progress(f"{number}/{len(table.rows)} {row.slide}") if progress else None
        try:
            slide = mine[0].checked()
            run = embedder(slide.path, spec=spec, mpp=slide.mpp, mpp_source="csv", progress=step)
        except (DataError, ResourceError) as error:
            missing[row.slide] = str(error)
            continue
        if run.tiles > run.unreadable:
            keys[row.slide] = run.key
        else:
            missing[row.slide] = "no tile on tissue"
    if not keys:
        why = Counter(missing.values()).most_common(1)[0][0]
        msg = f"none of the {len(table.rows)} slides of {table.source} can be used; mostly: {why}"
        raise ResourceError(msg)
    return Cohort(table, embedder.store, keys, missing)


class Bags(Sequence[Bag]):
    """Bags of the named slides, mapped from the store: the page cache keeps them in memory."""

    def __init__(self, cohort: Cohort, slides: Sequence[str], kind: BagKind = "slide") -> None:
        """Group the slides that have features, by slide or by patient, in the given order."""
        rows = {row.slide: row for row in cohort.table.rows}
        groups: dict[str, list[Row]] = {}
        for slide in slides:
            if slide in cohort.keys:
                row = rows[slide]
                groups.setdefault(row.case if kind == "patient" else slide, []).append(row)
        self._groups, self._cohort = list(groups.items()), cohort
        self._entry = lru_cache(maxsize=_OPEN)(cohort.store.features.mapped)

    def __len__(self) -> int:
        """Return the number of bags."""
        return len(self._groups)

    @property
    def labels(self) -> NDArray[np.int64]:
        """Class index of each bag, int64 [n]; a patient has the highest of its slides."""
        return np.array([self._label(rows) for _, rows in self._groups], np.int64)

    @property
    def rows(self) -> list[Row]:
        """The first row of each bag."""
        return [rows[0] for _, rows in self._groups]

    @property
    def names(self) -> list[str]:
        """Slide or patient of each bag."""
        return [name for name, _ in self._groups]

    @property
    def patients(self) -> list[str]:
        """Patient of each bag."""
        return [rows[0].case for _, rows in self._groups]

    @property
    def sites(self) -> list[str | None]:
        """Site of each bag, None where the table has none."""
        return [rows[0].site for _, rows in self._groups]

    @property
    def dim(self) -> int:
        """Length of a feature vector, read from the first bag alone.

        Raises:
            DataError: the features are tokens, which no head here reads.
        """
        store, key = self.source(self._groups[0][1][0].slide)
        shape, _ = store.features.shape(key)
        if len(shape) != 1:
            msg = f"MIL heads read one vector per tile, these features are tokens {shape}"
            raise DataError(msg)
        return shape[0]

    def source(self, slide: str) -> tuple[Store, Key]:
        """Return the store and the key of a slide's features."""
        return self._cohort.store, self._cohort.keys[slide]

    def _label(self, rows: list[Row]) -> int:
        classes = self._cohort.table.classes
        return max(classes.index(row.label) if row.label is not None else -1 for row in rows)

    @overload
    def __getitem__(self, index: int) -> Bag: ...
    @overload
    def __getitem__(self, index: slice) -> list[Bag]: ...
    def __getitem__(self, index: int | slice) -> Bag | list[Bag]:
        """Return a bag without unreadable tiles."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        name, rows = self._groups[index]
        parts = [self._features(row.slide) for row in rows]
        label = self._label(rows)
        counts = [len(values) for values, _ in parts]
        return Bag(
            name=name,
            patient=rows[0].case,
            label=None if label < 0 else label,
            slides=tuple(row.slide for row in rows),
            features=parts[0][0] if len(parts) == 1 else np.concatenate([v for v, _ in parts]),
            xy=np.concatenate([xy for _, xy in parts]),
            slide_of=np.repeat(np.arange(len(parts), dtype=np.int32), counts),
        )

    def _features(self, slide: str) -> tuple[NDArray[np.float16], NDArray[np.int32]]:
        entry = self._entry(self._cohort.keys[slide])
        good = entry.status == TileStatus.OK
        return (entry.values[:], entry.xy) if good.all() else (entry.values[good], entry.xy[good])

"""What of a store goes into a peer's files: entries chosen, named as the peer names slides."""

from __future__ import annotations

from collections import Counter, defaultdict
from contextlib import AbstractContextManager
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, Self

from pathcli.errors import DataError, UsageError
from pathcli.registry import did_you_mean
from pathcli.store.peers import formats
from pathcli.store.peers.parcel import Outgoing, record_of
from pathcli.store.store import item_name
from pathcli.types import WHOLE, Key, TileStatus

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path
    from types import TracebackType

    from pathcli.store import Store
    from pathcli.types import Tiles

_SHOWN = 5


class Export(AbstractContextManager["Export"]):
    """Entries of one encoder and one specification, written slide by slide.

    `names` are the slides chosen, as the files will call them.
    """

    def __init__(
        self,
        store: Store,
        form: str,
        out: Path,
        slides: Sequence[str] = (),
        *,
        encoder: str | None = None,
        tiles: str | None = None,
        overwrite: bool = False,
        labels: Mapping[str, int] | None = None,
        scores: Path | None = None,
    ) -> None:
        """Choose; nothing is read of features or written.

        Args:
            store: what to export from.
            form: a name of `formats.FORMATS`.
            out: folder to write to.
            slides: items, names or files of slides (default: all).
            encoder: id, or its name where the store has one of that name.
            tiles: digest of the tile specification.
            overwrite: replace files that are there already.
            labels: class index by slide, for ACMIL.
            scores: table of measurements, for GeoJSON.

        Raises:
            UsageError: an unknown format, several encoders or specifications to choose from, or
                `out` is a file.
            DataError: no features, or no such slide.
        """
        own = form == "acmil" and out.suffix == ".h5"  # one file of all slides
        if file := next((p for p in (out, *out.parents)[own:] if p.is_file()), None):
            msg = f"{file}: a file; OUT is a folder, there already or not; give another"
            raise UsageError(msg)
        self.store, self.out, self.overwrite = store, out, overwrite
        self._form = formats.of(form)
        self._more: dict[str, Any] = {"labels": labels, "scores": scores}
        self._labels = labels
        self._cards = store.slides()
        every = [key for key in store.features if key.tiles != WHOLE.digest]
        kept = _of_tiles(store, _of_encoder(store, every, encoder), tiles)
        self._keys = self._named(_of_slides(kept, self._cards, slides))

    @property
    def names(self) -> tuple[str, ...]:
        """The slides, as the files call them."""
        return tuple(self._keys)

    def _named(self, keys: Sequence[Key]) -> dict[str, Key]:
        """Return keys by a name of their own: two slides of one name get their items'."""
        plain = [slide_name(key, self._cards) for key in keys]
        names, items = Counter(plain), Counter(key.item for key in keys)
        self.alike = {name for name, count in names.items() if count > 1}
        return {
            name if names[name] == 1 else key.item if items[key.item] == 1 else key.stem: key
            for name, key in zip(plain, keys, strict=True)
        }

    def __enter__(self) -> Self:
        """Begin to write.

        Raises:
            DataError: the table of scores is wrong.
            UsageError: the one file of all slides is there already.
        """
        self._writing = self._form.writer(self.out, **self._more)
        self._write = self._writing.__enter__()
        self._begun: set[Path] = set()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Finish what is written for all slides together."""
        self._writing.__exit__(kind, error, trace)

    def __call__(self, name: str) -> dict[str, Any]:
        """Write one slide; return what was done as plain JSON values.

        Raises:
            DataError: a file is there already, the entry is damaged, or its rows are tokens.
            ResourceError: no space, or no permission.
        """
        key = self._keys[name]
        one, record, warnings = self._read(name, key)
        places = self._form.places(self.out, one)
        there = self._is_there(places, one, record)
        if not there:
            self._write(one, record)
            self._begun.update(places)
        return {
            "path": str(places[0]),
            "slide": name,
            "item": key.item,
            "encoder": one.encoder,
            "tiles_digest": key.tiles,
            "tiles": len(one.values),
            "length": int(one.values.shape[1]),
            "dropped": one.dropped,
            "written": not there,
            "warnings": warnings,
        }

    def _read(self, name: str, key: Key) -> tuple[Outgoing, str | None, list[str]]:
        shape = self.store.features.shape(key)[0]
        if len(shape) != 1:  # before they are read: tokens are many
            msg = f"{key.item}: its features are tokens {shape} a tile; peers read a vector a tile"
            raise DataError(msg)
        tiles, features = self._tiles(key), self.store.features[key]
        values = features.values
        good = features.status == TileStatus.OK
        if not good.any():
            msg = f"{key.item}: not one of its {len(good)} tiles could be read"
            raise DataError(msg)
        card = self._cards.get(key.item, {})
        one = Outgoing(name, key, tiles, values[good], features.xy[good], card, int((~good).sum()))
        shown = self._form.shown(one)
        record = record_of(key, tiles, features.status, card, shown)
        warnings = []
        if one.dropped:
            warnings.append(f"{one.dropped} unreadable tiles are left out")
        if record is None:
            warnings.append("too many tiles are left out for an import to know them again")
        if slide_name(key, self._cards) in self.alike:
            warnings.append("another slide has this name: the store's own is used")
        if self._labels is not None and name not in self._labels:
            warnings.append("no label in --labels")
        return one, record, warnings

    def _tiles(self, key: Key) -> Tiles:
        try:
            return self.store.tiles[Key(key.item, key.mpp, key.tiles)]
        except KeyError:
            msg = f"{key.item}: the store has its features, not its tiles; run pathcli tile again"
            raise DataError(msg) from None

    def _is_there(self, places: Sequence[Path], one: Outgoing, record: str | None) -> bool:
        """Tell whether these very files were written before.

        Raises:
            DataError: others are there, and may not be replaced.
        """
        there = [path for path in places if path.exists() and path not in self._begun]
        if not there or self.overwrite:
            return False
        whole = len(there) == len(places) and self._form.one_each
        if whole and record and self._form.holds(places, record):
            return True
        agrees = self._form.agrees
        if agrees and places[0] not in there and all(agrees(path, one) for path in there):
            return False  # a stopped run's, or what another encoder shares
        uncompared = {"acmil": " (--overwrite replaces all its slides)", "geojson": ""}
        how = uncompared.get(self._form.name, ", and not the same")
        msg = f"{there[0]}: is there already{how}; give another OUT, or --overwrite"
        raise DataError(msg)


def slide_name(key: Key, cards: Mapping[str, Mapping[str, Any]]) -> str:
    """Return what a slide is called: its file's name where known, else that in its item."""
    card = cards.get(key.item, {})
    stem = PurePath(str(card.get("last_seen", ""))).stem
    if stem and item_name(stem, str(card.get("fingerprint", ""))) == key.item:
        return stem
    return key.item.rpartition("-")[0]


def _of_encoder(store: Store, keys: list[Key], encoder: str | None) -> list[Key]:
    ids = sorted({str(key.encoder) for key in keys})
    if not ids:
        msg = f"{store.root}: no features of slides; run: pathcli embed SLIDES --store {store.root}"
        raise DataError(msg)
    if encoder is None and len(ids) > 1:
        msg = f"{store.root} has features of several encoders; give --encoder: {', '.join(ids)}"
        raise UsageError(msg)
    fit = [i for i in ids if encoder in {None, i}]
    fit = fit or [i for i in ids if i.startswith(f"{encoder}-")]
    if len(fit) != 1:
        many = f"{len(fit)} encoders of {store.root} are called {encoder!r}: {', '.join(fit)}"
        none = f"{store.root} has no features of encoder {encoder!r}: "
        raise UsageError(many if fit else none + did_you_mean(str(encoder), ids))
    return [key for key in keys if key.encoder == fit[0]]


def _of_tiles(store: Store, keys: list[Key], tiles: str | None) -> list[Key]:
    groups: dict[str, list[Key]] = defaultdict(list)
    for key in keys:
        groups[key.tiles].append(key)
    if tiles is None and len(groups) == 1:
        return keys
    fit = [name for name in groups if tiles is not None and name.startswith(tiles)]
    if len(fit) == 1:
        return groups[fit[0]]
    told = []
    for name, group in groups.items():
        first = Key(group[0].item, group[0].mpp, name)
        spec = store.tiles[first].spec if first in store.tiles else None
        how = f"{spec.size_px} px at {spec.mpp:g} um, {spec.tissue}" if spec else "unknown"
        told.append(f"{name} ({how}; {len(group)} slides)")
    msg = f"{store.root}: give one of these as --tiles: {', '.join(told)}"
    raise UsageError(msg)


def _of_slides(
    keys: list[Key], cards: Mapping[str, Mapping[str, Any]], slides: Sequence[str]
) -> list[Key]:
    if not slides:
        return keys
    called: dict[str, list[Key]] = defaultdict(list)
    for key in keys:
        for name in {key.item, key.stem, slide_name(key, cards), key.item.rpartition("-")[0]}:
            called[name].append(key)
    chosen: dict[Key, None] = {}
    unknown = []
    for text in slides:
        # a name may have dots of its own; a file has a suffix to leave away
        found = called.get(text) or called.get(PurePath(text).stem)
        chosen |= dict.fromkeys(found or ())
        unknown += [] if found else [text]
    if unknown:
        known = sorted({slide_name(key, cards) for key in keys})
        hint = did_you_mean(unknown[0], known[:20])
        msg = f"no features of slide {', '.join(unknown[:_SHOWN])} with these options: {hint}"
        raise DataError(msg)
    return list(chosen)

"""A peer's files into a store: what they say is kept, and what they do not know is marked."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from pathcli.errors import DataError, UsageError
from pathcli.store.int8 import INT8
from pathcli.store.peers import formats
from pathcli.store.peers.parcel import IMPORTED, UNKNOWN, Asked, Restored, restore
from pathcli.store.store import item_name
from pathcli.types import Key, SlideInfo, Tiles, TileStatus

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from pathcli.store import Store
    from pathcli.store.peers.parcel import Incoming, Known
    from pathcli.types import HalfArray

_BLOCK = 4096  # rows written at a time
_LONGEST = 200  # bytes of an encoder's name: folders have 255
_LARGEST = float(np.finfo(np.float16).max)


class Import:
    """Slides of a peer's folder, put into a store one by one; `names` are what is there."""

    def __init__(
        self,
        store: Store,
        form: str,
        path: Path,
        *,
        encoder: str | None = None,
        mpp: float | None = None,
        slide: Callable[[str], Known | None] | None = None,
    ) -> None:
        """Look what there is; nothing is read of features or written.

        Args:
            store: what to import into.
            form: a name of `formats.FORMATS`.
            path: a folder of files, or one file.
            encoder: what to call the encoder (default: as the files do).
            mpp: um per level-0 pixel of the slides, for files that do not say it.
            slide: looks up a slide that is at hand by name; None: there are none.

        Raises:
            UsageError: an unknown format, or one name for several encoders.
            DataError: there is nothing of this format.
        """
        self.store, self._form = store, form
        self._asked = Asked(encoder, mpp, slide)
        if not path.exists():
            msg = f"{path}: no such file or folder"
            raise DataError(msg)
        found = formats.of(form).sources(path, self._asked)
        if not found:
            msg = f"{path}: nothing of format {form} here; give another --format or folder"
            raise DataError(msg)
        self._sources = {source.shown: source for source in found}
        self._cards = store.slides()
        self._length: dict[tuple[str, str], int] = {}
        self._seen: dict[tuple[str, str], str] = {}
        if form == "trident" and encoder:
            self._refuse_several(encoder)

    def _refuse_several(self, encoder: str) -> None:
        from pathcli.store.peers.trident import encoders  # noqa: PLC0415

        several = sorted(encoders(list(self._sources.values())))
        if len(several) > 1:
            msg = f"--encoder {encoder} would name several: {', '.join(several)}; give one's folder"
            raise UsageError(msg)

    @property
    def names(self) -> tuple[str, ...]:
        """What is there, by the names of files below the folder."""
        return tuple(self._sources)

    def __call__(self, name: str) -> dict[str, Any]:
        """Put one slide into the store; return what was done as plain JSON values.

        Raises:
            DataError: the file is cut short, holds something else, or does not fit the others.
            ResourceError: no space, no permission, or another process writes the same entry.
        """
        source = self._sources[name]
        found = source.read()
        restored = restore(found)
        if restored and not found.measured and not str(restored.key.encoder).endswith(INT8):
            entry, warnings = restored, list[str]()
            if self._asked.encoder:
                warnings.append(f"known again as {entry.key.encoder}: --encoder is not used")
        else:
            entry, warnings = self._foreign(found, restored)
            restored = None  # of measurements, the tiles at most
        key = entry.key
        warnings += self._refuse_odd(found.name, key, entry.values.shape[1])
        status = np.where(np.isnan(entry.values).any(1), TileStatus.UNREADABLE, TileStatus.OK)
        new = self._put(entry, status.astype(np.uint8), str(source.path))
        self._remember(entry, found)
        return {
            "path": str(source.path),
            "slide": found.name,
            "item": key.item,
            "encoder": key.encoder,
            "tiles_digest": key.tiles,
            "spec": entry.tiles.spec.to_json(),
            "tiles": len(entry.tiles),
            "length": int(entry.values.shape[1]),
            "unreadable": int((status != TileStatus.OK).sum()),
            "restored": restored is not None,
            "written": new,
            "warnings": warnings,
        }

    # --- what is not pathcli's own -----------------------------------------------------------

    def _foreign(self, found: Incoming, restored: Restored | None) -> tuple[Restored, list[str]]:
        """Return the entry that a file of another tool makes, and what to say of it."""
        encoder = self._encoder(found)
        values, warnings = halves(found.values, str(found.path))
        notes = list(found.notes)
        if found.record and restored is None:
            notes.append("exported by pathcli and changed since: not taken for the original")
        if restored:  # the tiles are known, the values are measurements
            rows = np.full((len(restored.tiles), values.shape[1]), np.nan, np.float16)
            rows[restored.tiles.status == TileStatus.OK] = values
            key = replace(restored.key, encoder=encoder)
            return replace(restored, key=key, values=rows), warnings
        order = np.lexsort((found.xy[:, 0], found.xy[:, 1]))  # by (y, x), as all tiles are
        xy, values = found.xy[order].astype(np.int32), values[order]
        info, size, more = self._slide(found, xy, values)
        says = json.dumps(found.says, sort_keys=True, ensure_ascii=False)
        kept = (f"imported from {self._form}, file {found.path.name}, which says {says}", *notes)
        mpp = float(f"{found.slide_mpp:.6g}")
        tiles = Tiles(
            item=info.item,
            xy=xy,
            status=np.zeros(len(xy), np.uint8),
            spec=found.spec,
            slide_mpp=mpp,
            width=size[0],
            height=size[1],
            tissue_share=0.0,
            warnings=(*kept, *more, "the share of tissue is unknown, 0 stands for it"),
        )
        key = Key(info.item, mpp, found.spec.digest, encoder)
        card = {**asdict(info), "mpp_source": found.mpp_source}
        return Restored(key, tiles, values, card), [*warnings, *notes, *more]

    def _encoder(self, found: Incoming) -> str:
        """Return the id features are kept under: a name and no digest, which nobody knows."""
        name = self._asked.encoder or found.encoder
        if not name:
            msg = f"{found.path}: does not say which encoder its features are of; give --encoder"
            raise DataError(msg)
        readable = re.sub(r"[^\w.-]", "_", name).strip(".").removesuffix(IMPORTED)
        if len(readable.encode()) > _LONGEST:
            msg = f"{found.path}: calls its encoder {name[:40]}..., too long; give --encoder"
            raise DataError(msg)
        return f"{readable or 'unnamed'}{IMPORTED}"

    def _slide(
        self, found: Incoming, xy: NDArray[np.int32], values: HalfArray
    ) -> tuple[SlideInfo, tuple[int, int], list[str]]:
        """Return the slide's card, its size, and what is not known of it."""
        known = self._asked.slide(found.name) if self._asked.slide else None
        side = found.spec.size_um / found.slide_mpp
        far = (xy.max(0) + round(side)).tolist()
        if known:
            size = (known.info.width, known.info.height)
            if found.spec != UNKNOWN and (far[0] > size[0] + side or far[1] > size[1] + side):
                msg = (
                    f"{found.path}: its tiles reach to {far}, beyond {known.path} with "
                    f"{size[0]} x {size[1]} px: not this slide"
                )
                raise DataError(msg)
            return known.info, size, []
        notes = ["no slide of this name in --slides"] if self._asked.slide else []
        size = found.size or (int(far[0]), int(far[1]))
        if not found.size:
            notes.append("the slide's size is unknown: it ends with its last tile")
        state = hashlib.sha256(np.ascontiguousarray(xy, "<i4").tobytes())
        state.update(np.ascontiguousarray(values, "<f2").tobytes())
        content = state.hexdigest()
        info = SlideInfo(
            item=item_name(found.name, content),
            fingerprint=content,
            width=size[0],
            height=size[1],
            mpp=None,
            vendor="imported: the fingerprint is of the features, not of the slide",
            objective=None,
            bounds=(0, 0, *size),
            reader=f"imported from {self._form}",
        )
        return info, size, notes

    # --- into the store ----------------------------------------------------------------------

    def _refuse_odd(self, name: str, key: Key, length: int) -> list[str]:
        """Refuse features of another length than the others; tell of a name used twice.

        Raises:
            DataError: the length differs.
        """
        group = (str(key.encoder), key.tiles)
        if group not in self._length:
            there = self.store.features.having(*group)
            shape = self.store.features.shape(there[0])[0] if there else (length,)
            self._length[group] = shape[0]
        if length != self._length[group]:
            msg = (
                f"{name}: features of length {length}, others of {key.encoder} have "
                f"{self._length[group]}; give another --encoder name"
            )
            raise DataError(msg)
        before = self._seen.setdefault((group[0] + group[1], name), key.item)
        if before == key.item:
            return []
        return [f"another slide called {name} was imported: a table of labels cannot tell them"]

    def _put(self, entry: Restored, status: NDArray[np.uint8], shown: str) -> bool:
        """Write tiles and features; return False if they are there, the same.

        Raises:
            DataError: others are there under the same key.
        """
        key, tiles = entry.key, replace(entry.tiles, status=np.zeros_like(entry.tiles.status))
        place = Key(key.item, key.mpp, key.tiles)
        if place not in self.store.tiles:
            self.store.tiles[place] = tiles
        elif not np.array_equal(self.store.tiles[place].xy, tiles.xy):
            msg = (
                f"{shown}: the store has other tiles of {key.item} under the same specification; "
                "import into another --store"
            )
            raise DataError(msg)
        if key in self.store.features:
            return self._same(entry, shown)
        features = self.store.features
        with features.lock(key):
            writer = features.writer(tiles, str(key.encoder), entry.values.shape[1:])
            with writer:
                writer.begin(0)
                for at in range(0, len(tiles), _BLOCK):
                    rows = slice(at, at + _BLOCK)
                    writer.write(entry.values[rows], status[rows])
        return True

    def _same(self, entry: Restored, shown: str) -> bool:
        there = self.store.features[entry.key].values
        if np.array_equal(np.asarray(there[:]), entry.values, equal_nan=True):
            return False
        msg = (
            f"{shown}: the store has other features of {entry.key.item} by {entry.key.encoder}; "
            "give another --encoder name, or --store"
        )
        raise DataError(msg)

    def _remember(self, entry: Restored, found: Incoming) -> None:
        """Keep the slide's card, if the store has none of its own."""
        if entry.key.item in self._cards:
            return
        card: Mapping[str, Any] = entry.card
        names = SlideInfo.__dataclass_fields__
        try:
            info = SlideInfo(**{name: card[name] for name in names})
        except KeyError:  # exported from a store that had none
            return
        x, y, width, height = info.bounds
        info = replace(info, bounds=(x, y, width, height))  # JSON knows no tuples
        source = str(card.get("mpp_source", "unknown"))
        self.store.remember(info, found.path, entry.key.mpp, source)
        self._cards[entry.key.item] = dict(card)


def halves(values: NDArray[Any], shown: str) -> tuple[HalfArray, list[str]]:
    """Return features as float16, rows that are no numbers as NaN, and what changed by it.

    Raises:
        DataError: a number is beyond float16, or no row is whole.
    """
    half, good = np.empty(values.shape, np.float16), np.empty(len(values), bool)
    largest, rounded = 0.0, False
    for at in range(0, len(values), _BLOCK):  # a copy of all would be as large as they are
        rows = slice(at, at + _BLOCK)
        wide = values[rows].astype(np.float64) if values.dtype.kind in "iu" else values[rows]
        whole = good[rows] = np.isfinite(wide).all(1)
        largest = max(largest, float(np.abs(wide[whole]).max(initial=0)))
        with np.errstate(over="ignore"):  # refused below
            half[rows] = np.where(whole[:, None], wide, np.nan)
        rounded |= not np.array_equal(half[rows][whole].astype(wide.dtype), wide[whole])
    if not good.any():
        msg = f"{shown}: not one row is of numbers alone (all have NaN or infinity)"
        raise DataError(msg)
    if largest > _LARGEST:
        msg = (
            f"{shown}: holds {largest:g}; the store keeps float16, up to {_LARGEST:.0f}: scale it "
            "down, or leave it out"
        )
        raise DataError(msg)
    warnings = []
    if not good.all():
        warnings.append(f"{(~good).sum()} of {len(good)} rows have NaN or infinity: unreadable")
    if rounded:
        warnings.append("features are rounded to float16")
    return half, warnings

"""A slide and a run in, the features that were imported for the slide out: by file, or by name."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

from pathcli.errors import DataError
from pathcli.store.peers.parcel import IMPORTED, UNKNOWN
from pathcli.types import Key, TileSpec

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pathcli.store import Store
    from pathcli.types import Features, SlideInfo, Tiles

_SHOWN = 3


def is_imported(encoder: str) -> bool:
    """Tell whether an encoder's features came from elsewhere: it can make none here."""
    return encoder.endswith(IMPORTED)


def is_placed(spec: TileSpec) -> bool:
    """Tell whether the size of tiles is known, so that they can be drawn."""
    return spec != UNKNOWN


class Imports:
    """Imported features of a store, as one run has learnt from: of one encoder and one tiling."""

    def __init__(self, store: Store, encoder: str, spec: TileSpec, dim: int) -> None:
        """Know the encoder's id, the tiles' specification and a feature's length."""
        self.store, self.encoder, self.spec, self.dim = store, encoder, spec, dim

    @cached_property
    def _cards(self) -> Mapping[str, Mapping[str, Any]]:
        return self.store.slides()

    def __call__(self, info: SlideInfo) -> tuple[Tiles, Features, list[str]]:
        """Return a slide's tiles and features, mapped, and what to say of them.

        Those of its very file come first; else those of its name, where the import saw no file.

        Raises:
            DataError: there are none, several, or those of another slide, encoder or tiles.
        """
        name = _name(info.item)
        alike = self.store.features.having(self.encoder, self.spec.digest)
        alike = [key for key in alike if _name(key.item) == name]
        found = [key for key in alike if key.item == info.item]
        found = found or [key for key in alike if not self._of_a_file(key)]
        if len(found) != 1:
            raise DataError(self._why(info, alike, found))
        key = found[0]
        tiles = self.store.tiles[Key(key.item, key.mpp, key.tiles)]
        features = self.store.features.mapped(key)
        if features.values.shape[1:] != (self.dim,):
            msg = (
                f"{name}: its {self.encoder} features are {features.values.shape[1:]} a tile, the "
                f"run has learnt from ({self.dim},): of another model of this name"
            )
            raise DataError(msg)
        told = []
        if key.item != info.item:
            _refuse_larger(name, tiles, info)
            told.append("its imported features are known by the slide's name, not by its file")
        if not is_placed(self.spec):
            text = "how large its imported tiles are is not known: nothing is drawn, "
            told.append(f"{text}or compared with lesions")
        return tiles, features, told

    def _of_a_file(self, key: Key) -> bool:
        """Tell whether the import saw the slide itself."""
        return not str(self._cards.get(key.item, {}).get("reader")).startswith("imported from")

    def _why(self, info: SlideInfo, alike: list[Key], found: list[Key]) -> str:
        """Return why not one import is this slide's."""
        name = _name(info.item)
        if alike:
            items = ", ".join(key.item for key in alike[:_SHOWN])
            what = "several imports have" if found else "what was imported of another file has"
            return (
                f"{name}: {what} this name in {self.store.root} ({items}), this file is "
                f"{info.item}; import again with --slides, which tells files apart"
            )
        others = [key for key in self.store.features if _name(key.item) == name]
        there = dict.fromkeys(f"{key.encoder} of {self._tiling(key)}" for key in others[:_SHOWN])
        has = f"has of this slide {' and '.join(there)}" if there else "has nothing of this slide"
        return (
            f"{name}: the run has learnt from {self.encoder} of {_told(self.spec)}, which cannot "
            f"be computed here; {self.store.root} {has}; run: pathcli store import"
        )

    def _tiling(self, key: Key) -> str:
        place = Key(key.item, key.mpp, key.tiles)
        return _told(self.store.tiles[place].spec) if place in self.store.tiles else "other tiles"


def _name(item: str) -> str:
    return item.rpartition("-")[0]


def _told(spec: TileSpec) -> str:
    if not is_placed(spec):
        return "tiles of unknown size"
    step = f" every {spec.step_px}" * (spec.step_px != spec.size_px)
    return f"tiles {spec.size_px} px{step} at {spec.mpp:g} um ({spec.tissue})"


def _refuse_larger(name: str, tiles: Tiles, info: SlideInfo) -> None:
    """Refuse tiles that reach beyond a slide.

    Raises:
        DataError: they do, so they are of another.
    """
    far = (tiles.xy.max(0) + round(tiles.side0)).tolist()
    if far[0] > info.width + tiles.side0 or far[1] > info.height + tiles.side0:
        msg = (
            f"{name}: the imported tiles reach to {far}, beyond the slide's {info.width} x "
            f"{info.height} px: they are of another slide; import again with --slides"
        )
        raise DataError(msg)

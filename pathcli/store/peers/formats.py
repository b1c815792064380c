"""The table of formats: what each module has to give."""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib import import_module
from typing import TYPE_CHECKING, Any

from pathcli.errors import DataError, UsageError
from pathcli.registry import did_you_mean
from pathcli.store.peers.parcel import Asked, parse_record, restore

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path

    from pathcli.store.peers.parcel import Outgoing, Source

    Write = Callable[[Outgoing, str | None], None]

FORMATS = {
    "trident": "trident",
    "clam": "clam",
    "stamp": "stamp",
    "acmil": "acmil",
    "zarr": "anndata_zarr",
    "geojson": "qupath",
}
"""Names of formats and their modules in this package."""


@dataclass(frozen=True)
class Format:
    """One format: `places` of a slide's files, a `writer` of slides, and the `sources` to read.

    `agrees` tells whether one of a slide's further files is what would be written there.
    """

    name: str
    places: Callable[[Path, Outgoing], tuple[Path, ...]]
    writer: Callable[..., AbstractContextManager[Write]]
    sources: Callable[[Path, Asked], list[Source]]
    agrees: Callable[[Path, Outgoing], bool] | None = None

    @property
    def one_each(self) -> bool:
        """Tell whether a slide has files of its own."""
        return self.name != "acmil"

    def shown(self, one: Outgoing) -> Outgoing:
        """Return what the files hold of a slide: GeoJSON no features, but measurements."""
        return replace(one, values=one.values[:, :0]) if self.name == "geojson" else one

    def holds(self, places: Sequence[Path], record: str) -> bool:
        """Tell whether files at `places` are those that would be written with `record`.

        Never of GeoJSON, whose record is not of the measurements.
        """
        if self.name == "geojson":
            return False
        try:
            # a resolution is asked for by some, and does not matter to what is compared
            found = self.sources(places[0], Asked(mpp=1.0))[0].read()
        except (DataError, IndexError):
            return False
        same = parse_record(found.record).get("sha256") == parse_record(record)["sha256"]
        return same and restore(found) is not None


def of(name: str) -> Format:
    """Return a format by its name.

    Raises:
        UsageError: there is none.
    """
    if name not in FORMATS:
        msg = f"no format is called {name!r}: {did_you_mean(name, list(FORMATS))}"
        raise UsageError(msg)
    module: Any = import_module(f"pathcli.store.peers.{FORMATS[name]}")
    return Format(
        name, module.places, module.writer, module.sources, getattr(module, "agrees", None)
    )

"""Peers' files in and out: TRIDENT, CLAM, STAMP, ACMIL, SpatialData's Zarr, QuPath's GeoJSON."""

from pathcli.store.peers.formats import FORMATS
from pathcli.store.peers.inbound import Import
from pathcli.store.peers.outbound import Export

__all__ = ["FORMATS", "Export", "Import"]

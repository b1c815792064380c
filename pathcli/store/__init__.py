"""The feature store: tiles and features of slides in, the same back from disk, for ever."""

from pathcli.store.store import Store

__all__ = ["Store"]

"""The one tree of errors: what the library raises on purpose, and the shell's exit code for it."""

from __future__ import annotations


class PathcliError(Exception):
    """Root of every error the library raises on purpose; `exit_code` is the shell's."""

    exit_code = 1


class UsageError(PathcliError):
    """The call itself is wrong: an unknown name, an impossible option."""

    exit_code = 2


class DataError(PathcliError):
    """The data is wrong: not a slide, truncated, no mpp, a checkpoint of another shape."""

    exit_code = 4


class ResourceError(PathcliError):
    """Something that should be there is not: weights, an extra, space, permission."""

    exit_code = 5


class NewerError(DataError):
    """Written by a later pathcli than this one; not damaged."""


class ForeignError(DataError):
    """Not written by pathcli."""


class BusyError(ResourceError):
    """Another live process is writing the same entry of the store."""

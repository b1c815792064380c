"""ACMIL's one file: `patch_feats_pretrain_<encoder>.h5`, a group a slide.

`<slide>/feat` float16 [n, d], `<slide>/coords` [n, 2], and the class as attribute `label`.
"""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from pathcli.errors import DataError
from pathcli.store.peers import files
from pathcli.store.peers.parcel import RECORD, UNKNOWN, Incoming, Source, corners, matrix

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from pathcli.store.peers.parcel import Asked, Outgoing

_NAME = "patch_feats_pretrain_"


def places(out: Path, one: Outgoing) -> tuple[Path, ...]:
    """Return the one file of all slides."""
    return (out if out.suffix == ".h5" else out / f"{_NAME}{one.encoder}.h5",)


@contextmanager
def writer(
    out: Path,
    *,
    labels: Mapping[str, int] | None = None,
    **_: Any,  # noqa: ANN401 - options of other formats
) -> Iterator[Callable[[Outgoing, str | None], None]]:
    """Give a function that adds one slide; the file appears when all are there."""
    whole: Any = None
    file: Any = None

    def write(one: Outgoing, record: str | None) -> None:
        nonlocal whole, file
        if file is None:
            whole = files.writing(places(out, one)[0])
            file = whole.__enter__()
        group = file.create_group(one.name)
        try:
            files.dataset(group, "feat", one.values)
            files.dataset(group, "coords", one.xy.astype(np.int64))
            if labels is not None and one.name in labels:
                group.attrs["label"] = labels[one.name]
            if record:
                group.attrs[RECORD] = record
        except BaseException:
            del file[one.name]
            raise

    try:
        yield write
    except BaseException as error:
        if whole is not None:
            whole.__exit__(type(error), error, error.__traceback__)
        raise
    if whole is not None:
        whole.__exit__(None, None, None)


def sources(path: Path, asked: Asked) -> list[Source]:
    """Return the slides of one file, or of all such files of a folder."""
    del asked
    found = [path] if path.is_file() else sorted(path.glob("*.h5"))
    named = []
    for file in found:
        try:
            with files.reading(file) as opened:
                names = list(opened)
        except DataError as error:
            named.append(Source(file.stem, file, file.name, partial(_fail, error)))
            continue
        named += [Source(n, file, f"{file.name}/{n}", partial(_read, file, n)) for n in names]
    return named


def _fail(error: DataError) -> Incoming:
    raise error


def _read(path: Path, name: str) -> Incoming:
    with files.reading(path) as file:
        group = file[name]
        if not hasattr(group, "create_group"):
            msg = f"{path}/{name}: no group; ACMIL has one a slide, with feat and coords"
            raise DataError(msg)
        try:
            values = matrix(files.content(group, "feat"), "feat")
            xy = corners(files.content(group, "coords"), len(values), "coords")
        except DataError as error:
            msg = f"{path}/{name}: {error}"
            raise DataError(msg) from error
        says, record = files.attributes(group), files.record_in(group)
    encoder = path.stem.removeprefix(_NAME) if path.stem.startswith(_NAME) else None
    note = "ACMIL's file does not say how large its tiles are: unknown, 1 px stands for it"
    return Incoming(
        path=path,
        name=name,
        values=values,
        xy=xy,
        encoder=encoder,
        spec=UNKNOWN,
        slide_mpp=1.0,
        mpp_source="unknown, 1 stands for it",
        says=says,
        record=record,
        notes=(note,),
    )

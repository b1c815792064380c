"""CLAM's folders: `h5_files/<slide>.h5`, `pt_files/<slide>.pt`, `patches/<slide>.h5`, a list.

`h5_files` hold `features` float32 [n, d] and `coords` int32 [n, 2] without attributes, `pt_files`
the features alone, `patches` the corners with the tiles' size at a level of the slide.
"""

from __future__ import annotations

import csv
import io
import os
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePath
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import numpy as np

from pathcli.errors import DataError
from pathcli.store.files import disk_errors, write_bytes
from pathcli.store.peers import files
from pathcli.store.peers.parcel import (
    RECORD,
    UNKNOWN,
    Incoming,
    Source,
    corners,
    imported_spec,
    matrix,
    number,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    from pathcli.store.peers.parcel import Asked, Outgoing
    from pathcli.types import TileSpec

LIST = "process_list_autogen.csv"
_HEADER = ("slide_id", "process", "status", "seg_level")


def places(out: Path, one: Outgoing) -> tuple[Path, ...]:
    """Return the files of one slide, the one with the features first."""
    return (
        out / "h5_files" / f"{one.name}.h5",
        out / "pt_files" / f"{one.name}.pt",
        out / "patches" / f"{one.name}.h5",
    )


@contextmanager
def writer(out: Path, **_: Any) -> Iterator[Callable[[Outgoing, str | None], None]]:  # noqa: ANN401
    """Give a function that writes one slide; the list of slides follows at the end."""
    written: list[Outgoing] = []

    def write(one: Outgoing, record: str | None) -> None:
        _write(out, one, record)
        written.append(one)

    try:
        yield write
    finally:
        if written:
            _write_list(out / LIST, written)


def _write(out: Path, one: Outgoing, record: str | None) -> None:
    import torch  # noqa: PLC0415

    features, tensor, patches = places(out, one)
    values, side = one.values.astype(np.float32), round(one.tiles.side0)
    size = np.array([one.tiles.width, one.tiles.height])
    with files.writing(patches) as file:
        # tiles are physical, so their side belongs to no level but 0
        told = {
            "patch_size": side,
            "patch_level": 0,
            "downsample": np.array([1.0, 1.0]),
            "downsampled_level_dim": size,
            "level_dim": size,
            "name": one.name,
            "save_path": str(patches.parent),
        }
        files.dataset(file, "coords", one.xy.astype(np.int64), told)
        if record:
            file.attrs[RECORD] = record
    memory = io.BytesIO()
    torch.save(torch.from_numpy(values), memory)
    write_bytes(tensor, memory.getvalue(), lambda _: None, files.OPTION)
    with files.writing(features) as file:
        files.dataset(file, "features", values)
        files.dataset(file, "coords", one.xy.astype(np.int32))


def _write_list(path: Path, written: list[Outgoing]) -> None:
    """Add the slides to CLAM's list; rows of others stay."""
    header, rows = list(_HEADER), []
    if path.is_file():
        try:
            with path.open(newline="", encoding="utf-8-sig") as file:
                table = csv.DictReader(file)
                rows = list(table)
                header = list(dict.fromkeys([*(table.fieldnames or ()), *_HEADER]))
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            msg = f"{path}: not extended, as it cannot be read ({error}); the features are written"
            raise DataError(msg) from error
    here = {one.name + _suffix(one) for one in written}
    rows = [row for row in rows if row.get("slide_id") not in here]
    rows += [
        {"slide_id": name, "process": "0", "status": "processed", "seg_level": "-1"}
        for name in sorted(here)
    ]
    text = io.StringIO()
    table_out = csv.DictWriter(text, header, extrasaction="ignore")
    table_out.writeheader()
    table_out.writerows(rows)
    with disk_errors(path, files.OPTION):
        write_bytes(path, text.getvalue().encode(), lambda _: None, files.OPTION)


def _suffix(one: Outgoing) -> str:
    """Return the ending of the slide's file, which CLAM's list keeps."""
    return PurePath(str(one.card.get("last_seen", ""))).suffix


def agrees(path: Path, one: Outgoing) -> bool:
    """Tell whether the tensor or the corners of a slide are those that would be written."""
    try:
        if path.suffix == ".pt":
            return np.array_equal(_tensor(path), one.values)
        with files.reading(path) as file:
            side = file["coords"].attrs.get("patch_size")
            same = np.array_equal(files.content(file, "coords"), one.xy)
    except DataError:
        return False
    return bool(same and side == round(one.tiles.side0))


def sources(path: Path, asked: Asked) -> list[Source]:
    """Return the slides of a folder that holds `h5_files` or `pt_files`, or of one file."""
    if path.is_file():
        found = {path.stem: path}
        root, cut = path.parent, list[Path]()
    else:
        root, found, cut = path, {}, sorted(path.rglob("patches"))
        for kind, ending in (("pt_files", "*.pt"), ("h5_files", "*.h5")):  # h5 has corners, too
            for folder in sorted([*path.rglob(kind), *([path] if path.name == kind else [])]):
                for file in sorted(folder.glob(ending)):
                    if not file.name.startswith("."):
                        found[f"{folder.parent}/{file.stem}"] = file
    return [
        Source(p.stem, p, str(p.relative_to(root)), partial(_read, p, cut, asked))
        for p in found.values()
    ]


def _read(path: Path, cut_in: list[Path], asked: Asked) -> Incoming:
    xy: NDArray[Any] | None = None
    if path.suffix == ".pt":
        values = matrix(_tensor(path), f"{path}: the tensor")
    else:
        with files.reading(path) as file:
            values = matrix(files.content(file, "features"), "features")
            xy = corners(files.content(file, "coords"), len(values), "coords")
    patches = _patches(path, cut_in)
    says, record = dict[str, Any](), None
    notes: tuple[str, ...] = ()
    if patches:
        with files.reading(patches) as file:
            cut = corners(files.content(file, "coords"), len(values), "coords")
            says, record = files.attributes(file["coords"]), files.record_in(file)
        if xy is not None and not np.array_equal(xy, cut):
            msg = f"{path}: its coords are not those of {patches}; they are of different runs"
            raise DataError(msg)
        xy = cut
    if xy is None:
        xy = np.stack([np.arange(len(values)), np.zeros(len(values), int)], 1)
        notes = ("the file does not say where its tiles are: they are counted instead",)
    spec, mpp, source, more = _tiling(path, says, record, asked)
    size = np.asarray(says.get("level_dim", [])).ravel()
    whole = len(size) == 2 and says.get("patch_level") == 0  # noqa: PLR2004 - width and height
    return Incoming(
        path=path,
        name=path.stem,
        values=values,
        xy=xy,
        encoder=None,
        spec=spec,
        slide_mpp=mpp,
        mpp_source=source,
        size=(int(size[0]), int(size[1])) if whole else None,
        says=says,
        record=record,
        notes=(*notes, *more),
    )


def _patches(path: Path, folders: list[Path]) -> Path | None:
    """Return the slide's file below the folder `patches` that is nearest."""
    near = sorted(folders, key=lambda f: -len(os.path.commonpath([f, path])))
    files_ = [folder / f"{path.stem}.h5" for folder in (path.parent.parent / "patches", *near)]
    return next((file for file in files_ if file.is_file()), None)


def _tensor(path: Path) -> NDArray[Any]:
    """Return the features of a `.pt` file, which may hold tensors and nothing else."""
    import torch  # noqa: PLC0415

    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises what the bytes provoke
        line = (str(error).strip().splitlines() or [type(error).__name__])[0][:80]
        line = "other Python objects in it" if isinstance(error, UnpicklingError) else line
        msg = f"{path}: cut short, or not a file of one tensor ({line})"
        raise DataError(msg) from error
    if not isinstance(found, torch.Tensor) or found.layout != torch.strided:
        msg = f"{path}: holds a {type(found).__name__}, not one tensor [tiles, length]"
        raise DataError(msg)
    found = found.detach()
    kept: NDArray[Any] = found.float().numpy() if found.is_floating_point() else found.numpy()
    return kept


def _tiling(
    path: Path, says: dict[str, Any], record: str | None, asked: Asked
) -> tuple[TileSpec, float, str, tuple[str, ...]]:
    """Return specification, slide resolution, its source and notes.

    CLAM cuts by level whatever the resolution, so that of a header counts as the nominal one
    nearest to it, and the specification is one for all slides of an objective.
    """
    size = number(says.get("patch_size"))
    if size is None:
        note = "no patches/<slide>.h5 says how large the tiles are: unknown, 1 px stands for it"
        return UNKNOWN, 1.0, "unknown, 1 stands for it", (note,)
    found = asked.nominal(path.stem, record)
    if found is None:
        msg = (
            f"{path}: CLAM's files do not say the slide's resolution; give --mpp, um per level-0 "
            "pixel, or --slides DIR"
        )
        raise DataError(msg)
    mpp, source = found
    downsample = float(np.mean(np.asarray(says.get("downsample", 1.0), float)))
    whole = round(downsample) if abs(downsample - round(downsample)) < 0.01 else downsample  # noqa: PLR2004
    note = "CLAM's files do not say the step from tile to tile: a tile's side is taken"
    return imported_spec(int(size), mpp * whole), mpp, source, (note,)

"""Records to files, streamed, and images of slides and archives to image files: what writes."""

from __future__ import annotations

import csv
import glob
import json
import os
import re
import shutil
import socket
import tarfile
import threading
import time
from contextlib import contextmanager, suppress
from importlib import import_module
from io import BytesIO
from itertools import chain, count, islice
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from PIL import Image, UnidentifiedImageError

from pathcli.data.formats.published import PATHGEN_PX
from pathcli.data.formats.source import ENDINGS
from pathcli.data.images import image_name, member_bytes, read_image
from pathcli.errors import DataError, ResourceError
from pathcli.store.files import disk_errors, part_path, publish
from pathcli.types import Member, Region

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from pathcli.types import ImageRef

    Record = dict[str, Any]

_SAFE = re.compile(r"[^\w.-]+")
_HERE = re.sub(r"[^\w]", "_", socket.gethostname())  # where numbers of processes are known
_DAY_S = 86_400
_EMBEDDED, _NAMED = 100, 10_000  # rows of a group in Parquet


class UnheldError(Exception):
    """A sample that a form cannot hold; says why."""


@contextmanager
def whole(path: Path, option: str = "OUT") -> Iterator[Path]:
    """Give a temporary that becomes `path` if all goes well, and is removed if not.

    Temporaries of processes that were killed are removed first.

    Args:
        path: the file, or the folder.
        option: what messages call the place.

    Raises:
        ResourceError: the disk is full, or the folder may not be written.
    """
    part = part_path(path.with_name(f".{path.name}.{_HERE}-{os.getpid()}"))
    with disk_errors(path, option):
        path.parent.mkdir(parents=True, exist_ok=True)
        for other in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
            if _left(other):
                _remove(other)
        try:
            yield part
            publish(part, path, lambda _: None)
        finally:
            _remove(part)


def _left(part: Path) -> bool:
    """Tell whether nobody writes a temporary any more: its process is gone, or a day went by."""
    machine, _, pid = part.stem.rpartition(".")[2].rpartition("-")
    if machine == _HERE and pid.isdigit() and os.name == "posix":
        try:
            os.kill(int(pid), 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            return False
        return False
    with suppress(FileNotFoundError):
        return time.time() - part.stat().st_mtime > _DAY_S
    return False


def _remove(part: Path) -> None:
    if part.is_dir():
        shutil.rmtree(part, ignore_errors=True)
    part.unlink(missing_ok=True)


def dumped(value: Mapping[str, Any]) -> bytes:
    """Return JSON in UTF-8; a lone surrogate (of a name that is no UTF-8) is escaped."""
    return json.dumps(value, ensure_ascii=False).encode(errors="backslashreplace")


# --- images ------------------------------------------------------------------------------


def image_bytes(ref: ImageRef) -> tuple[bytes, str]:
    """Return an image as a file's bytes and their ending; pixels of slides as PNG.

    Raises:
        UnheldError: it is not there, or no image.
        ResourceError: the file may not be read.
    """
    why = "not an image"
    try:
        if isinstance(ref, Region):
            return _png(ref), ".png"
        data = member_bytes(ref) if isinstance(ref, Member) else Path(ref).read_bytes()
        with Image.open(BytesIO(data)) as image:
            kind = str(image.format).lower()
        suffix = {"jpeg": ".jpg", "tiff": ".tif"}.get(kind, f".{kind}")
        return (data, suffix) if suffix in ENDINGS else (_png(ref), ".png")
    except FileNotFoundError:
        why = "no such image file"
    except (UnidentifiedImageError, Image.DecompressionBombError, Image.DecompressionBombWarning):
        pass
    except DataError:
        why = "a broken image, or beside its slide"
    except OSError as error:
        msg = f"{image_name(ref)}: cannot be read ({error.strerror or error})"
        raise ResourceError(msg) from error
    raise UnheldError(why)


def _png(ref: ImageRef) -> bytes:
    memory = BytesIO()
    Image.fromarray(read_image(ref)).save(memory, "PNG", compress_level=1)
    return memory.getvalue()


class ImageFolder:
    """The folder that regions and members of archives become files of."""

    def __init__(self, folder: Path) -> None:
        """Write nothing yet."""
        self.folder = folder.expanduser().absolute()
        self._stems: dict[str, str] = {}
        self._lock = threading.Lock()

    def file(self, ref: Region | Member) -> str:
        """Write an image and return its path; the same image has the same path."""
        stem = self._stem(ref.slide if isinstance(ref, Region) else ref.archive)
        data, suffix = image_bytes(ref)
        if isinstance(ref, Region):
            name = square_name(stem, ref.xy, ref.side0)
        else:
            own = PurePosixPath(ref.name.partition("[")[0]).stem
            name = f"{stem}/{_SAFE.sub('_', own)}-{ref.offset}"
        path = self.folder / (name + suffix)
        with disk_errors(path, "--write-images"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        return str(path)

    def _stem(self, place: str) -> str:
        """Return the stem of a slide or archive; a second one of that name is numbered."""
        with self._lock:
            if place not in self._stems:
                stem, taken = _SAFE.sub("_", Path(place).stem), set(self._stems.values())
                names = chain([stem], (f"{stem}-{n}" for n in range(2, len(taken) + 3)))
                self._stems[place] = next(name for name in names if name not in taken)
            return self._stems[place]


def square_name(stem: str, xy: Sequence[object], side0: object) -> str:
    """Return what the file of a square of a slide is called, without its ending."""
    side = "" if str(side0) == str(PATHGEN_PX) else f"_{side0}px"
    return f"{_SAFE.sub('_', stem)}_{xy[0]}_{xy[1]}{side}"


def name_from(root: Path, path: str) -> str:
    """Return how a file is named from a folder, by `/` on any system."""
    return Path(os.path.relpath(path, root)).as_posix()


# --- files -------------------------------------------------------------------------------


def write_records(records: Iterator[Record], path: Path, suffix: str, shard: int) -> None:
    """Write records as the ending of a file asks: JSON, JSONL, CSV, TSV, Parquet or tar.

    Records of a tar map endings to bytes; without ending it is a folder of tar files, each
    closed once it has `shard` bytes.

    Raises:
        ResourceError: pyarrow is not installed.
    """
    if suffix == ".json":
        _json(records, path)
    elif suffix == ".jsonl":
        with path.open("wb") as file:
            file.writelines(dumped(record) + b"\n" for record in records)
    elif suffix == ".parquet":
        _parquet(records, path)
    elif suffix == ".tar":
        _shard(records, path)
    elif suffix:
        _delimited(records, path, "\t" if suffix == ".tsv" else ",")
    else:
        _shards(records, path, shard)


def _json(records: Iterator[Record], path: Path) -> None:
    with path.open("wb") as file:
        file.write(b"[")
        for number, record in enumerate(records):
            file.write((b",\n" if number else b"\n") + dumped(record))
        file.write(b"\n]\n")


def _delimited(records: Iterator[Record], path: Path, delimiter: str) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        for number, record in enumerate(records):
            if not number:
                table = csv.DictWriter(file, [*record], delimiter=delimiter)
                table.writeheader()
            table.writerow(record)


def _parquet(records: Iterator[Record], path: Path) -> None:
    try:
        pyarrow, parquet = import_module("pyarrow"), import_module("pyarrow.parquet")
    except ImportError:
        msg = f"{path}: Parquet files need pyarrow: pip install pyarrow"
        raise ResourceError(msg) from None
    first = list(islice(records, 1))
    text = pyarrow.string()
    turn = pyarrow.struct([("from", text), ("value", text)])
    types = {"conversations": pyarrow.list_(turn), "image": pyarrow.list_(text)}
    embeds = bool(first) and isinstance(first[0]["image"], dict)
    if embeds:
        types["image"] = pyarrow.struct([("bytes", pyarrow.binary()), ("path", text)])
    names = [*first[0]] if first else []
    schema = pyarrow.schema([(name, types.get(name, text)) for name in names])
    rest = chain(first, records)
    with parquet.ParquetWriter(path, schema) as file:
        while rows := list(islice(rest, _EMBEDDED if embeds else _NAMED)):
            file.write_table(pyarrow.Table.from_pylist(rows, schema))


def _shards(records: Iterator[Record], folder: Path, limit: int) -> None:
    folder.mkdir()
    for number in count():
        first = list(islice(records, 1))
        if not first:
            return
        _shard(chain(first, records), folder / f"{number:06d}.tar", limit)


def _shard(records: Iterable[Record], path: Path, limit: int | None = None) -> None:
    with tarfile.open(path, "w") as archive:
        for number, record in enumerate(records):
            for suffix, data in record.items():
                member = tarfile.TarInfo(f"{number:08d}{suffix}")
                member.size = len(data)
                archive.addfile(member, BytesIO(data))
            archive.members = []  # type: ignore[attr-defined]  # it would keep every header
            if limit is not None and archive.offset >= limit:
                return

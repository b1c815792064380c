"""Tiles' pixels in, files out: a Zarr group, WebDataset shards, or a folder of PNG files.

Layouts know nothing of slides: they are handed pixels, row after row. The folder of a slide
says itself what it holds, in `tiles.json` or in the attributes of the Zarr group.
"""

from __future__ import annotations

import io
import json
import re
import tarfile
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
from PIL import Image

from pathcli.errors import UsageError
from pathcli.registry import did_you_mean

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from pathcli.types import ByteArray, Tiles

SHARD_TILES, SHARD_BYTES = 10_000, 500_000_000  # at most, of a tar file
BLOCK_BYTES = 32_000_000  # of pixels: what a file of a Zarr array holds, and memory at once
CARD = "tiles.json"

Row = tuple[int, Any]
"""A tile's number and its pixels as `Layout.pack` gives them, None if they cannot be read."""


@dataclass(frozen=True)
class Layout:
    """How pixels are kept: `kind` is zarr, webdataset or png, `codec` that of an image.

    The codec is png, which keeps every pixel, or jpeg:QUALITY, of WebDataset shards only.
    """

    kind: str = "zarr"
    codec: str = "png"

    def __post_init__(self) -> None:
        """Refuse what cannot be written.

        Raises:
            UsageError: an unknown kind or codec, or a JPEG where there are none.
        """
        if self.kind not in KINDS:
            msg = f"--save-pixels {self.kind!r}: {did_you_mean(self.kind, list(KINDS))}"
            raise UsageError(msg)
        if not re.fullmatch(r"png|jpeg:([1-9]\d?|100)", self.codec):
            msg = f"--pixels-format is png or jpeg:QUALITY, 1 to 100, not {self.codec!r}"
            raise UsageError(msg)
        if self.codec != "png" and self.kind != "webdataset":
            msg = f"--pixels-format {self.codec} is for --save-pixels webdataset, not {self.kind}"
            raise UsageError(msg)

    def place(self, out: Path, item: str) -> Path:
        """Return the folder of one slide."""
        return out / (f"{item}.zarr" if self.kind == "zarr" else item)

    def pack(self, pixels: ByteArray) -> Any:  # noqa: ANN401 - what `write` takes
        """Return uint8 RGB [h, w, 3] as a PNG or JPEG file; for Zarr, which packs itself, as is."""
        if self.kind == "zarr":
            return pixels
        if self.codec == "png":
            return cv2.imencode(".png", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR))[1].tobytes()
        file = io.BytesIO()
        quality = int(self.codec.partition(":")[2])
        Image.fromarray(pixels).save(file, "JPEG", quality=quality, subsampling=0)
        return file.getvalue()

    def size_of(self, pixels: ByteArray) -> int:
        """Return about how many bytes a tile takes on disk."""
        if self.kind != "zarr":
            return len(self.pack(pixels)) + (2048 if self.kind == "webdataset" else 0)
        import imagecodecs  # noqa: PLC0415

        return len(imagecodecs.zstd_encode(pixels.tobytes(), level=1))

    def write(self, part: Path, tiles: Tiles, rows: Iterable[Row], status: ByteArray) -> None:
        """Write `rows`, in order, into the folder `part`.

        `status` uint8 [n] is complete once `rows` are exhausted.
        """
        if self.kind == "zarr":
            _write_zarr(part, tiles, rows, status)
        elif self.kind == "webdataset":
            _write_shards(part, tiles, rows, ".png" if self.codec == "png" else ".jpg")
        else:
            _write_files(part, tiles, rows)

    def write_card(self, part: Path, card: dict[str, Any]) -> None:
        """Write what a folder says of itself."""
        if self.kind == "zarr":
            import zarr  # noqa: PLC0415

            zarr.open_group(part, mode="r+").attrs.update(card)
        else:
            (part / CARD).write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")

    def read_card(self, place: Path) -> dict[str, Any]:
        """Return what a folder says of itself; OSError, ValueError or KeyError if it does not."""
        if self.kind == "zarr":
            return dict(json.loads((place / "zarr.json").read_bytes())["attributes"])
        return dict(json.loads((place / CARD).read_bytes()))


KINDS = ("zarr", "webdataset", "png")


def _write_files(part: Path, tiles: Tiles, rows: Iterable[Row]) -> None:
    """Write `<item>_<x>_<y>.png` for every tile."""
    for row, data in rows:
        if data is not None:
            x, y = tiles.xy[row]
            (part / f"{tiles.item}_{x}_{y}.png").write_bytes(data)


def _write_shards(part: Path, tiles: Tiles, rows: Iterable[Row], suffix: str) -> None:
    """Write `<item>-<number>.tar`, with an image and a JSON for every tile.

    WebDataset ends a member's stem at its first dot: those of the item become `_`.
    """
    stem = tiles.item.replace(".", "_")
    about = {"item": tiles.item, "group": tiles.item, "mpp": tiles.spec.mpp}
    with ExitStack() as shard:
        number, held, archive = 0, 0, None
        for row, data in rows:
            if data is None:
                continue
            if archive and (held == SHARD_TILES or archive.offset + len(data) > SHARD_BYTES):
                shard.close()
                number, held, archive = number + 1, 0, None
            if archive is None:
                name = part / f"{stem}-{number:06d}.tar"
                archive = shard.enter_context(tarfile.open(name, "w"))
            x, y = tiles.xy[row].tolist()
            text = json.dumps(about | {"x": x, "y": y}).encode()
            for ending, content in ((suffix, data), (".json", text)):
                member = tarfile.TarInfo(f"{stem}_{x}_{y}{ending}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
            archive.members = []  # type: ignore[attr-defined]  # it would keep every header
            held += 1


def _write_zarr(part: Path, tiles: Tiles, rows: Iterable[Row], status: ByteArray) -> None:
    """Write the arrays `pixels`, `coords` and `status`; a chunk is one tile, a file many."""
    import zarr  # noqa: PLC0415

    n, side = len(tiles), tiles.spec.size_px
    block = max(1, min(n, BLOCK_BYTES // (3 * side * side)))
    group = zarr.create_group(part, zarr_format=3)
    pixels = group.create_array(
        "pixels",
        shape=(n, side, side, 3),
        dtype="uint8",
        chunks=(1, side, side, 3),
        shards=(block, side, side, 3),
        dimension_names=("tile", "y", "x", "rgb"),
    )
    buffer = np.zeros((block, side, side, 3), np.uint8)
    for row, data in rows:
        at = row % block
        buffer[at] = 0 if data is None else data
        if at == block - 1 or row == n - 1:
            pixels[row - at : row + 1] = buffer[: at + 1]
    group.create_array("coords", data=tiles.xy.astype(np.int32))
    group.create_array("status", data=status)

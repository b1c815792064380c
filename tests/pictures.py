"""Small images on disk, and what a source makes of a table of them."""

from __future__ import annotations

import csv
import json
from io import BytesIO
from pathlib import Path

from PIL import Image

from pathcli.data.formats import Format, Source, samples
from pathcli.types import Sample


def png(colour: int) -> bytes:
    memory = BytesIO()
    Image.new("RGB", (4, 3), (colour, 0, 0)).save(memory, "PNG")
    return memory.getvalue()


def three_images(folder: Path) -> Path:
    (folder / "sub").mkdir(parents=True)
    for number, name in enumerate(("a.png", "sub/b.png", "c.png")):
        (folder / name).write_bytes(png(number))
    return folder


def read(
    path: Path, images: Path | None = None, form: Format = "auto"
) -> tuple[list[Sample], Source]:
    source = Source(path, images)
    return list(samples(source, form)), source


def facts(found: list[Sample]) -> list[tuple[str, str, str, str]]:
    return [(s.name, s.answer, s.label, s.group) for s in found]


def write(path: Path, rows: list[dict[str, str]]) -> Path:
    if path.suffix in {".csv", ".tsv"}:
        with path.open("w", newline="", encoding="utf-8-sig") as file:
            tab = {"delimiter": "\t"} if path.suffix == ".tsv" else {}
            table = csv.DictWriter(file, [*rows[0]], **tab)  # type: ignore[arg-type]
            table.writeheader()
            table.writerows(rows)
    elif path.suffix == ".jsonl":
        path.write_text("\n\n".join(json.dumps(row) for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1, ensure_ascii=False), encoding="utf-8")
    return path

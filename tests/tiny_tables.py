"""A table of each layout that recipes of vision-language models learn from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

N = 5  # one of which is validated on: two steps of two
SAID = [f"tissue of {i}, " + "much red tissue beside a blue one " * 3 for i in range(N)]


def talk(i: int) -> dict[str, Any]:
    asked = {"from": "human", "value": f"<image>\nIs tissue {i} red?"}
    return {"conversations": [asked, {"from": "gpt", "value": "Yes." if i % 2 else "No."}]}


def fill(folder: Path, slide: Path) -> Path:
    """Write pictures, two copies of a slide, and the tables."""
    rng = np.random.default_rng(0)
    for i in range(N):
        pixels = rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    slides = [f"TCGA-AA-000{k}-01Z-00-DX1" for k in (1, 2)]
    for name in slides:
        shutil.copy(slide, folder / f"{name}.svs")
    columns = {"image": [f"{i}.png" for i in range(N)], "caption": SAID}
    tables = {
        "quilt.csv": columns | {"pathology": ["Renal"] * N},
        "pairs.csv": columns,
        "captions.csv": columns | {"group": [f"g{i}" for i in range(N)]},
    }
    for name, table in tables.items():
        head = ",".join(table).replace("image", "image_path" if name == "quilt.csv" else "image")
        lines = [",".join(f'"{cell}"' for cell in row) for row in zip(*table.values(), strict=True)]
        (folder / name).write_text("\n".join([head, *lines]))
    records = {
        "questions.json": [
            {"question": f"What is tissue {i}?", "answer": SAID[i], "path": f"{i}.png"}
            for i in range(N)
        ],
        "pcaption.json": [{"image": f"{i}.png", "caption": SAID[i]} for i in range(N)],
        "talks.json": [{"image": f"{i}.png"} | talk(i) for i in range(N)],
        "pathgen.json": [
            {"wsi_id": slides[i == 0], "position": [f"{32 * i}", "64"], "type": "CLOSE"} | talk(i)
            for i in range(N)
        ],
    }
    for name, made in records.items():
        (folder / name).write_text(json.dumps(made))
    asked = {"from": "human", "value": "<image>\nMend this: much red tissue."}
    mended = {"from": "gpt", "value": '[{"op": "modify", "text": "red", "to": "blue"}]'}
    for record in records["pathgen.json"]:
        record["conversations"] = [asked, mended]
    (folder / "corrupted.json").write_text(json.dumps(records["pathgen.json"]))
    short = [{"question": f"Shorten: {SAID[i]}", "answer": f"Tissue {i}."} for i in range(N)]
    for name, rows in {"vqa.jsonl": records["talks.json"], "summaries.jsonl": short}.items():
        (folder / name).write_text("\n".join(map(json.dumps, rows)))
    return folder

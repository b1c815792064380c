"""Captioned patches in, a page out: the patches, what each agent said, and where they lie."""

from __future__ import annotations

from collections import Counter
from contextlib import closing
from pathlib import PurePath
from textwrap import shorten
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pathcli.data.images import read_image
from pathcli.errors import DataError
from pathcli.report import Picture, Section, html_page, pairs
from pathcli.slides.geojson import square
from pathcli.slides.overlay import OUTLINE, Canvas
from pathcli.slides.readers import open_slide

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from pathcli.curation.caption.agents import Patch
    from pathcli.curation.caption.retriever import SlideFacts
    from pathcli.types import ByteArray, ImageTextEncoder, Region, Report

PATCHES, OF_A_SLIDE = 24, 8
SIDE = 336

_LEAD = (
    "What models said of patches that other models chose. Nobody has checked these captions: read "
    "some before anything is trained on them; pathcli data review makes a page for that."
)


class Shown:
    """Keeps the patches that the page shows: the first ones of each slide."""

    def __init__(self) -> None:
        """Begin with none."""
        self.patches: list[Patch] = []
        self._of: Counter[str] = Counter()

    def add(self, patch: Patch) -> None:
        """Keep a patch if there is room for it."""
        if len(self.patches) < PATCHES and self._of[patch.wsi_id] < OF_A_SLIDE:
            self._of[patch.wsi_id] += 1
            self.patches.append(patch)


def page(
    report: Report,
    slides: Sequence[SlideFacts],
    shown: Shown,
    encoder: ImageTextEncoder,
    command: str,
) -> str:
    """Return the page of a run; `slides` are its `SlideFacts`."""
    numbers = {name: f"{value['value']:,.0f}" for name, value in report.metrics.items()}
    warnings = [
        {"slide": s.wsi_id, "warning": w} for s in slides for w in (*s.warnings, s.fault) if w
    ]
    odd = {one.unfamiliar for one in shown.patches if one.unfamiliar and not one.why}
    alert = f"Captions below are {', '.join(odd)}: each is marked, in captions.json too." * bool(
        odd
    )
    sections = [Section("What came of it", alert=alert, rows=pairs(numbers))]
    sections += [Section("Mind this", rows=warnings)] if warnings else []
    sections.append(
        Section("Where they lie", _told(shown), rows=_rows(slides), pictures=_maps(shown))
    )
    for number, patch in enumerate(shown.patches, start=1):
        sections.append(_section(number, patch, encoder))
    facts: Mapping[str, Any] = report.provenance
    flat = {k: _plain(v) for k, v in facts.items() if k not in {"attributes", "slides", "versions"}}
    looked = [{"attribute": text} for text in facts["attributes"]]
    sections.append(Section("Attributes looked for", rows=looked))
    sections.append(Section("To repeat it", code=command, rows=pairs(flat | facts["versions"])))
    return html_page(report.title, _LEAD, sections)


def _plain(value: Any) -> Any:  # noqa: ANN401 - any JSON
    if not isinstance(value, dict):
        return value
    return ", ".join(f"{k} {_plain(v)}" for k, v in value.items() if v not in (None, {}, []))


def _told(shown: Shown) -> str:
    return (
        f"Patches 1 to {len(shown.patches)}, which are shown below, by their numbers. Each is "
        "168 um a side."
    )


def _rows(slides: Sequence[SlideFacts]) -> list[dict[str, Any]]:
    return [
        {
            "slide": s.wsi_id,
            "patches in all": f"{s.patches:,}",
            "near-duplicates": s.near_duplicates,
        }
        | {f"by {route}": count for route, count in s.routes.items()}
        | {"findings of its report": len(s.findings)}
        for s in slides
    ]


def _section(number: int, patch: Patch, encoder: ImageTextEncoder) -> Section:
    x, y = patch.region.xy
    rows = [{"agent": "retriever", "said": _chosen(patch)}]
    rows += [{"agent": _agent(step), "said": said} for step in patch.steps for said in _said(step)]
    if patch.why:
        rows.append({"agent": "dropped", "said": f"{patch.why}: {patch.detail}".strip(": ")})
    else:
        tokens = encoder.count_tokens([patch.caption])[0]
        rows.append({"agent": "caption", "said": f"{patch.caption} ({tokens} tokens)"})
    told = f"The caption is {patch.unfamiliar}." * bool(patch.unfamiliar and not patch.why)
    title = f"{number}. {patch.wsi_id}"
    try:
        pixels = Image.fromarray(read_image(patch.region)).resize((SIDE, SIDE))
    except DataError:
        return Section(title, alert=told, rows=rows)
    where = f"x {x}, y {y}, {patch.region.side0} px of level 0"
    return Section(title, alert=told, rows=rows, pictures=[Picture(np.asarray(pixels), where)])


def _chosen(patch: Patch) -> str:
    by = "chosen by " + " and ".join(patch.routes)
    if patch.cosine is None:
        return by
    return f"{by}; nearest to “{shorten(patch.near, 100, placeholder='...')}” ({patch.cosine:.3f})"


def _agent(step: Mapping[str, Any]) -> str:
    return f"{step['agent']} ({step['model']})" if "model" in step else str(step["agent"])


def _said(step: Mapping[str, Any]) -> Iterator[str]:
    said = step.get("said", "")
    yield from said if isinstance(said, list) else [said] if said else []
    yield from (f"{what}: {step[what]}" for what in ("fault", "note") if step.get(what))


def _maps(shown: Shown) -> list[Picture]:
    """Return each slide with the numbers of its patches; one that is gone has no picture."""
    of: dict[str, list[tuple[int, Region]]] = {}
    for number, patch in enumerate(shown.patches, start=1):
        of.setdefault(patch.region.slide, []).append((number, patch.region))
    found = []
    for path, regions in of.items():
        try:
            with closing(open_slide(path)) as slide:
                drawn = _map(Canvas(slide, slide.info.mpp or 1.0), regions, slide.info.mpp)
        except DataError:
            continue
        found.append(Picture(drawn, PurePath(path).name))
    return found


def _map(canvas: Canvas, regions: Sequence[tuple[int, Region]], mpp: float | None) -> ByteArray:
    from shapely import Polygon  # noqa: PLC0415

    shapes = [Polygon(square(np.array(r.xy), r.side0)) for _, r in regions]
    canvas.outline(shapes, OUTLINE, 3)
    image = Image.fromarray(canvas.pixels)
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(size=max(16, image.height // 50))
    for number, region in reversed(regions):
        x, y = canvas.place(np.array(region.xy)).tolist()
        box = draw.textbbox((x + 4, y + 3), str(number), font)
        draw.rectangle((x, y, box[2] + 4, box[3] + 3), "white", OUTLINE)
        draw.text((x + 4, y + 3), str(number), "black", font)
    canvas.pixels = np.array(image)
    if mpp:
        canvas.scale_bar()
    return canvas.pixels

"""What a search found in; a page, tables, similarity maps and objects for QuPath out."""

from __future__ import annotations

import csv
import io
import logging
import re
from contextlib import closing
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pathcli.errors import DataError
from pathcli.evals.tile_sheet import MARK, sheet
from pathcli.report import Picture, Section, html_page, json_text, metric, pairs, versions
from pathcli.runs import git_commit
from pathcli.slides.geojson import feature, save_features, square
from pathcli.slides.overlay import OUTLINE, Canvas, percentile, save_png, value_legend
from pathcli.slides.readers import open_slide, public_name
from pathcli.slides.tiling import read_tile
from pathcli.store.files import write_bytes
from pathcli.types import NOTICE, Report, digest

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from shapely import Polygon

    from pathcli.encoders.search import Compared, Found, Hit
    from pathcli.types import ByteArray, Slide

log = logging.getLogger("pathcli")

MAPS = 12
"""How many similarity maps the page shows; all are files beside it."""

_CAUTION = (
    "A search always finds something: the order says which tiles are nearest to the text, not "
    "that it is true of them. Cosines compare tiles for one text; of two texts or two encoders "
    "they do not say which fits better."
)


def folder_name(found: Found) -> str:
    """Return the name of the folder for a question: other words or tiles, another folder."""
    words = "-".join(re.findall(r"\w+", found.text.lower()))[:40].strip("-") or "text"
    tiles = found.slides[0].run.key.tiles
    return f"search-{words}-{digest([found.text, found.negatives, found.encoder, tiles])[:6]}"


class Written(NamedTuple):
    """The page, the files of each slide, and why some slides have no pictures."""

    page: Path
    files: list[dict[str, str]]
    unseen: list[str]


def write_found(folder: Path, found: Found, command: str) -> Written:
    """Write everything a search has to show; return where.

    The page `report.html`, `report.json`, `tiles.csv` and `tiles.png`, and for each slide
    `ITEM.similarity.png` and `ITEM.tiles.geojson`. A slide whose pixels cannot be read again
    has no picture, and the page says so.

    Raises:
        ResourceError: the disk is full, or the folder may not be written.
    """
    seen: dict[int, ByteArray] = {}
    maps: dict[int, ByteArray] = {}
    written = Written(folder / "report.html", [], [])
    best = list(dict.fromkeys(hit.slide for hit in found.hits))
    shown = [*best, *(set(range(len(found.slides))) - set(best))][:MAPS]
    for i, slide in enumerate(found.slides):
        try:
            drawn, pixels, paths = _draw(folder, found, i)
        except DataError as error:
            log.debug("not shown: %s", error)
            written.unseen.append(f"no pictures of {_name(slide)}: {error}")
            written.files.append({})
            continue
        written.files.append(paths)
        seen |= pixels
        if i in shown:
            maps[i] = drawn
    hits = [hit for hit in found.hits if hit.rank in seen]
    grid = sheet([seen[h.rank] for h in hits], [_caption(found, h) for h in hits]) if hits else None
    if grid is not None:
        save_png(folder / "tiles.png", grid)
    warnings = [*found.warnings, *written.unseen]
    pictures = {i: maps[i] for i in shown if i in maps}
    sections = list(_sections(found, grid, pictures, warnings, command))
    report = search_report(found)
    for name, text in {
        "tiles.csv": _csv(found),
        "report.json": json_text(report),
        written.page.name: html_page(report.title, _lead(found), sections),
    }.items():
        data = text.encode("utf-8", "backslashreplace")
        write_bytes(folder / name, data, lambda _: None, "--out")
    return written


def hit_rows(found: Found) -> list[dict[str, Any]]:
    """Return a row a tile found, plain values; `x` and `y` are its level-0 corner."""
    rows = []
    for hit in found.hits:
        slide = found.slides[hit.slide]
        row: dict[str, Any] = {
            "rank": hit.rank,
            "slide": public_name(slide.run.tiling.path),
            "item": slide.run.key.item,
            "x": hit.xy[0],
            "y": hit.xy[1],
            "side": round(slide.run.tiling.tiles.side0, 1),
            "score": round(hit.score, 4),
            "cosine": round(hit.cosine, 4),
            "higher_than": round(hit.higher_than, 4),
            "familiar": None if hit.strange is None else not hit.strange,
        }
        rows.append(row)
    return rows


def shown_rows(found: Found) -> list[dict[str, Any]]:
    """Return the same rows as a person reads them: the columns that say something here."""
    rows = []
    for hit in found.hits:
        slide = Path(public_name(found.slides[hit.slide].run.tiling.path)).name
        row: dict[str, Any] = {"rank": hit.rank, "slide": slide}
        row |= {"x": str(hit.xy[0]), "y": str(hit.xy[1]), "cosine": f"{hit.cosine:.3f}"}
        row |= {"score": f"{hit.score:+.3f}"} if found.negatives else {}
        row |= {"higher than": f"{hit.higher_than:.1%} of the slide"}
        row |= {} if hit.strange is None else {"familiar": "no" if hit.strange else "yes"}
        rows.append(row)
    return rows


def slide_rows(found: Found) -> list[dict[str, Any]]:
    """Return a row a slide: its tiles, how many were found, and the range of its scores."""
    rows = []
    for i, slide in enumerate(found.slides):
        scores = slide.score[slide.readable]
        low, middle, high = (f"{v:.3f}" for v in np.quantile(scores, [0, 0.5, 1]))
        row: dict[str, Any] = {"slide": _name(slide), "tiles": f"{len(scores):,}"}
        row |= {"found": sum(hit.slide == i for hit in found.hits)}
        row |= {f"lowest {_value(found)}": low, "median": middle, "highest": high}
        if slide.strange is not None:
            row |= {"unfamiliar": f"{slide.strange.sum() / len(scores):.0%}"}
        rows.append(row)
    return rows


def search_report(found: Found) -> Report:
    """Return the numbers of a search, its tiles as rows, and where all came from."""
    tiles = sum(int(slide.readable.sum()) for slide in found.slides)
    strange = [int(s.strange.sum()) for s in found.slides if s.strange is not None]
    return Report(
        title=f"Tiles nearest to “{_short(found)}”",
        metrics={
            "slides": metric(len(found.slides)),
            "tiles": metric(tiles),
            "found": metric(len(found.hits)),
            "passed_over": metric(found.passed_over),
            "unfamiliar_share": metric(round(sum(strange) / tiles, 4) if strange else None),
        },
        rows=tuple(hit_rows(found)),
        provenance={
            "text": found.text,
            "not": list(found.negatives),
            "encoder": found.encoder,
            "duplicates": found.duplicates,
            "tiles": found.slides[0].run.tiling.tiles.spec.to_json(),
            "tiles_digest": found.slides[0].run.key.tiles,
            "items": [slide.run.key.stem for slide in found.slides],
            "warnings": list(found.warnings),
            "git": git_commit(),
            "versions": versions(),
        },
    )


def _draw(
    folder: Path, found: Found, i: int
) -> tuple[ByteArray, dict[int, ByteArray], dict[str, str]]:
    """Write the map and the objects of slide `i`; return the map, tiles by rank, and paths."""
    compared = found.slides[i]
    tiles = compared.run.tiling.tiles
    hits = [hit for hit in found.hits if hit.slide == i]
    picture, objects = (
        folder / f"{compared.run.key.stem}.{name}" for name in ("similarity.png", "tiles.geojson")
    )
    with closing(open_slide(compared.run.tiling.path)) as slide:
        drawn = _map(slide, found, compared, hits)
        pixels = {h.rank: read_tile(slide, h.xy, tiles.spec, tiles.slide_mpp) for h in hits}
        features = [_object(found, hit, slide, tiles.side0) for hit in hits]
    save_png(picture, drawn)
    save_features(objects, features)
    return drawn, pixels, {"map": str(picture), "geojson": str(objects)}


def _map(slide: Slide, found: Found, compared: Compared, hits: Sequence[Hit]) -> ByteArray:
    """Return the scan tinted by percentile rank, the tiles found outlined and numbered."""
    scores = compared.score[compared.readable]
    canvas = Canvas(slide, compared.run.tiling.tiles.slide_mpp)
    canvas.tint(compared.tiles, percentile(scores) / 100)
    side = compared.run.tiling.tiles.side0
    canvas.outline([_polygon(hit, side) for hit in hits], OUTLINE, 3)
    canvas.pixels = _numbered(canvas, hits)
    canvas.scale_bar()
    outlined = "found, with its rank" if hits else ""
    legend = value_legend(canvas.pixels.shape[1], scores, _value(found), outlined, digits=3)
    return np.vstack([canvas.pixels, legend])


def _polygon(hit: Hit, side0: float) -> Polygon:
    from shapely import Polygon  # noqa: PLC0415 - beside its use in annotations alone

    return Polygon(square(np.array(hit.xy), side0))


def _numbered(canvas: Canvas, hits: Sequence[Hit]) -> ByteArray:
    """Return the picture with each hit's rank at its tile's corner, best on top."""
    image = Image.fromarray(canvas.pixels)
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(size=max(16, image.height // 50))
    for hit in reversed(hits):
        x, y = canvas.place(np.array(hit.xy)).tolist()
        box = draw.textbbox((x + 4, y + 3), str(hit.rank), font)
        draw.rectangle((x, y, box[2] + 4, box[3] + 3), "white", OUTLINE)
        draw.text((x + 4, y + 3), str(hit.rank), "black", font)
    return np.array(image)


def _object(found: Found, hit: Hit, slide: Slide, side0: float) -> dict[str, Any]:
    """Return a tile found as an annotation that QuPath lists by rank."""
    measured = {"rank": hit.rank, "score": round(hit.score, 6), "cosine": round(hit.cosine, 6)}
    measured |= {"higher than": round(hit.higher_than, 6)}
    measured |= {} if hit.strange is None else {"familiar": int(not hit.strange)}
    looks = {"name": "Search", "color": list(MARK)}
    more = {"name": f"{hit.rank}: {_short(found)}", "classification": looks}
    more |= {"measurements": measured}
    return feature([square(np.array(hit.xy), side0)], slide.info.bounds, "annotation", more)


def _caption(found: Found, hit: Hit) -> list[str]:
    score = f"score {hit.score:+.3f}" if found.negatives else f"cosine {hit.cosine:.3f}"
    lines = [f"{hit.rank}   {score}", _name(found.slides[hit.slide])]
    lines += [f"x {hit.xy[0]}, y {hit.xy[1]}"]
    return [*lines, "unfamiliar"] if hit.strange else lines


def _name(slide: Compared) -> str:
    return Path(public_name(slide.run.tiling.path)).name


def _short(found: Found) -> str:
    return shorten(found.text, 100, placeholder="...")


def _value(found: Found) -> str:
    return "score" if found.negatives else "cosine"


def _lead(found: Found) -> str:
    tiles = sum(int(slide.readable.sum()) for slide in found.slides)
    slides = f"{len(found.slides)} slides" if len(found.slides) > 1 else "one slide"
    name = found.encoder.rpartition("-")[0]
    lead = f"{name} compared the text with {tiles:,} tiles of {slides}. "
    if found.negatives:
        unlike = " and ".join(f"“{text}”" for text in found.negatives)
        lead += f"The score is the cosine with the text less that with {unlike}. "
    return lead + _CAUTION


def _sections(
    found: Found,
    grid: ByteArray | None,
    maps: Mapping[int, ByteArray],
    warnings: Sequence[str],
    command: str,
) -> Iterator[Section]:
    """Yield the parts of the page."""
    if warnings:
        yield Section("Mind this", rows=[{"warning": text} for text in warnings])
    nearest = [] if grid is None else [Picture(grid, "The nearest tiles, best first.", strip=True)]
    yield Section("The nearest tiles", _ranked(found), pictures=nearest)
    where = "x and y are level-0 pixels of a tile's corner."
    yield Section("The same as a table", where, rows=shown_rows(found))
    told = (
        "Colours rank the tiles of one slide among themselves; the numbers of the legend and of "
        "the table compare slides."
    )
    if len(maps) < len(found.slides):
        told += f" {len(maps)} of {len(found.slides)} maps are shown; all lie beside this page."
    drawn = [Picture(maps[i], _name(found.slides[i])) for i in maps]
    yield Section("Where they are", told, rows=slide_rows(found), pictures=drawn)
    spec = found.slides[0].run.tiling.tiles.spec
    facts = {
        "text": found.text,
        **({"not": " | ".join(found.negatives)} if found.negatives else {}),
        "encoder": found.encoder,
        "tiles": f"{spec.size_px} px at {spec.mpp:g} um per pixel ({spec.digest})",
        "near-duplicates from": f"{found.duplicates:g}" if found.duplicates < 1 else "never",
        "git": git_commit(),
    }
    yield Section("To repeat it", code=command, rows=pairs(facts | versions()))


def _ranked(found: Found) -> str:
    text = f"{len(found.hits)} tiles, ranked over all slides together by {_value(found)}. "
    if found.duplicates < 1:
        text += (
            f"Near-duplicates passed over before the last one: {found.passed_over:,} (of a "
            f"cosine of {found.duplicates:g} or more with a better one). "
        )
    if any(hit.strange for hit in found.hits):
        text += "Tiles in an orange frame are unlike what the encoder was trained on."
    return text


def _csv(found: Found) -> str:
    text = io.StringIO()
    rows = hit_rows(found)
    writer = csv.DictWriter(text, [*rows[0], "note"])
    writer.writeheader()
    writer.writerows(row | {"note": NOTICE} for row in rows)
    return text.getvalue()

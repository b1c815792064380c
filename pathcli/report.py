"""Rows, metrics and pictures in, one self-contained HTML page and one JSON file out."""

from __future__ import annotations

import base64
import html
import io
import json
import platform
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from pathcli import __version__
from pathcli.types import NOTICE, Report

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pathcli.types import ByteArray

_STYLE = """
:root { --ink: #1c2024; --soft: #60646c; --line: #d9dbe0; --paper: #fff; --accent: #0072b2; }
* { box-sizing: border-box; }
body { font: 16px/1.55 system-ui, sans-serif; color: var(--ink); background: var(--paper);
       max-width: 68rem; margin: 0 auto; padding: 2.5rem 1.5rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .4rem; }
h2 { font-size: 1.2rem; margin: 2.6rem 0 .6rem; padding-top: .8rem;
     border-top: 1px solid var(--line); }
p { max-width: 46rem; } p.notice { color: #9a3412; font-weight: 600; }
p.alert { color: #c40000; font-weight: 600; }
table { border-collapse: collapse; margin: .8rem 0; font-size: .92rem; }
th, td { text-align: left; padding: .3rem 1.2rem .3rem 0; vertical-align: top;
         border-bottom: 1px solid var(--line); overflow-wrap: break-word; }
th { color: var(--soft); font-weight: 600; }
pre { background: #f4f5f7; padding: .6rem .9rem; white-space: pre-wrap;
      overflow-wrap: anywhere; }
.pictures { display: flex; flex-wrap: wrap; gap: 1rem; }
figure { margin: .6rem 0; flex: 1 1 20rem; } figure.strip { flex-basis: 100%; }
figure svg { max-width: 100%; height: auto; }
figure img { max-width: 100%; border: 1px solid var(--line); display: block; }
figcaption { color: var(--soft); font-size: .9rem; margin-top: .3rem; }
.swatch { display: inline-block; width: .8em; height: .8em; border-radius: 2px;
          margin-right: .4em; }
"""


@dataclass(frozen=True)
class Picture:
    """A picture of a report: uint8 RGB [h, w, 3] and the sentence under it.

    `colour` puts a swatch before the sentence; a `strip` takes the page's whole width.
    """

    pixels: ByteArray
    caption: str
    colour: tuple[int, int, int] | None = None
    strip: bool = False


@dataclass(frozen=True)
class Section:
    """A heading, a sentence or two, a command, a table of flat rows, charts and pictures.

    `charts` are SVG texts, as `pathcli.charts` draws them; `alert` is a sentence in red.
    """

    title: str
    text: str = ""
    code: str = ""
    rows: Sequence[Mapping[str, Any]] = ()
    charts: Sequence[str] = ()
    pictures: Sequence[Picture] = ()
    alert: str = ""


def metric(
    value: float | None,
    low: float | None = None,
    high: float | None = None,
    n: int | None = None,
) -> dict[str, float | None]:
    """Return one metric in the form every report and `--json` uses; None is undefined."""
    return {"value": value, "low": low, "high": high, "n": n}


def pairs(values: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a mapping as rows of a table."""
    return [{"what": name, "value": value} for name, value in values.items()]


def versions() -> dict[str, str]:
    """Return the versions that decide what a run gives."""
    names = ("torch", "timm", "open_clip_torch", "openslide-python", "numpy", "scikit-learn")
    here = {"pathcli": __version__, "python": platform.python_version()}
    return here | {name: version(name) for name in names}


def as_json(report: Report) -> dict[str, Any]:
    """Return a report as one JSON object."""
    return {
        "title": report.title,
        "metrics": {name: dict(value) for name, value in report.metrics.items()},
        "rows": [dict(row) for row in report.rows],
        "provenance": dict(report.provenance),
        "notice": NOTICE,
    }


def json_text(report: Report) -> str:
    """Return a report as the text of its JSON file."""
    return json.dumps(as_json(report), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def html_page(title: str, lead: str, sections: Sequence[Section]) -> str:
    """Return a page that needs nothing beside itself: styles and pictures are inside it."""
    body = "\n".join(_section(section) for section in sections)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title><style>{_STYLE}</style></head>
<body><h1>{html.escape(title)}</h1><p>{html.escape(lead)}</p>
<p class="notice">{html.escape(NOTICE)}</p>
{body}
</body></html>
"""


def _section(section: Section) -> str:
    parts = [f"<h2>{html.escape(section.title)}</h2>"]
    if section.text:
        parts.append(f"<p>{html.escape(section.text)}</p>")
    if section.alert:
        parts.append(f'<p class="alert">{html.escape(section.alert)}</p>')
    if section.code:
        parts.append(f"<pre>{html.escape(section.code)}</pre>")
    if section.rows:
        parts.append(_table(section.rows))
    if section.charts:
        inner = "\n".join(f"<figure>{svg}</figure>" for svg in section.charts)
        parts.append(f'<div class="pictures">{inner}</div>')
    if section.pictures:
        inner = "\n".join(_figure(picture) for picture in section.pictures)
        parts.append(f'<div class="pictures">{inner}</div>')
    return "\n".join(parts)


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    head = "".join(f"<th>{html.escape(name)}</th>" for name in columns)
    lines = [
        "".join(f"<td>{html.escape(str(row.get(name, '')))}</td>" for name in columns)
        for row in rows
    ]
    body = "\n".join(f"<tr>{line}</tr>" for line in lines)
    return f"<table><tr>{head}</tr>\n{body}</table>"


def _figure(picture: Picture) -> str:
    from PIL import Image  # noqa: PLC0415 - only when there are pictures

    memory = io.BytesIO()
    Image.fromarray(picture.pixels).save(memory, "JPEG", quality=88)
    data = base64.b64encode(memory.getvalue()).decode()
    swatch = ""
    if picture.colour:
        swatch = f'<span class="swatch" style="background:rgb{picture.colour}"></span>'
    kind = ' class="strip"' if picture.strip else ""
    caption = html.escape(picture.caption)
    return (
        f'<figure{kind}><img alt="{caption}" src="data:image/jpeg;base64,{data}">'
        f"<figcaption>{swatch}{caption}</figcaption></figure>"
    )

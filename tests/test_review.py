"""Records on a page, a person's decisions in a file, and the file without what was dropped."""

from __future__ import annotations

import base64
import io
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import browser
import numpy as np
import pytest
from browser import Browser
from conftest import Run
from pictures import three_images, write
from PIL import Image

from pathcli.curation.review import apply_review, record_id, write_review
from pathcli.data.formats import TALKS, Source, samples
from pathcli.data.writers import write_samples
from pathcli.errors import DataError, UsageError
from pathcli.types import Region, Sample

EVIL = '</script><img src=x onerror="window.evil=1"><script>window.evil=1</script>&amp;\u2028<!--'


@pytest.fixture
def table(tmp_path: Path) -> Path:
    three_images(tmp_path)
    names = ("a.png", "sub/b.png", "c.png", "a.png")
    texts = ("Gland", EVIL, "Stroma", "Nerve")
    rows = [{"image": n, "caption": t} for n, t in zip(names, texts, strict=True)]
    return write(tmp_path / "t.csv", rows)


def records(page: Path) -> list[dict[str, Any]]:
    text = page.read_text(encoding="utf-8")
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text)
    return list(json.loads(data)["records"])


def back(path: Path) -> list[Sample]:
    return list(samples(Source(path), "auto", TALKS))


def decisions(path: Path, rows: list[tuple[Sample, str, str]]) -> Path:
    lines = [
        {"id": record_id(s), "decision": d, "text": t, "original": s.answer} for s, d, t in rows
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


# --- the page ----------------------------------------------------------------------------


def test_the_page_holds_its_images_and_no_text_as_html(tmp_path: Path, table: Path) -> None:
    told = write_review(table, tmp_path / "page.html")
    assert (told["records"], told["of"], told["broken_images"]) == (4, 4, 0)
    text = (tmp_path / "page.html").read_text()
    assert text.count("<script") == text.count("</script") == 2
    assert "http://" not in text
    assert "https://" not in text
    found = records(tmp_path / "page.html")
    assert [each["original"] for each in found] == ["Gland", EVIL, "Stroma", "Nerve"]
    data = base64.b64decode(found[1]["images"][0]["data"].partition(",")[2])
    pixels = np.asarray(Image.open(io.BytesIO(data)))
    assert abs(pixels.astype(int) - [1, 0, 0]).max() < 6


def test_large_images_are_made_smaller_and_broken_ones_told(tmp_path: Path) -> None:
    Image.new("RGB", (2000, 1000)).save(tmp_path / "big.png")
    (tmp_path / "bad.png").write_text("no image")
    rows = [{"image": n, "caption": "Text"} for n in ("big.png", "bad.png")]
    told = write_review(write(tmp_path / "t.csv", rows), tmp_path / "page.html")
    assert told["broken_images"] == 1
    big, bad = (each["images"][0] for each in records(tmp_path / "page.html"))
    data = base64.b64decode(big["data"].partition(",")[2])
    assert Image.open(io.BytesIO(data)).size == (640, 320)
    assert "bad.png: not an image" in bad["fault"]


def test_a_sample_is_drawn_by_its_seed_and_stays_in_order(tmp_path: Path) -> None:
    three_images(tmp_path)
    write(tmp_path / "t.csv", [{"image": "a.png", "caption": f"{n:03d}"} for n in range(60)])

    def drawn(seed: int) -> list[str]:
        write_review(tmp_path / "t.csv", tmp_path / "page.html", sample=20, seed=seed)
        return [each["original"] for each in records(tmp_path / "page.html")]

    first = drawn(0)
    assert len(set(first)) == 20
    assert first == sorted(first) == drawn(0)
    assert drawn(1) != first
    assert max(first) > "029"  # not the first ones alone


# --- the decisions -----------------------------------------------------------------------


def test_decisions_are_applied_and_the_rest_stays(tmp_path: Path, table: Path) -> None:
    first, second, third, _ = back(table)
    made = decisions(
        tmp_path / "d.jsonl",
        [(first, "keep", "x"), (second, "edit", " Mucosa "), (third, "drop", "x")],
    )
    done = apply_review(table, made, tmp_path / "r.jsonl")
    assert dict(done.counts) == {"keep": 1, "edit": 1, "drop": 1, "undecided": 1}
    assert [s.answer for s in back(tmp_path / "r.jsonl")] == ["Gland", "Mucosa", "Nerve"]


def test_the_later_of_two_decisions_stays(tmp_path: Path, table: Path) -> None:
    first = back(table)[0]
    made = decisions(tmp_path / "d.jsonl", [(first, "drop", "x"), (first, "keep", "x")])
    assert apply_review(table, made, tmp_path / "r.jsonl").counts["keep"] == 1


def test_regions_stay_regions(tmp_path: Path, slide_path: Path) -> None:
    given = [
        Sample(f"painted_{x}_0", (Region(str(slide_path), (x, 0), 672),), f"Text {x}")
        for x in (0, 96)
    ]
    write_samples(given, tmp_path / "x.json", "pathgen")
    read = back(tmp_path / "x.json")
    made = decisions(tmp_path / "d.jsonl", [(read[0], "drop", "x")])
    apply_review(tmp_path / "x.json", made, tmp_path / "r.json")
    assert back(tmp_path / "r.json") == read[1:]


def test_decisions_of_another_file_are_refused(tmp_path: Path, table: Path) -> None:
    first = back(table)[0]
    made = decisions(tmp_path / "d.jsonl", [(first, "keep", "x")])
    table.write_text(table.read_text(encoding="utf-8-sig").replace("Gland", "Glands"))
    with pytest.raises(DataError, match="1 of 1 decisions are of records that are not in the file"):
        apply_review(table, made, tmp_path / "r.jsonl")
    assert not (tmp_path / "r.jsonl").exists()
    (tmp_path / "bad.jsonl").write_text('{"id": "x", "decision": "maybe", "text": "t"}')
    with pytest.raises(DataError, match=r"bad\.jsonl: record 1 is no decision"):
        apply_review(table, tmp_path / "bad.jsonl", tmp_path / "r.jsonl")
    with pytest.raises(UsageError, match="written over the reviewed file"):
        apply_review(table, made, table)


def test_the_command_writes_the_page_and_applies_what_it_exports(
    tmp_path: Path, table: Path, run: Run
) -> None:
    page = tmp_path / "page.html"
    code, stdout, _ = run("data", "review", table, "--out", page, "--sample", 2, "--json")
    assert code == 0
    assert json.loads(stdout)["records"] == 2
    code, _, err = run("data", "review", table, "--out", tmp_path / "page.txt")
    assert code == 2
    assert "a page is called .html" in err
    made = decisions(tmp_path / "d.jsonl", [(back(table)[0], "drop", "x")])
    out = tmp_path / "r.jsonl"
    code, stdout, _ = run("data", "review", table, "--apply", made, "--out", out, "--json")
    assert code == 0
    assert json.loads(stdout)["decisions"] == {"drop": 1, "undecided": 3}
    assert len(back(out)) == 3


# --- in a browser ------------------------------------------------------------------------


@pytest.fixture
def chromium(tmp_path: Path) -> Iterator[Browser]:
    program = browser.find()
    if program is None:
        pytest.skip(f"no browser: none of {', '.join(browser.NAMES)} is installed")
    opened = Browser(program, tmp_path / "profile", tmp_path)
    yield opened
    opened.close()


def count(page: Browser) -> str:
    return str(page.value("document.getElementById('count').textContent")).partition("; ")[2]


@pytest.mark.slow
def test_a_decision_made_in_the_browser_comes_back_in_the_file(
    tmp_path: Path, table: Path, chromium: Browser
) -> None:
    page = tmp_path / "page.html"
    write_review(table, page)
    chromium.open(page)
    assert count(chromium) == "decided 0: 0 kept, 0 edited, 0 dropped"
    chromium.click("#keep")  # the first, by mouse
    shown = "document.getElementById('text').value"
    assert chromium.value(shown) == EVIL  # as text, whatever it says
    assert chromium.value("window.evil") is None
    assert chromium.value("document.querySelectorAll('img').length") == 1
    assert chromium.value("document.querySelector('img').naturalWidth") == 4
    chromium.press("d")  # the second, by key
    chromium.press("e")  # the third: its text anew
    chromium.value("document.getElementById('text').select()")
    chromium.type("Dense stroma; kept d\u00e9cid\u00e9ment")
    chromium.press("Enter", modifiers=2)
    assert count(chromium) == "decided 3: 1 kept, 1 edited, 1 dropped"
    chromium.press("e")  # the fourth: begun and left
    chromium.type("Something else")
    chromium.press("Escape")
    assert chromium.value(shown) == "Nerve"

    stored = "JSON.parse(Object.values(localStorage)[0]).made"
    assert len(chromium.value(stored)) == 3
    chromium.value("localStorage.clear()")  # as a browser that is slow to keep what it is told
    chromium.reload()
    assert count(chromium) == "decided 3: 1 kept, 1 edited, 1 dropped"  # progress was kept
    chromium.click("#export")
    exported = tmp_path / "page.decisions.jsonl"
    until = time.monotonic() + 30
    while not (exported.is_file() and exported.stat().st_size):
        assert time.monotonic() < until, "nothing was exported"
        time.sleep(0.05)
    made = [json.loads(line) for line in exported.read_text(encoding="utf-8").splitlines()]
    first, second, third, _ = back(table)
    edited = "Dense stroma; kept d\u00e9cid\u00e9ment"
    assert made == [
        {"id": record_id(s), "decision": d, "text": t, "original": s.answer}
        for s, d, t in (
            (first, "keep", "Gland"),
            (second, "drop", EVIL),
            (third, "edit", edited),
        )
    ]
    apply_review(table, exported, tmp_path / "r.jsonl")
    assert [s.answer for s in back(tmp_path / "r.jsonl")] == ["Gland", edited, "Nerve"]

"""What comes before a slide is read, how its tiles are compared, and the words above the sheet."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Run
from scipy.cluster.vq import kmeans2
from test_ask_slide import asked, board, kept

from pathcli.evals import evidence, tile_sheet
from pathcli.vlm.slide_tiles import _centres, cosines, units

__all__ = ["asked", "board", "kept"]  # fixtures


def test_centres_and_cosines_are_those_of_scipy_and_numpy() -> None:
    rng = np.random.default_rng(0)
    kinds = rng.normal(size=(9, 16))[rng.integers(0, 9, 1500)]
    values = (kinds + rng.normal(size=(1500, 16)) * 0.5).astype(np.float16)
    values[7] = 0
    rows = np.flatnonzero(np.arange(1500) % 5 != 3)  # some are missing, others lie side by side
    unit = units(values)
    lengths = np.linalg.norm(unit, axis=1)
    assert lengths == pytest.approx((np.arange(1500) != 7).astype(float))
    for given in (rows, np.arange(1500)):
        assert cosines(values, given, unit[0]) == pytest.approx(unit[given] @ unit[0], abs=1e-6)
    unit = np.delete(unit, 7, 0)  # as far from nothing as from all
    starts = [int(((unit - unit.mean(0)) ** 2).sum(1).argmin())]
    while len(starts) < 6:
        away = ((unit[:, None] - unit[starts]) ** 2).sum(2).min(1)
        starts.append(int(away.argmax()))
    wanted, _ = kmeans2(unit, unit[starts], minit="matrix")
    assert _centres(unit, 6) == pytest.approx(wanted, abs=1e-5)


def test_what_is_wrong_with_a_call_about_a_slide_is_said_before_the_model_is_opened(
    tmp_path: Path, board: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[int] = []
    monkeypatch.setattr("pathcli.vlm.responders.open_responder", lambda *_, **__: opened.append(1))
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip" / "recipe.yaml").write_text("version: 1\ntask: contrastive\n")
    facts = {"metrics": {}, "provenance": {"recipe": "clip", "facts": {}}}
    (tmp_path / "clip" / "report.json").write_text(json.dumps(facts))
    for given, code, text in (
        (["--encoder", "mini-clipp"], 2, "mini-clip"),
        (["--encoder", "lite0"], 2, "no text tower"),
        (["--attend", str(tmp_path / "none")], 5, "is no run"),
        (["--attend", str(tmp_path / "clip")], 2, "a run of the task contrastive; name one of"),
    ):
        found, _, err = run("ask", str(board), "is there red?", *given)
        assert (found, text in err) == (code, True), err
    for given in (["--encoder", "mini-clip"], ["--budget", "4"], ["--store", str(tmp_path)]):
        found, _, err = run("ask", str(tmp_path / "x.png"), "what?", *given)
        assert (found, f"{given[0]} is for slides, not for images" in err) == (2, True), err
    assert not opened


def test_a_sheet_bears_question_answer_and_notice(
    asked: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[list[str]] = []
    real = tile_sheet.sheet
    monkeypatch.setattr(evidence, "sheet", lambda *a: drawn.append(a[2]) or real(*a))
    picture = evidence.evidence_sheet(asked("is there red?"))
    notice = "Research use only; not for diagnosis."
    assert drawn[0] == ["a.svs: is there red?", "painter: yes", notice]
    assert (picture[:40] < 100).any()  # words where the tiles began before
    words = ["so " * 200, "a" * 400]
    tiles = [np.full((9, 9, 3), 255, np.uint8)]
    high, plain = real(tiles, [["1"]], words), real(tiles, [["1"]])
    assert high.shape[1] == plain.shape[1]  # lines are broken, the picture is as wide
    assert (high[: len(high) - len(plain), -tile_sheet.GAP :] == 255).all()

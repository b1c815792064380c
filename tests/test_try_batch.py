"""What `recipes check --batch` makes of a recipe."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from test_runs import Tiny, _tiny, recipe

from pathcli.runs import try_batch

__all__ = ["_tiny"]  # a fixture


@pytest.mark.parametrize(("given", "rows"), [({"batch": 1000}, 4), ({"batch": 3}, 3)])
def test_check_with_batch_makes_four_rows_at_most(
    given: dict[str, int], rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin, made = Tiny.begin, []

    def collate(examples: list[float], rng: np.random.Generator) -> list[float]:
        made.append(len(examples))
        return examples

    monkeypatch.setattr(
        Tiny,
        "begin",
        lambda self, seed: replace(begin(self, seed), examples=[1.0] * 2000, collate=collate),
    )
    assert try_batch(recipe(**given))["examples"] == 2000
    assert made == [rows]

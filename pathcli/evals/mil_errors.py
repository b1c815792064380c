"""The most confident errors of an evaluation, with the tiles that were attended most."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from pathcli.errors import DataError, PathcliError
from pathcli.mil.bags import Bags
from pathcli.mil.heatmap import extreme_tiles, strip
from pathcli.mil.task import load_head, predict_bags
from pathcli.report import Picture, Section
from pathcli.slides.readers import open_slide

if TYPE_CHECKING:
    from pathcli.evals.mil import Evaluation
    from pathcli.evals.mil_scores import Scores, Tested
    from pathcli.types import Bag, ByteArray

WORST = 5
TILES = 8


def worst_errors(found: Evaluation) -> list[Section]:
    """Return a section for each head that errs: its first seed's most confident errors."""
    sections = []
    for scores in found.heads:
        first = scores.tested[0]
        own = first.chances[np.arange(len(first.labels)), first.labels]
        wrong = [i for i in np.argsort(own) if first.chances[i].argmax() != first.labels[i]]
        if not wrong:
            continue
        shown = [_error(scores, first, int(i)) for i in wrong[:WORST]]
        title = f"Worst errors of {scores.name}, seed {first.run.seed} ({len(wrong)} in all)"
        pictures = [picture for _, picture in shown if picture]
        sections.append(Section(title, rows=[row for row, _ in shown], pictures=pictures))
    return sections


def _error(scores: Scores, tested: Tested, i: int) -> tuple[dict[str, str], Picture | None]:
    name, classes = tested.names[i], scores.cohort.table.classes
    said = int(tested.chances[i].argmax())
    row = {
        "bag": name,
        "truth": classes[int(tested.labels[i])],
        "said": f"{classes[said]} ({tested.chances[i][said]:.2f})",
    }
    rows = scores.cohort.table.rows
    slides = [r.slide for r in rows if name == (r.case if _of_patients(tested) else r.slide)]
    bag = Bags(scores.cohort, slides, tested.run.facts["bag"])[0]
    try:
        tiles = _attended(scores, tested, bag)
    except KeyError:
        return row | {"tiles": "not shown: the slide's card or tiles are not in the store"}, None
    except PathcliError as error:
        return row | {"tiles": f"not shown: {error}"}, None
    caption = f"{name}: most attended tiles of {bag.slides[0]}"
    return row | {"tiles": "below"}, Picture(tiles, caption, strip=True)


def _of_patients(tested: Tested) -> bool:
    return bool(tested.run.facts["bag"] == "patient")


def _attended(scores: Scores, tested: Tested, bag: Bag) -> ByteArray:
    """Return the most attended tiles of a bag's first slide, read where it was last seen.

    Raises:
        DataError: another file is there now.
    """
    said = next(predict_bags(load_head(tested.run), [bag], torch.device("cpu")))
    store, key = scores.cohort.store, scores.cohort.keys[bag.slides[0]]
    path = Path(store.slides()[key.item]["last_seen"])
    cut = store.tiles[replace(key, encoder=None)]
    tiles = replace(cut, status=store.features.mapped(key).status)
    with closing(open_slide(path)) as slide:
        if slide.info.item != key.item:
            msg = f"{path} is another slide now"
            raise DataError(msg)
        most, _ = extreme_tiles(slide, tiles, said.attention[bag.slide_of == 0], TILES)
        return strip([tile.pixels for tile in most], TILES)

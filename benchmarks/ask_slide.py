r"""Is there tumor? Slides of known lesions are asked, a rule is fitted on some, and told of others.

    python benchmarks/ask_slide.py DATA OUT --split val --mosaics 60 --fit
    python benchmarks/ask_slide.py DATA OUT --split test --mosaics 120 --report

Mosaics (lung_mosaics.py) are laid from the groups of one side of lung-split.csv. What was asked
stays in OUT/SPLIT/answers.jsonl, a line a mosaic, and is not asked again. `--fit` chooses the
statistic and the threshold on validation mosaics and writes slide.yaml beside the shipped
model's weights; `--report` prints on test mosaics what that rule says: sensitivity by lesion
share, specificity, and the share of the tiles read that lie in the planted outline, beside that
of random tiles. A site is a pool of original tiles that its mosaics share, so what is not a
plain share is drawn anew by site. Mosaics are no patients.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import lung_mosaics
import numpy as np

from pathcli.encoders.build import build_encoder
from pathcli.encoders.embedding import Embedder
from pathcli.metrics.statistics import Interval, bootstrap, wilson
from pathcli.mil.lesions import inside
from pathcli.slides.annotations import read_lesions
from pathcli.store import Store
from pathcli.types import TileSpec, TileStatus
from pathcli.vlm.responders import open_responder
from pathcli.vlm.slide import BUDGET, SlideAsker
from pathcli.vlm.slide_rules import STATISTICS, Presence
from pathcli.weights import fetch
from pathcli.yaml12 import dump_yaml

QUESTION = "is there tumor?"
WORDS = ("tumor", "tumour", "cancer", "malignan")
BINS = (0.0, 0.01, 0.03, 0.1, 1.0)  # lesion shares of the tissue tiles
CHOSEN = ("similar", "spread")


@dataclass(frozen=True)
class Asked:
    """A mosaic and what was read of it.

    `tiles` are (why it was chosen, P(yes), is it lesion) of those read, `share` is the lesion's
    share of all tiles, and `seconds` what choosing and reading took.
    """

    slide: str
    site: str
    tumor: bool
    share: float
    tiles: Sequence[tuple[str, float, bool]]
    unfamiliar: int
    seconds: dict[str, float]

    @property
    def chances(self) -> np.ndarray:
        """Return the tiles' P(yes), float [n]."""
        return np.array([chance for _, chance, _ in self.tiles], float)


# --- asking ------------------------------------------------------------------------------


def ask_all(folder: Path, model: str, budget: int) -> tuple[list[Asked], dict[str, Any]]:
    """Ask each mosaic of a folder that was not asked before; return all, and the conditions."""
    responder = open_responder(model)
    embedder = Embedder(build_encoder("mini-clip"), Store(folder / "store"))
    asker = SlideAsker(QUESTION, responder, embedder, budget=budget, rule=Presence())
    spec = embedder.encoder.native
    here = {
        "version of the model": responder.digest[:12],
        "encoder": embedder.encoder.id,
        "kind of tiles": spec.digest,
        "budget": budget,
    }
    kept = folder / "answers.jsonl"
    lines = kept.read_text(encoding="utf-8").splitlines() if kept.is_file() else []
    known = [json.loads(line) for line in lines]
    done = {k["slide"]: Asked(**k["asked"]) for k in known if k["conditions"] == here}
    with (folder / "labels.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    found = []
    for number, row in enumerate(rows, 1):
        name = row["slide_id"]
        if name not in done:
            done[name] = ask_one(asker, folder, row, spec)
            line = {"slide": name, "conditions": here, "asked": asdict(done[name])}
            with kept.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            print(f"{number}/{len(rows)} {name} {done[name].seconds}", flush=True)
        found.append(done[name])
    return found, here | {"choice of tiles": "plain"}


def ask_one(asker: SlideAsker, folder: Path, row: dict[str, str], spec: TileSpec) -> Asked:
    """Ask one mosaic, and look up which tiles are lesion."""
    path = folder / "slides" / f"{row['slide_id']}.svs"
    outline = folder / "annotations" / f"{row['slide_id']}.xml"
    answer = asker(path, spec=spec)
    run = asker.embedder(path, spec=spec)
    tiles = run.tiling.tiles
    lesions = read_lesions(outline, (0, 0, tiles.width, tiles.height)) if outline.exists() else []
    ill = inside(tiles, lesions) if lesions else np.zeros(len(tiles), bool)
    at = {tuple(xy): bool(is_ill) for xy, is_ill in zip(tiles.xy.tolist(), ill, strict=True)}
    ok = asker.embedder.store.features.mapped(run.key).status == TileStatus.OK
    return Asked(
        slide=row["slide_id"],
        site=row["site"],
        tumor=row["label"] == "tumor",
        share=float(ill[ok].mean()),
        tiles=[(t.chosen, t.probability, at[t.x0, t.y0]) for t in answer.tiles if read(t)],
        unfamiliar=sum(not read(t) for t in answer.tiles),
        seconds={part: round(took, 3) for part, took in answer.seconds.items()},
    )


def read(tile: Any) -> bool:  # noqa: ANN401 - a `Read`
    """Tell whether a tile was answered with yes or no."""
    return bool(tile.answer) and tile.probability is not None


# --- the rule ----------------------------------------------------------------------------


def fit(asked: Sequence[Asked]) -> Presence:
    """Return the statistic and threshold of the best balanced accuracy on these slides.

    Of equally good ones the first statistic, and the threshold in the middle of the widest gap.
    A slide without a tile read is abstained from, and left out.
    """
    kept = [a for a in asked if a.tiles]
    tumor = np.array([a.tumor for a in kept])
    found = []
    for statistic in STATISTICS:
        values = np.array([Presence(statistic).value(a.chances) for a in kept])
        edges = np.unique(np.r_[0.0, values, 1.0])
        cuts = [
            (balanced(values >= (low + high) / 2, tumor), high - low, (low + high) / 2)
            for low, high in pairwise(edges.tolist())
        ]
        good, _, threshold = max(cuts)
        found.append((good, Presence(statistic, threshold)))
    return max(found, key=lambda one: one[0])[1]


def balanced(said: np.ndarray, tumor: np.ndarray) -> float:
    """Return the mean of sensitivity and specificity."""
    return float((said[tumor].mean() + (~said[~tumor]).mean()) / 2)


def fitted(asked: Sequence[Asked], here: dict[str, Any]) -> Presence:
    """Return the rule as it is shipped: with its words, conditions, and how often it was right."""
    rule, kept = fit(asked), [a for a in asked if a.tiles]
    said = np.array([rule.value(a.chances) >= rule.threshold for a in kept])
    tumor = np.array([a.tumor for a in kept])
    right = {}
    for name, mine, truth in (("yes", said, tumor), ("no", ~said, ~tumor)):
        # rule of succession: few slides never make it certain
        right[name] = round(float((mine & truth).sum() + 1) / float(mine.sum() + 2), 4)
    told = f"'{QUESTION}' of {len(kept)} mosaics of LC25000's lung patches, validation groups, "
    return replace(
        rule,
        threshold=round(rule.threshold, 6),
        fitted_on=f"{told}{tumor.sum()} with tumor, by balanced accuracy",
        words=WORDS,
        conditions=here,
        right=right,
    )


def write_rule(path: Path, rule: Presence) -> None:
    """Write a rule as `Presence.read` reads it."""
    head = "# How clover-mini's answers about tiles become one about a slide; see Presence.\n"
    head += "# Written by benchmarks/ask_slide.py; `right` is (right + 1) / (said + 2)\n"
    head += "# on the slides of the fit.\n"
    values = asdict(rule) | {"words": list(rule.words)}
    path.write_text(head + dump_yaml(values), encoding="utf-8")


# --- the report --------------------------------------------------------------------------


def report(asked: Sequence[Asked], rule: Presence) -> dict[str, Any]:
    """Return what a rule says of slides, with intervals."""
    kept = [a for a in asked if a.tiles]
    said = np.array([rule.value(a.chances) >= rule.threshold for a in kept], bool)
    tumor, sites = np.array([a.tumor for a in kept]), [a.site for a in kept]
    shares = np.array([a.share for a in kept])
    found: dict[str, Any] = {
        "rule": f"{rule.statistic} >= {rule.threshold:g}",
        "abstained": len(asked) - len(kept),
        "sensitivity": share_of(said[tumor]),
        "specificity": share_of(~said[~tumor]),
        "balanced accuracy by site": shown(
            bootstrap(lambda rows: balanced(said[rows], tumor[rows]), sites)
        ),
    }
    for low, high in pairwise(BINS):
        rows = tumor & (shares > low) & (shares <= high)
        found[f"sensitivity, lesion {low:.0%}-{high:.0%}"] = share_of(said[rows])
    ill = [a for a in kept if a.tumor]
    for name, of in {"all read": CHOSEN, **{why: (why,) for why in CHOSEN}}.items():
        hits = [[is_ill for why, _, is_ill in a.tiles if why in of] for a in ill]
        found[f"evidence in the outline, {name}"] = mean_of(hits, ill)
    hits = [[is_ill for _, chance, is_ill in a.tiles if chance >= 0.5] for a in ill]
    found["evidence in the outline, said yes"] = mean_of(hits, ill)
    found["random tiles in the outline"] = mean_of([[a.share] for a in ill], ill)
    busy = np.array([[a.seconds["choose"], a.seconds["read"]] for a in kept]).sum(0)
    found["choosing, share of the time"] = round(float(busy[0] / busy.sum()), 4)
    return found


def share_of(said: np.ndarray) -> dict[str, Any]:
    """Return a share of slides with Wilson's interval."""
    return shown(wilson(int(said.sum()), len(said)))


def mean_of(hits: Sequence[Sequence[float]], of: Sequence[Asked]) -> dict[str, Any]:
    """Return the mean over slides of their tiles' mean, sites drawn anew; slides with none out."""
    pairs = [(float(np.mean(h)), a.site) for h, a in zip(hits, of, strict=True) if h]
    if not pairs:
        return shown(wilson(0, 0))
    values = np.array([value for value, _ in pairs])
    return shown(bootstrap(lambda rows: float(values[rows].mean()), [site for _, site in pairs]))


def shown(interval: Interval) -> dict[str, Any]:
    """Return an interval as plain values."""
    numbers = {"value": interval.value, "low": interval.low, "high": interval.high}
    plain = {k: None if math.isnan(v) else round(v, 4) for k, v in numbers.items()}
    return plain | {"n": interval.n, "method": interval.method}


def main() -> None:
    """Build, ask, and fit or report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--split", choices=["val", "test"], required=True)
    parser.add_argument("--mosaics", type=int, default=60)
    parser.add_argument("--tiles", type=int, default=lung_mosaics.TILES)
    parser.add_argument("--budget", type=int, default=BUDGET)
    parser.add_argument("--model", default="clover-mini")
    parser.add_argument("--rule", type=Path, help="where the rule is [slide.yaml, shipped]")
    wanted = parser.add_mutually_exclusive_group(required=True)
    wanted.add_argument("--fit", action="store_true", help="on val alone")
    wanted.add_argument("--report", action="store_true", help="on test alone")
    given = parser.parse_args()
    if given.split != ("val" if given.fit else "test"):
        parser.error("a rule is fitted on val and reported on test")
    folder = given.out / given.split
    path = given.rule or fetch("clover-mini").with_name("slide.yaml")
    if given.report and not path.is_file():
        parser.error(f"{path} is not there; first --split val --fit")
    if not (folder / "labels.csv").is_file():
        how = {"mosaics": given.mosaics, "tiles": given.tiles}
        lung_mosaics.build(given.data, folder, **how, split=given.split)
    asked, here = ask_all(folder, given.model, given.budget)
    if given.fit:
        rule = fitted(asked, here)
        write_rule(path, rule)
        print(path.read_text())
    else:
        rule = Presence.read(path)
        if rule.conditions != here:
            print(f"mind: the rule was fitted under {rule.conditions}, here is {here}")
    for name, value in report(asked, rule).items():
        print(f"{name}: {json.dumps(value)}")


if __name__ == "__main__":
    main()

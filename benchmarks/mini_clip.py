"""From a finished run of the recipe mini-clip to the shipped weights, their figures and card.

    python benchmarks/mini_clip_data.py DATA mini-data
    pathcli train --recipe mini-clip --set data.table=mini-data/labels.csv
    python benchmarks/mini_clip.py runs/mini-clip/seed-1 mini-data/labels.csv

Writes mini-clip.safetensors (float16), metrics.json, training.jsonl and README.md, the card.
What counts as familiar is fixed on validation images; the test groups and the sources kept for
reporting are read after that, once.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from pathcli.data.captions import Wordings, read_wordings
from pathcli.data.images import read_image
from pathcli.encoders.augment import Augment, to_grey
from pathcli.encoders.mini_clip import Familiarity, MiniClip
from pathcli.encoders.zeroshot import class_probabilities, class_weights
from pathcli.evals.patch_scores import Scored, measure_patches
from pathcli.metrics.statistics import Interval, clopper_pearson
from pathcli.runs import Run, read_run
from pathcli.types import Sample

if TYPE_CHECKING:
    from pathcli.types import ByteArray

OUT = Path(__file__).parents[1] / "assets" / "mini-clip"
CARD = Path(__file__).with_name("mini_clip_card.md")
CLASSES = ("lung_n", "lung_aca", "lung_scc")
FALSE_ABSTENTION = 0.01  # of the validation images of the known classes, at most
TEMPLATE = "An image of {}"  # PathGen's for LC-Lung
SEEN = {
    "lung_n": "benign lung tissue",
    "lung_aca": "lung adenocarcinoma",
    "lung_scc": "lung squamous cell carcinomas",
}

Change = Callable[["ByteArray", np.random.Generator], "ByteArray"]
CHANGES: dict[str, Change] = {
    "as they are": lambda image, _: image,
    "in grey": lambda image, _: to_grey(image),
    "stain jitter": lambda image, rng: Augment(stain=0.25, colour=0.2)(image, 224, rng),
}


@dataclass(frozen=True)
class Table:
    """The rows of a data table, and their images' folder."""

    rows: Sequence[dict[str, str]]
    folder: Path

    def part(self, split: str, *, known: bool | None = None) -> list[dict[str, str]]:
        """Return the rows of a split; of the known classes alone, or of all others."""
        rows = [row for row in self.rows if row["split"] == split]
        return rows if known is None else [r for r in rows if (r["label"] in CLASSES) == known]


def read_table(path: Path) -> Table:
    """Read a table image,label,group,split."""
    with path.open(newline="") as file:
        return Table(list(csv.DictReader(file)), path.parent)


def embed(
    encoder: MiniClip, table: Table, rows: Sequence[dict[str, str]], change: str = "as they are"
) -> torch.Tensor:
    """Return embeddings float32 [n, d]; what `change` draws follows from the row's number."""
    parts = []
    for start in range(0, len(rows), 64):
        batch = [
            Augment()(
                CHANGES[change](read_image(str(table.folder / row["image"])), generator(i)),
                encoder.input_px,
                generator(i),
            )
            for i, row in enumerate(rows[start : start + 64], start)
        ]
        parts.append(encoder.encode(torch.from_numpy(np.stack(batch))))
    return torch.cat(parts)


def generator(row: int) -> np.random.Generator:
    """Return the random numbers of one image."""
    return np.random.default_rng([4, row])


# --- familiarity -------------------------------------------------------------------------


def judge(encoder: MiniClip, table: Table) -> tuple[Familiarity, dict[str, Any]]:
    """Fix what is familiar, from training and validation images; and say how that went."""
    train = table.part("train", known=True)
    bank = torch.nn.functional.normalize(embed(encoder, table, train), dim=-1)
    free = Familiarity(bank, -1.0)
    known = free.score(embed(encoder, table, table.part("val", known=True)))
    other = free.score(embed(encoder, table, table.part("val", known=False)))
    threshold = float(torch.quantile(known, FALSE_ABSTENTION))
    facts = {
        "rule": f"{FALSE_ABSTENTION:.0%} of the validation images of the known classes abstain",
        "threshold": threshold,
        "validation images, known": len(known),
        "validation images, out of scope": len(other),
        "abstained on, out of scope": share(other < threshold),
    }
    return Familiarity(bank, threshold), facts


def share(hits: torch.Tensor) -> dict[str, float | int | None]:
    """Return a share with its exact binomial interval."""
    return as_metric(clopper_pearson(int(hits.sum()), len(hits)))


def as_metric(found: Interval) -> dict[str, float | int | None]:
    """Return an interval as plain values, rounded."""
    low, high = (round(v, 4) if v == v else None for v in (found.low, found.high))  # noqa: PLR0124
    return {"value": round(found.value, 4), "low": low, "high": high, "n": found.n}


# --- what is measured --------------------------------------------------------------------


def wordings(words: Wordings) -> Iterator[tuple[str, dict[str, list[str]]]]:
    """Yield the ways the classes are asked for: as in training, and by words never shown."""
    yield "PathGen's texts", {c: [TEMPLATE.format(SEEN[c])] for c in CLASSES}
    for number in range(5):
        yield f"unseen wording {number + 1}", {c: [words.unseen[c][number]] for c in CLASSES}
    yield "five unseen wordings together", {c: list(words.unseen[c]) for c in CLASSES}


def measure(encoder: MiniClip, table: Table) -> dict[str, Any]:
    """Return every figure of the card, each with its interval."""
    rows = table.part("test", known=True)
    samples = [Sample(r["image"], (r["image"],), label=r["label"], group=r["group"]) for r in rows]
    labels = np.array([CLASSES.index(r["label"]) for r in rows], np.int64)
    by_text, known = {}, {}
    for change in CHANGES:
        features = embed(encoder, table, rows, change)
        known[change], half = encoder.familiar(features), features.numpy().astype(np.float16)
        for name, texts in wordings(read_wordings()):
            weights = class_weights(encoder, [texts[c] for c in CLASSES])
            chances = class_probabilities(half, weights, encoder.logit_scale)
            scored = Scored(name, CLASSES, samples, labels, chances)
            found = measure_patches(scored)
            by_text[f"{name}, images {change}"] = {
                metric: as_metric(found[metric])
                for metric in ("balanced_accuracy", "accuracy", "macro_f1", "auroc")
            }
    false = {f"false abstention, images {k}": share(~v) for k, v in known.items()}
    return {"by text": by_text, "abstention": false | abstained(encoder, table)}


def abstained(encoder: MiniClip, table: Table) -> dict[str, Any]:
    """Return the share of images abstained on, for each source kept for reporting."""
    rows = table.part("report")
    unknown = ~encoder.familiar(embed(encoder, table, rows))
    sources = [kind(row["group"]) for row in rows]
    found = {}
    for name in sorted(set(sources)):
        rows_of_it = [i for i, source in enumerate(sources) if source == name]
        found[f"abstention, {name}"] = share(unknown[rows_of_it])
    return {"abstention, all sources kept for reporting": share(unknown)} | found


def kind(group: str) -> str:
    """Return the source of a picture: every patch of Kather 2016 is a group of its own."""
    return "Kather 2016" if group.startswith("kather-") else group


# --- what is written ---------------------------------------------------------------------


def ship(run: Run, judged: Familiarity, out: Path) -> Path:
    """Write the run's weights and what is familiar as float16; return the file."""
    state = load_file(run.folder / "weights.safetensors")
    state |= {f"model.{name}": tensor for name, tensor in judged.to_state().items()}
    path = out / "mini-clip.safetensors"
    half = {k: v.half() if v.is_floating_point() else v for k, v in state.items()}
    save_file({k: v.contiguous() for k, v in half.items()}, path)
    return path


def card(run: Run, facts: dict[str, Any], figures: dict[str, Any]) -> str:
    """Return the model card as Markdown."""
    known = run.provenance
    parts = {
        "abstention": rows_of({k: {"share": v} for k, v in figures["abstention"].items()}),
        "by_text": rows_of(figures["by text"]),
        "judged": "\n".join(f"* {k}: {say(v)}" for k, v in facts.items()),
        "chosen": ", ".join(f"{k} {v:.4f}" for k, v in run.metrics.items()),
        "recipe": run.recipe.with_values(**{"data.table": "labels.csv"}).to_yaml(),
        "samples": ", ".join(f"{n} {side}" for side, n in run.facts["samples"].items()),
        "steps": f"{known['steps']:,} steps, {known['seconds'] / 60:.0f} minutes",
        "epoch": known["chosen_epoch"],
        "versions": ", ".join(f"{k} {v}" for k, v in known["versions"].items()),
    }
    return CARD.read_text(encoding="utf-8").format(**parts)


def rows_of(found: dict[str, dict[str, Any]]) -> str:
    """Return figures as a Markdown table, a row a name."""
    columns = list(next(iter(found.values())))
    lines = [" | ".join(["what", *columns, "n"]), " | ".join(["---"] * (len(columns) + 2))]
    for name, values in found.items():
        n = next(iter(values.values()))["n"]
        lines.append(" | ".join([name, *(say(values[c]) for c in columns), str(n)]))
    return "\n".join(f"| {line} |" for line in lines)


def say(value: Any) -> str:  # noqa: ANN401 - JSON values
    """Return a figure with its interval, or a plain value, in words."""
    if not isinstance(value, dict):
        return f"{value:.4f}" if isinstance(value, float) else str(value)
    if value["low"] is None:
        return str(value["value"])
    return f"{value['value']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"


def main() -> None:
    """Judge, ship, measure, and write the card."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("table", type=Path)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--validate", action="store_true", help="stop before the test groups")
    given = parser.parse_args()
    run, table = read_run(given.run), read_table(given.table)
    encoder = MiniClip(checkpoint=run.folder / "weights.safetensors")
    encoder.load("cpu")
    judged, facts = judge(encoder, table)
    print(json.dumps(facts, indent=1))
    if given.validate:
        return
    given.out.mkdir(parents=True, exist_ok=True)
    shipped = MiniClip(checkpoint=ship(run, judged, given.out))
    shipped.load("cpu")
    figures = measure(shipped, table)
    known = {"familiarity": facts, **figures, "validation": dict(run.metrics)}
    (given.out / "metrics.json").write_text(json.dumps(known, indent=1) + "\n")
    shutil.copyfile(run.folder / "metrics.jsonl", given.out / "training.jsonl")
    (given.out / "README.md").write_text(card(run, facts, figures), encoding="utf-8")
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()

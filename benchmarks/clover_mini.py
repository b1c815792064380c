r"""From a finished run of the recipe clover-mini-stage2 to shipped weights, figures and card.

    python benchmarks/mini_clip_data.py DATA mini-data
    python benchmarks/clover_mini_data.py mini-data/labels.csv clover-data
    pathcli train --recipe clover-mini-stage1 --set data.source=clover-data/captions.csv
    pathcli train --recipe clover-mini-stage2 --set data.source=clover-data/instructions.json \\
        --set start.run=runs/clover-mini-stage1/seed-1
    python benchmarks/clover_mini.py RUN mini-data/labels.csv --split val --most 1
    python benchmarks/clover_mini.py RUN mini-data/labels.csv --most 2
    python benchmarks/clover_mini_wordings.py mini-data/labels.csv
    python benchmarks/clover_mini.py RUN mini-data/labels.csv --card

RUN is runs/clover-mini-stage2/seed-1. `--split val` asks the validation groups and writes
calibration.json, the temperature fitted there. The test groups are then asked once:
clover-mini.safetensors (float16), recipe.yaml, training.jsonl and metrics.json are written.
`--card` writes README.md of all these.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from clover_mini_data import Asker, Row, read_questions, read_rows
from mini_clip import as_metric, say
from safetensors.torch import load_file, save_file
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax

from pathcli.metrics.calibration import ece
from pathcli.metrics.statistics import bootstrap
from pathcli.runs import Run, read_run
from pathcli.types import Sample
from pathcli.vlm.asked import allowed
from pathcli.vlm.own import RunResponder
from pathcli.vlm.responders import Decoding

OUT = Path(__file__).parents[1] / "assets" / "clover-mini"
CARD = Path(__file__).with_name("clover_mini_card.md")
MAIN = ("tissue", "malignant")  # asked in every unseen wording; the others in a drawn one
KINDS = ("benign", "status", "named", "either", "choice", "same")
ENOUGH = 0.93  # balanced accuracy of a wording that works
LENGTH = 24  # tokens of an answer, at most

Answer = Callable[[Sequence[Sample]], list[str]]


@dataclass(frozen=True)
class Asked:
    """Questions of one kind in one wording, one an image; `answer` of a sample is the right one."""

    kind: str
    wording: str
    samples: Sequence[Sample]

    def scores(self, said: Sequence[str]) -> dict[str, Any]:
        """Return exact match and, over the right answers' classes, its balanced form."""
        right = np.array(
            [plain(a) == plain(s.answer) for a, s in zip(said, self.samples, strict=True)]
        )
        groups = [s.group for s in self.samples]
        wanted = np.unique([s.answer for s in self.samples], return_inverse=True)[1]

        def balanced(rows: np.ndarray) -> float:
            return float(
                np.mean([right[rows][wanted[rows] == c].mean() for c in set(wanted[rows])])
            )

        exact = bootstrap(lambda rows: float(right[rows].mean()), groups)
        most = max(np.bincount(wanted)) / len(wanted)
        return {
            "exact_match": as_metric(exact),
            "balanced_accuracy": as_metric(bootstrap(balanced, groups)),
            "majority": round(float(most), 4),
            "images": len(right),
        }


def plain(text: str) -> str:
    """Return an answer as it is compared: lower case, one space, no full stop."""
    return re.sub(r"\s+", " ", text).strip(" .").lower()


def questions(rows: Sequence[Row]) -> list[Asked]:
    """Return what the rows' images are asked: in unseen wordings, as a second question, in seen."""
    asker, rng = Asker(read_questions(), "unseen"), np.random.default_rng(6)
    trained = Asker(read_questions(), "train").words
    found = []
    for kind in MAIN:
        for number, word in enumerate(asker.words[kind], 1):
            samples = [sample(row, *asker.answer(kind, row["label"], rng, word)) for row in rows]
            found.append(Asked(kind, f"unseen wording {number}", samples))
    for kind in KINDS:
        samples = [drawn(asker, kind, row, rows, rng) for row in rows]
        found.append(Asked(kind, "unseen wordings, one drawn", samples))
    first = asker.words["organ"][0]
    for kind in MAIN:
        word = asker.words[kind][0]
        samples = [sample(row, *asker.answer(kind, row["label"], rng, word)) for row in rows]
        samples = [
            replace(s, turns=(first, asker.classes[row["label"]]["organ"], *s.turns))
            for s, row in zip(samples, rows, strict=True)
        ]
        found.append(Asked(kind, "unseen wording 1, after a question on the organ", samples))
    for kind in MAIN:
        word = trained[kind][0]
        samples = [sample(row, *asker.answer(kind, row["label"], rng, word)) for row in rows]
        found.append(Asked(kind, "a wording of training", samples))
    return found


def sample(row: Row, question: str, answer: str, *others: str) -> Sample:
    """Return one question on a row's image, and others' beside it."""
    images = (row["image"], *others)
    return Sample(row["image"], images, answer, (question,), group=row["group"])


def drawn(
    asker: Asker, kind: str, row: Row, rows: Sequence[Row], rng: np.random.Generator
) -> Sample:
    """Return a question of a kind, its wording drawn."""
    if kind != "same":
        return sample(row, *asker.ask(kind, row["label"], rng))
    alike = rng.random() < 0.5
    others = [r for r in rows if r is not row and (r["label"] == row["label"]) == alike]
    other = others[int(rng.integers(len(others)))]
    word = asker.words[kind][int(rng.integers(len(asker.words[kind])))]
    answer = "yes" if other["label"] == row["label"] else "no"
    return sample(row, word, answer, other["image"])


def blind(asked: Asked) -> Asked:
    """Return the same questions and answers, each on the image of another row."""
    turned = np.random.default_rng(7).permutation(len(asked.samples))
    samples = [
        Sample(s.name, asked.samples[i].images, s.answer, s.turns, group=s.group)
        for s, i in zip(asked.samples, turned, strict=True)
    ]
    return Asked(asked.kind, asked.wording, samples)


def measure(answer: Answer, rows: Sequence[Row]) -> dict[str, Any]:
    """Return every figure of the card, each with its interval."""
    found: dict[str, Any] = {}
    shown: set[str] = set()
    for asked in questions(rows):
        said = answer(asked.samples)
        figures = asked.scores(said)
        if asked.kind not in shown:  # once a kind
            shown.add(asked.kind)
            hidden = blind(asked)
            figures["blind"] = hidden.scores(answer(hidden.samples))["exact_match"]
        name = f"{asked.kind}, {asked.wording}"
        pairs = zip(said[::97], asked.samples[::97], strict=True)
        found[name] = figures | {"examples": [[s.turns[-1], s.answer, a] for a, s in pairs]}
        print(name, {k: v for k, v in figures.items() if k != "examples"}, flush=True)
    return found


SURE = ("tissue", "malignant", "benign", "status", "either")  # whose answers a question allows


def likelihoods(responder: RunResponder, asked: Sequence[Asked]) -> dict[str, Any]:
    """Return by kind the right options' numbers [n] and all options' log-probabilities [n, k]."""
    found: dict[str, Any] = {}
    for kind in SURE:
        samples = [s for one in asked if one.kind == kind for s in one.samples if len(s.turns) == 1]
        names = responder.taught[0][:3]
        options = [list(allowed(s.turns[-1], responder.taught) or names) for s in samples]
        right = [o.index(s.answer) for o, s in zip(options, samples, strict=True)]
        found[kind] = np.array(right), np.stack(responder.likelihoods(samples, options))
    return found


def fitted(found: dict[str, Any]) -> float:
    """Return the temperature at which the right answers of all kinds are most probable."""

    def loss(log: float) -> float:
        each = [
            -log_softmax(values / np.exp(log), axis=1)[np.arange(len(right)), right]
            for right, values in found.values()
        ]
        return float(np.concatenate(each).mean())

    return float(np.exp(minimize_scalar(loss, bounds=(-2, 4), method="bounded").x))


def sureness(found: dict[str, Any], temperature: float) -> dict[str, Any]:
    """Return the calibration error of each kind, as the model gives it and divided."""
    return {
        kind: {
            "ece": round(ece(right, softmax(values / temperature, axis=1)), 4),
            "before": round(ece(right, softmax(values, axis=1)), 4),
            "answers": len(right),
        }
        for kind, (right, values) in found.items()
    }


def ship(run: Run, out: Path) -> Path:
    """Write the run's weights as float16 and its recipe; return the weights' file."""
    path = out / "clover-mini.safetensors"
    state = load_file(run.folder / "weights.safetensors")
    save_file({k: v.half().contiguous() for k, v in state.items()}, path)
    portable = run.recipe.with_values(**{"data.source": "instructions.json", "start.run": None})
    (out / "recipe.yaml").write_text(portable.to_yaml(), encoding="utf-8")
    shutil.copyfile(run.folder / "metrics.jsonl", out / "training.jsonl")
    return path


def card(run: Run, out: Path) -> str:
    """Return the model card as Markdown, of the figures in a folder."""
    measured = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    figures, sure = measured["questions"], measured["calibration"]
    temperature = json.loads((out / "calibration.json").read_text())["temperature"]
    size = (out / "clover-mini.safetensors").stat().st_size
    names = ("exact_match", "balanced_accuracy", "blind")
    table = {
        kind: {n: row[n] for n in names if n in row} | {"majority": {"value": row["majority"]}}
        for kind, row in figures.items()
    }
    known = run.provenance
    examples = [e for row in figures.values() for e in row["examples"][:3]]
    return CARD.read_text(encoding="utf-8").format(
        figures=_table(table),
        temperature=f"{temperature:.2f}",
        **wordings(out / "wordings.csv"),
        sure=", ".join(f"{kind} {v['ece']:.3f} ({v['before']:.3f})" for kind, v in sure.items()),
        examples="\n".join(f"| {q} | {wanted} | {said} |" for q, wanted, said in examples),
        megabytes=f"{size / 1e6:.1f}",
        steps=f"{known['steps']:,} steps, {known['seconds'] / 60:.0f} minutes",
        samples=", ".join(f"{n} {side}" for side, n in run.facts["samples"].items()),
        recipe=run.recipe.with_values(
            **{"data.source": "instructions.json", "start.run": "clover-mini-stage1"}
        ).to_yaml(),
        versions=", ".join(f"{k} {v}" for k, v in known["versions"].items()),
    )


def wordings(path: Path) -> dict[str, Any]:
    """Return what the card says of the wordings of yes and no; see clover_mini_wordings.py."""
    with path.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    low = [row for row in rows if float(row["balanced_accuracy"]) < ENOUGH]

    def count(some: Sequence[dict[str, str]], kind: str) -> int:
        return sum(row["kind"] == kind for row in some)

    asked, bad = count(rows, "malignant"), count(low, "malignant")
    worst = [f'* {r["balanced_accuracy"]} "{r["wording"]}"' for r in low[:12]]
    return {
        "asked": asked,
        "bad": bad,
        "good": asked - bad,
        "benign_asked": count(rows, "benign"),
        "benign_bad": count(low, "benign"),
        "worst": "; the lowest:\n\n" + "\n".join(worst) + "\n" if worst else ".\n",
    }


def _table(found: dict[str, dict[str, Any]]) -> str:
    columns = ["exact_match", "balanced_accuracy", "blind", "majority"]
    lines = [" | ".join(["question", *columns]), " | ".join(["---"] * (len(columns) + 1))]
    for name, values in found.items():
        cells = [
            f"{values[c]['value']:.3f}"
            if c == "majority"
            else say(values[c])
            if c in values
            else ""
            for c in columns
        ]
        lines.append(" | ".join([name, *cells]))
    return "\n".join(f"| {line} |" for line in lines)


def main() -> None:
    """Ship and ask the test groups; or ask the validation groups; or write the card."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("table", type=Path)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--split", default="test", choices=["val", "test"])
    parser.add_argument("--most", type=int, help="images of a group, at most")
    parser.add_argument("--card", action="store_true", help="write the card of figures alone")
    given = parser.parse_args()
    run = read_run(given.run)
    if given.card:
        (given.out / "README.md").write_text(card(run, given.out), encoding="utf-8")
        return
    lung = {k: v for k, v in read_questions()["classes"].items() if v["organ"] == "lung"}
    rows = few(read_rows(given.table, given.split, lung), given.most)
    shipped = given.split == "test"
    weights = ship(run, given.out) if shipped else run.folder / "weights.safetensors"
    responder = RunResponder(run.recipe, weights)
    responder.batch = 32
    names = [c["name"] for c in read_questions()["classes"].values()]
    responder.taught = [names, ["lung", "colon"], ["benign", "malignant"], ["yes", "no"]]
    kept = given.out / "calibration.json"
    if not shipped:
        temperature = round(fitted(likelihoods(responder, questions(rows))), 4)
        facts = {"temperature": temperature, "fitted_on": f"{len(rows)} validation images"}
        kept.write_text(json.dumps(facts | {"answers": responder.taught}, indent=1) + "\n")
        print(facts, flush=True)
    figures = measure(lambda asked: list(responder.answer(asked, Decoding(LENGTH))), rows)
    if not shipped:
        return
    temperature = json.loads(kept.read_text())["temperature"]
    sure = sureness(likelihoods(responder, questions(rows)), temperature)
    print(sure, flush=True)
    text = json.dumps({"images": len(rows), "questions": figures, "calibration": sure}, indent=1)
    (given.out / "metrics.json").write_text(text + "\n")


def few(rows: Sequence[Row], most: int | None) -> list[Row]:
    """Return at most so many rows of each group, evenly spaced."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["group"], []).append(row)
    if most is None:
        return list(rows)
    return [
        g[i * len(g) // min(most, len(g))]
        for g in groups.values()
        for i in range(min(most, len(g)))
    ]


if __name__ == "__main__":
    main()

"""What every evaluation of MIL heads shows, whatever they predict: slides, runs, sources."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from pathcli.report import Section, pairs
from pathcli.types import Report, digest
from pathcli.weights import sha256

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pathcli.evals.mil_scores import Scores, Tested


class Tried(Protocol):
    """An evaluation: heads with their scores, and how often these test slides were read."""

    @property
    def heads(self) -> Sequence[Scores]:
        """The heads."""
        ...

    @property
    def times(self) -> int | None:
        """In this store, this time included; None if it could not be counted."""
        ...


def rounded(value: float) -> float | None:
    """Return a number to four places, None where it is undefined."""
    return round(float(value), 4) if np.isfinite(value) else None


def source_of(tested: Tested) -> dict[str, Any]:
    """Return what one tested run is, to find or repeat it."""
    run = tested.run
    return {
        "folder": str(run.folder.absolute()),
        "seed": run.seed,
        "lr": run.recipe.values["train"]["lr"],
        "epoch": run.provenance["chosen_epoch"],
        "threshold": tested.threshold if np.isfinite(tested.threshold or 0.0) else None,
        "weights_sha256": sha256(run.folder / "weights.safetensors"),
        "encoder": run.facts["encoder"],
        "tiles": run.facts["tiles_digest"],
        "features": run.facts["features_digest"],
        "test": digest(sorted(tested.names)),
    }


def cohort_flow(found: Tried) -> list[dict[str, Any]]:
    """Return for each head and seed how many test slides were listed, used and lost, by class."""
    rows: list[dict[str, Any]] = []
    for scores in found.heads:
        table, missing = scores.cohort.table, scores.cohort.missing
        for t in scores.tested:
            row = {
                "head": scores.name,
                "seeds": str(t.run.seed),
                "slides in the table": len(table.rows),
                "with features": len(table.rows) - len(missing),
                "test slides": t.listed,
                "tested bags": len(t.names),
                "test slides without features": sum(t.lost.values()),
                "of class": ", ".join(f"{c} {n}" for c, n in sorted(t.lost.items())) or "-",
            }
            if rows and {**rows[-1], "seeds": ""} == {**row, "seeds": ""}:
                rows[-1]["seeds"] += f", {t.run.seed}"
            else:
                rows.append(row)
    return rows


_KINDS = {
    "own": "Test slides of the split that the runs were trained on: no run was trained or chosen "
    "on one of them.",
    "part": "Slides of the runs' own test split, under another table: not an external validation.",
    "external": "External validation: no patient, name or file of these slides was learnt from.",
}


def lead(found: Tried) -> str:
    """Return the sentences that say what kind of test this is."""
    shared = max(s.shared for s in found.heads)
    kinds = {s.kind: [h.name for h in found.heads if h.kind == s.kind] for s in found.heads}
    kind = " ".join(
        (f"{', '.join(heads)}: " if len(kinds) > 1 else "") + _KINDS[name]
        for name, heads in kinds.items()
    )
    if shared:
        kind = f"{shared} of the test slides are of patients or files that were learnt from."
    if found.times is None:
        return f"{kind} How often these slides were read before could not be counted."
    if found.times == 1:
        return f"{kind} By this store's count none of them was read as a test before."
    return f"{kind} By this store's count some of them are read as a test for time {found.times}."


def flow_section(found: Tried) -> Section:
    """Return the section of `cohort_flow`, and why slides are missing."""
    rows = cohort_flow(found)
    reasons: dict[str, list[str]] = {}
    for scores in found.heads:
        for slide, why in scores.cohort.missing.items():
            reasons.setdefault(why, []).append(slide)
    why = "; ".join(f"{reason}: {', '.join(sorted(set(s)))}" for reason, s in reasons.items())
    return Section("Slides: in, out, used", f"Without features: {why}." if why else "", rows=rows)


def repeat_sections(report: Report, command: str) -> list[Section]:
    """Return the sections from which an evaluation can be repeated."""
    known: dict[str, Any] = dict(report.provenance)
    runs = [
        {"head": head, "run": run["folder"], "weights": run["weights_sha256"][:12]}
        | {name: run[name] for name in ("lr", "epoch", "threshold", "test")}
        for head, runs in known["runs"].items()
        for run in runs
    ]
    facts = {"labels": known["labels"]["digest"], "git": known["git"], **known["versions"]}
    features = {f"features of {head}": runs[0]["encoder"] for head, runs in known["runs"].items()}
    return [
        Section("To repeat it", code=command, rows=pairs(facts | features)),
        Section("The runs", "All digests are in report.json.", rows=runs),
    ]

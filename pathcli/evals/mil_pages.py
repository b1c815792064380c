"""What every evaluation of MIL heads shows, whatever they predict: slides, runs, sources."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from pathcli.report import Section, metric, pairs, versions
from pathcli.runs import git_commit
from pathcli.types import Report, digest
from pathcli.weights import sha256

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from pathcli.evals.mil_scores import Measured, Scores, Tested


class Tried(Protocol):
    """An evaluation: heads with their scores, and how often these test slides were read."""

    @property
    def name(self) -> str:
        """The benchmark, or the table."""
        ...

    @property
    def heads(self) -> Sequence[Scores]:
        """The heads."""
        ...

    @property
    def times(self) -> int | None:
        """In this store, this time included; None if it could not be counted."""
        ...

    @property
    def warnings(self) -> Sequence[str]:
        """What the report should say of splits, labels and counts."""
        ...


class Numbers(Protocol):
    """What was measured: metrics by head, and the comparisons of heads."""

    @property
    def heads(self) -> Mapping[str, Mapping[str, Measured]]:
        """Metrics by head."""
        ...

    @property
    def pairs(self) -> Sequence[Mapping[str, Any]]:
        """Comparisons."""
        ...


def heads_compared(found: Tried, numbers: Numbers, difference: str) -> list[Section]:
    """Return a row a pair of heads, whose difference stands in that column; none of one head."""
    if len(found.heads) == 1:
        return []
    rows = [
        {
            "heads": row["heads"],
            f"{row.get('metric', 'AUROC')} difference": f"{row[difference]:+.3f} "
            f"[{row['low']:+.3f}, {row['high']:+.3f}]",
            **({"test": row["test"]} if "test" in row else {}),
            "p": f"{row['p']:.3g}",
            "p, corrected (Holm)": f"{row['p_holm']:.3g}",
        }
        for row in numbers.pairs
    ]
    n = len(found.heads)
    left = n * (n - 1) // 2 - len(rows)
    text = f"{left} pairs were tested on different slides and are not compared." if left else ""
    return [Section("Heads against each other", text, rows=rows)]


def report_of(
    found: Tried,
    numbers: Numbers,
    what: str,
    *,
    sizes: Callable[[Scores], Mapping[str, Any]],
    count: Callable[[Scores, str, int], int] = lambda _, __, n: n,
    more: Mapping[str, Any],
) -> Report:
    """Return metrics by `<head>.<metric>`, a row a head, and where all came from.

    Args:
        found: the evaluation.
        numbers: its measurements.
        what: what was predicted, for the title.
        sizes: what stands behind a head's row.
        count: the units behind a metric, from head, metric and those of its interval.
        more: further provenance.
    """
    metrics, rows = {}, []
    for s in found.heads:
        rows.append({"head": s.name, **sizes(s)})
        for name, m in numbers.heads[s.name].items():
            low, value, high = map(rounded, (m.interval.low, m.interval.value, m.interval.high))
            metrics[f"{s.name}.{name}"] = metric(value, low, high, count(s, name, m.interval.n))
            rows[-1] |= {name: value, f"{name}_sd": rounded(m.spread)}
    table = found.heads[0].cohort.table
    provenance = {
        "labels": {"source": table.source, "digest": table.digest},
        **more,
        "kind": {s.name: s.kind for s in found.heads},
        "drawn_anew": {s.name: s.unit for s in found.heads},
        "test_slides_of_patients_learnt_from": {s.name: s.shared for s in found.heads},
        "test_slides_read_times": found.times,
        "flow": cohort_flow(found),
        "missing": {s.name: dict(s.cohort.missing) for s in found.heads},
        "comparisons": [
            {k: rounded(v) if isinstance(v, float) else v for k, v in row.items()}
            for row in numbers.pairs
        ],
        "runs": {s.name: [source_of(t) for t in s.tested] for s in found.heads},
        "warnings": list(found.warnings),
        "git": git_commit(),
        "versions": versions(),
    }
    return Report(f"{Path(found.name).name}: {what}", metrics, tuple(rows), provenance)


def sizes_of(scores: Scores) -> dict[str, Any]:
    """Return how many seeds, bags a seed, and independent units stand behind a head's row."""
    bags = sorted({len(t.names) for t in scores.tested})
    return {
        "seeds": len(scores.tested),
        "bags a seed": bags[0] if len(bags) == 1 else f"{bags[0]}-{bags[-1]}",
        f"{scores.unit}s in all": len(set(scores.units)),
    }


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

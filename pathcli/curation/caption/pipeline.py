"""Slides and agents in, captioned patches out: files, traces and a page in a folder.

Patches flow through the agents one behind the other and nothing is held but those on their way.
Features are in the store and answers are kept by the models, so the same command again goes on
where it was stopped.
"""

from __future__ import annotations

import csv
import json
from collections import Counter
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from pathcli.curation.caption import agents
from pathcli.curation.caption.page import Shown, page
from pathcli.data.formats.published import PATHGEN_PX
from pathcli.data.outputs import whole
from pathcli.report import json_text, metric, versions
from pathcli.runs import git_commit
from pathcli.store.files import write_bytes
from pathcli.types import NOTICE, Report, digest

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from pathlib import Path
    from typing import TextIO

    from pathcli.curation.caption.agents import Patch
    from pathcli.curation.caption.retriever import Drop, Place, Retriever, Started
    from pathcli.curation.models import Model

FILES = ("captions.json", "traces.jsonl", "dropped.csv")


@dataclass(frozen=True, kw_only=True)
class Agents:
    """Who writes about patches; without `revise` or `summarise`, captions stay as they are."""

    describe: Model
    revise: Model | None = None
    summarise: Model | Literal["first-sentences"] | None = None

    def names(self) -> dict[str, str]:
        """Return the name of each agent, none for one that is not there."""
        given = {name: getattr(self, name) for name in ("describe", "revise", "summarise")}
        return {k: str(getattr(v, "name", v or "none")) for k, v in given.items()}

    def digests(self) -> dict[str, str]:
        """Return what decides the answers of each agent that is a model."""
        given = {name: getattr(self, name) for name in ("describe", "revise", "summarise")}
        return {k: str(v.digest) for k, v in given.items() if hasattr(v, "digest")}


class Captioner:
    """A retriever and the agents behind it."""

    def __init__(self, retriever: Retriever, team: Agents) -> None:
        """Take what proposes patches, and those who write about them."""
        self.retriever, self.team, self.words = retriever, team, retriever.words

    def captioned(
        self, places: Iterable[Place], drop: Drop, started: Started | None = None
    ) -> Iterator[Patch]:
        """Yield every patch chosen, in order, captioned or with why it is not; see `Retriever`.

        Raises:
            ResourceError: weights, space, a budget or an endpoint are missing.
        """
        team, words, encoder = self.team, self.words, self.retriever.encoder
        found = self.retriever.patches(places, drop, started)
        patches = agents.described(found, team.describe, words)
        if team.revise is not None:
            patches = agents.revised(patches, team.revise, words)
        if isinstance(team.summarise, str):
            return agents.by_first_sentences(patches, encoder)
        if team.summarise is not None:
            return agents.summarised(patches, team.summarise, words, encoder)
        return patches


def record(patch: Patch) -> dict[str, Any]:
    """Return a patch as PathGen-1.6M publishes it; `side` only where it is not 672 px.

    So is `unfamiliar`, which says that a model wrote about what it knows nothing like.
    """
    x, y = patch.region.xy
    made: dict[str, Any] = {"wsi_id": patch.wsi_id, "position": [str(x), str(y)]}
    made |= {"caption": patch.caption, "file_id": patch.file_id}
    made |= {} if patch.region.side0 == PATHGEN_PX else {"side": patch.region.side0}
    return made | ({"unfamiliar": patch.unfamiliar} if patch.unfamiliar else {})


def trace(patch: Patch) -> dict[str, Any]:
    """Return what became of a patch: who proposed it, and what each agent was given and said."""
    chosen = {"routes": list(patch.routes), "near": patch.near, "cosine": patch.cosine}
    done = {"dropped": patch.why, "detail": patch.detail} if patch.why else {}
    return {"id": patch.name} | record(patch) | {"chosen": chosen, "steps": patch.steps} | done


def caption_slides(
    places: Sequence[Place],
    captioner: Captioner,
    out: Path,
    *,
    command: str = "",
    started: Started | None = None,
) -> dict[str, Any]:
    """Write captions.json, traces.jsonl, dropped.csv, a report and provenance; return the counts.

    Raises:
        DataError: not one slide can be used.
        ResourceError: space, weights, a budget or an endpoint are missing; what was embedded and
            answered is kept, so the same command again goes on.
    """
    shown, happened, reasons, kept = Shown(), Counter[str](), Counter[str](), 0
    with ExitStack() as stack:
        captions, traces, dropped = (stack.enter_context(_unfinished(out / name)) for name in FILES)
        rows = csv.writer(dropped)
        rows.writerow(["id", "reason", "detail"])

        def drop(name: str, why: str, detail: str) -> None:
            reasons[why] += 1
            rows.writerow([name, why, detail])

        for patch in captioner.captioned(places, drop, started):
            traces.write(json.dumps(trace(patch), ensure_ascii=False) + "\n")
            happened.update(_happened(patch))
            shown.add(patch)
            if patch.why:
                drop(patch.name, patch.why, patch.detail)
                continue
            captions.write("[\n" if not kept else ",\n")
            captions.write(json.dumps(record(patch), ensure_ascii=False))
            happened.update([f"captions {patch.unfamiliar}"] * bool(patch.unfamiliar))
            kept += 1
        captions.write("\n]\n" if kept else "[]\n")
        used = captioner.retriever.used()
    counts: dict[str, Any] = {"slides": len(used), "patches": sum(s.patches for s in used)}
    counts |= {"captions": kept, "dropped": dict(reasons), "agents": dict(happened)}
    _report(captioner, counts, shown, out, command)
    return counts | {"report": str(out / "report.html"), "notice": NOTICE}


def _happened(patch: Patch) -> Iterator[str]:
    """Yield what there is to count of a patch."""
    for step in patch.steps:
        if step["agent"] == "revise":
            edits = step.get("edits")
            yield "revise: " + (
                "left as it was after a fault"
                if edits is None
                else "changed"
                if edits
                else "nothing to change"
            )
            if len(step["said"]) > 1:
                yield "revise: asked twice"
        if step["agent"] == "summarise":
            yield "summarise: " + ("shortened" if "given" in step else "short enough as it was")


def _report(
    captioner: Captioner, counts: Mapping[str, Any], shown: Shown, out: Path, command: str
) -> None:
    numbers = {name: metric(counts[name]) for name in ("slides", "patches", "captions")}
    numbers |= {f"dropped: {why}": metric(n) for why, n in counts["dropped"].items()}
    numbers |= {what: metric(n) for what, n in counts["agents"].items()}
    retriever = captioner.retriever
    known = getattr(retriever.prompt, "digest", "")
    prompt = {"prompt": str(known)} if known else {}
    facts = retriever.facts() | {
        "slides": [one.path for one in retriever.slides],
        "agents": captioner.team.names(),
        "model digests": prompt | captioner.team.digests(),
        "most tokens": agents.limit_of(retriever.encoder),
        "prompts": {name: digest(text) for name, text in captioner.words.items()},
        "git": git_commit(),
        "versions": versions(),
    }
    rows = tuple(asdict(one) for one in retriever.slides)
    report = Report("Captions of patches", numbers, rows, facts)
    html = page(report, retriever.slides, shown, retriever.encoder, command)
    for name, text in {
        "report.json": json_text(report),
        "provenance.json": json.dumps(facts | {"command": command}, indent=1, ensure_ascii=False)
        + "\n",
        "report.html": html,
    }.items():
        data = text.encode("utf-8", "backslashreplace")
        write_bytes(out / name, data, lambda _: None, "--out")


@contextmanager
def _unfinished(path: Path) -> Iterator[TextIO]:
    """Give a file to write under another name, which gets its own when all went well."""
    how: dict[str, Any] = {"encoding": "utf-8", "errors": "backslashreplace", "newline": ""}
    with whole(path, "--out") as part, part.open("w", **how) as file:
        yield file

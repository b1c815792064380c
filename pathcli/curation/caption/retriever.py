"""Slides in, the patches that are worth describing out: the store's features are ranked by text."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

import numpy as np

from pathcli.curation.caption.agents import Patch, prompts
from pathcli.curation.caption.select import Choice, patch_spec, select
from pathcli.curation.caption.texts import Reports, attributes_of, findings_in
from pathcli.data.formats.published import PATHGEN_PX
from pathcli.encoders.build import text_encoder
from pathcli.encoders.zeroshot import class_weights, too_long
from pathcli.errors import DataError
from pathcli.slides.readers import public_name
from pathcli.types import Progress, Region, silent

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from numpy.typing import NDArray

    from pathcli.curation.models import Model
    from pathcli.encoders.embedding import Embedder, EmbedRun
    from pathcli.types import TileSpec

Started = Callable[[int, str], Progress]
"""Told the number and name of a slide; returns what is told its progress."""
Place = tuple[Path | str, float | None, str]
"""A slide's path, its um per level-0 px over its header's, and who says so."""
Drop = Callable[[str, str, str], None]
"""Told the name of what is left out, the reason, and the detail."""

DUPLICATE = "near-duplicate"

_GDC = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


@dataclass
class SlideFacts:
    """What became of one slide; `patches` are those of its grid, 0 where it cannot be used."""

    path: str
    wsi_id: str
    patches: int = 0
    near_duplicates: int = 0
    routes: dict[str, int] = field(default_factory=dict)
    findings: list[str] = field(default_factory=list)
    fault: str = ""
    warnings: list[str] = field(default_factory=list)


class Retriever:
    """Chooses patches of slides; `slides` says what became of each."""

    def __init__(
        self,
        embedder: Embedder,
        *,
        choice: Choice = Choice(),  # noqa: B008 - frozen
        cancer: str = "any",
        reports: Reports | None = None,
        prompt: Model | None = None,
        spec: TileSpec | None = None,
    ) -> None:
        """Load the encoder and embed the attributes.

        Args:
            embedder: with an encoder that reads texts too.
            choice: how patches are chosen.
            cancer: whose attributes are looked for: a project of assets/curation/attributes.yaml,
                any, or with a prompt agent any name.
            reports: what is known of slides.
            prompt: the prompt agent: names attributes, and finds what reports say is visible.
                Without it attributes are the shipped ones, and reports are taken line by line.
            spec: another grid of patches.

        Raises:
            UsageError: no such cancer, or an encoder that reads no texts.
            DataError: the prompt agent names no attributes.
            ResourceError: weights are not here, or an endpoint is not.
        """
        self.encoder, self.embedder = text_encoder(embedder.encoder), embedder
        self.choice, self.cancer, self.prompt, self.words = choice, cancer, prompt, prompts()
        self.reports, self.spec = reports or Reports({}), spec or patch_spec()
        self.attributes = attributes_of(cancer, prompt, self.words) if choice.top else ()
        embedder.load()
        self._attributes = self._embedded(self.attributes)
        self.slides: list[SlideFacts] = []

    def facts(self) -> dict[str, Any]:
        """Return what decides which patches are chosen, for provenance."""
        return {
            "retriever": self.embedder.encoder.id,
            "cancer": self.cancer,
            "prompt agent": getattr(self.prompt, "name", "none"),
            "attributes": list(self.attributes),
            "choice": asdict(self.choice),
            "grid": self.spec.to_json(),
        }

    def used(self) -> list[SlideFacts]:
        """Return the slides that could be used.

        Raises:
            DataError: there is none; why the first could not.
        """
        used = [facts for facts in self.slides if facts.patches]
        if not used:
            msg = self.slides[0].fault if self.slides else "there is no slide to caption"
            raise DataError(msg)
        return used

    def patches(
        self, places: Iterable[Place], drop: Drop, started: Started | None = None
    ) -> Iterator[Patch]:
        """Yield the patches chosen, slide after slide; a slide that cannot be used is dropped.

        Raises:
            ResourceError: no space, or another process is embedding a slide.
        """
        seen = set[str]()
        for number, (path, mpp, source) in enumerate(places, start=1):
            shown = public_name(path)
            told = started(number, PurePath(shown).name) if started else silent
            try:
                run = self.embedder(path, spec=self.spec, mpp=mpp, mpp_source=source, progress=told)
            except DataError as error:
                run, fault = None, str(error)
            if run is not None and run.tiles == run.unreadable:
                run, fault = None, f"{shown}: no patch on it; pathcli tile {shown} shows why"
            if run is None:
                self.slides.append(SlideFacts(shown, PurePath(shown).stem, fault=fault))
                drop(shown, "the slide cannot be used", fault)
            elif run.key.item in seen:
                drop(shown, "the same slide again", "")
            else:
                seen.add(run.key.item)
                yield from self._chosen(run, drop)

    def _chosen(self, run: EmbedRun, drop: Drop) -> Iterator[Patch]:
        path, tiles = run.tiling.path, run.tiling.tiles
        wsi, side = PurePath(public_name(path)).stem, round(tiles.side0)
        findings, fault = findings_in(self.reports.find(wsi), self.prompt, self.words)
        features = self.embedder.store.features.mapped(run.key)
        found = select(features, self._attributes, self._embedded(findings), self.choice)
        facts = SlideFacts(public_name(path), wsi, len(tiles), len(found.duplicates))
        facts.routes = dict(Counter(route for one in found.chosen for route in one.routes))
        facts.findings, facts.fault = list(findings), fault
        facts.warnings = [*run.warnings, *self._warnings(findings, side)]
        self.slides.append(facts)
        for row in found.duplicates:
            x, y = tiles.xy[row].tolist()
            drop(f"{wsi}_{x}_{y}", DUPLICATE, "")
        parent = PurePath(path).parent.name
        file_id = parent if _GDC.fullmatch(parent) else ""
        for one in found.chosen:
            x, y = tiles.xy[one.row].tolist()
            region = Region(str(path), (x, y), side)
            yield Patch(wsi, file_id, region, one.routes, one.text, one.cosine)

    def _embedded(self, texts: Sequence[str]) -> dict[str, NDArray[np.float32]]:
        """Return the unit vector of each text."""
        if not texts:
            return {}
        weights = np.asarray(class_weights(self.encoder, [[text] for text in texts]))
        return dict(zip(texts, weights, strict=True))

    def _warnings(self, findings: Sequence[str], side: int) -> Iterator[str]:
        if cut := too_long(self.encoder, findings) if findings else []:
            yield f"{len(cut)} findings are longer than {self.encoder.name} reads: {cut[0]!r}"
        if side != PATHGEN_PX:
            yield (
                f"a patch is {side} px of level 0 here, not {PATHGEN_PX}: its record has `side`, "
                "which others' readers of PathGen's form do not know"
            )

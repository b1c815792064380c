"""A slide and a question in; tiles chosen, read by a model, and made into one answer out.

Half of the budget are the tiles nearest to what is asked about, near-duplicates last; half are
spread over the slide's kinds of tissue, because some tiles are always the nearest, whether it
is there or not. How the tiles' answers become the slide's is stated in each answer.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from pathcli.encoders.build import build_encoder, text_encoder
from pathcli.encoders.embedding import Embedder
from pathcli.encoders.zeroshot import class_weights, too_long, unfamiliar
from pathcli.errors import DataError, UsageError
from pathcli.types import Region, Sample, TileStatus, silent
from pathcli.vlm.asked import YES_NO, allowed, matched, probabilities
from pathcli.vlm.responders import BUDGET, SHIPPED
from pathcli.vlm.slide_rules import (
    Presence,
    Said,
    Verdict,
    combine,
    plain,
    seeks_the_opposite,
    subject,
)
from pathcli.vlm.slide_tiles import choose, cosines, nearest, units
from pathcli.weights import fetch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from pathcli.encoders.embedding import EmbedRun
    from pathcli.store import Store
    from pathcli.types import Encoder, Progress, TileSpec
    from pathcli.vlm.responders import Responder
    from pathcli.vlm.slide_tiles import Attention


@dataclass(frozen=True)
class Read:
    """A tile that was chosen: its square in level-0 pixels, why, and what the model said of it.

    `similarity` is the cosine with what is asked about; `chosen` is similar, attended or spread.
    `probability` is P(yes) where the question allows yes and no, else that of the `answer`, and
    `chances` are those of all answers allowed; None and nothing where the model gives none. A
    tile that is not `familiar` to a model that tells is not read, and its answer is empty;
    `familiar` is None where nobody can tell.
    """

    x0: int
    y0: int
    side0: int
    similarity: float
    chosen: str
    answer: str = ""
    probability: float | None = None
    familiar: bool | None = None
    attention: float | None = None
    chances: tuple[float, ...] = ()


@dataclass(frozen=True)
class SlideAnswer:
    """What a slide was answered, by which `rule`, and the tiles it rests on.

    Of `tiles` those that speak most for the answer come first. `scores` are shares of the tiles
    read by answer, for choices the answers' mean probabilities, the largest first. `confidence`
    is None where nobody calibrated it. `seconds` are what making features, choosing and reading
    took.
    """

    slide: str
    question: str
    text: str
    confidence: float | None
    abstained: bool
    rule: str
    tiles: tuple[Read, ...]
    scores: Mapping[str, float]
    model: str
    encoder: str
    about: str
    scope: str
    warnings: tuple[str, ...]
    seconds: Mapping[str, float]


class SlideAsker:
    """A question on its way to slides: an encoder that chooses tiles, a model that reads them."""

    def __init__(
        self,
        question: str,
        responder: Responder,
        embedder: Embedder,
        *,
        budget: int = BUDGET,
        rule: Presence | None = None,
    ) -> None:
        """Load the encoder and embed what the question is about.

        Args:
            question: in plain words; each tile is asked it as it is.
            responder: what reads tiles; one with `unfamiliar` reads only what it knows.
            embedder: with an encoder that reads texts too.
            budget: tiles to read, at most.
            rule: for questions of yes and no (default: the model's own, or untuned).

        Raises:
            UsageError: nothing is asked, no tile may be read, or an encoder without texts.
            ResourceError: the encoder's weights are not here.
        """
        if not question.strip():
            msg = 'nothing is asked; say it in quotes: "is there tumor?"'
            raise UsageError(msg)
        if budget < 1:
            msg = f"--budget is at least 1 tile, not {budget}"
            raise UsageError(msg)
        self.question, self.responder, self.embedder = question, responder, embedder
        self.budget, self.rule = budget, rule or own_rule(responder)
        self.options = allowed(question, getattr(responder, "taught", ()))
        self.about = subject(question)
        self._opposite = self.options == YES_NO and seeks_the_opposite(question)
        reader = text_encoder(embedder.encoder)
        embedder.load()
        self._text = np.asarray(class_weights(reader, [[self.about]]))[0]

    def __call__(
        self,
        path: Path | str,
        *,
        spec: TileSpec | None = None,
        attend: Attention | None = None,
        progress: Callable[[str], Progress] | None = None,
        **tiling: Any,  # noqa: ANN401 - what `Embedder` takes
    ) -> SlideAnswer:
        """Answer of one slide; features the store has are not made again.

        Args:
            path: the slide.
            spec: how it is cut (default: the encoder's native tiles).
            attend: choose tiles by this, too.
            progress: given the name of a part, returns what is called with (done, total) of it.
            tiling: `mpp` and `mpp_source`, as `tile` takes them.

        Raises:
            DataError: not a slide, no usable resolution, or no tile on it.
            ResourceError: no space, or another process is embedding it.
        """
        told = progress or (lambda _: silent)
        start = time.perf_counter()
        run = self.embedder(path, spec=spec, progress=told("tiles embedded"), **tiling)
        if run.tiles == run.unreadable:
            msg = f"{path}: no tile to read; pathcli tile {path} shows why"
            raise DataError(msg)
        made = time.perf_counter() - start if run.encoded else 0.0
        chosen = self._choose(run, attend)
        chose = time.perf_counter() - start
        tiles = self._read(str(path), chosen, told("tiles read"))
        took = time.perf_counter() - start
        said = self._combined(tiles, run, attend)
        encoder = self.embedder.encoder
        return SlideAnswer(
            slide=str(path),
            question=self.question,
            **said._asdict(),
            tiles=_sorted(tiles, said, yes_no=self.options == YES_NO),
            model=self.responder.name,
            encoder=encoder.id,
            about=self.about,
            scope=self.responder.scope,
            warnings=(*run.warnings, *self._warnings()),
            seconds={"embed": made, "choose": chose - made, "read": took - chose},
        )

    def _warnings(self) -> Iterator[str]:
        encoder = text_encoder(self.embedder.encoder)
        if too_long(encoder, [self.about]):
            yield f"tiles are chosen by the first {encoder.text_limit} tokens of the question"

    def _choose(self, run: EmbedRun, attend: Attention | None) -> list[Read]:
        """Return the tiles to read, in the order they were chosen, without answers."""
        features, tiles = self.embedder.store.features.mapped(run.key), run.tiling.tiles
        rows = np.flatnonzero(features.status == TileStatus.OK)
        near = cosines(features.values, rows, self._text)
        ranked = {"similar": np.argsort(near if self._opposite else -near, kind="stable")}
        looked = None
        if attend is not None:
            looked = nearest(attend, tiles)[rows]
            ranked["attended"] = np.argsort(-looked, kind="stable")
        picked = choose(ranked, lambda at: units(features.values[rows[at]]), self.budget)
        strange = unfamiliar(self.embedder.encoder, features.values[rows[list(picked)]])
        found = []
        for number, (at, why) in enumerate(picked.items()):
            x, y = tiles.xy[rows[at]].tolist()
            tile = Read(
                x0=x,
                y0=y,
                side0=round(tiles.side0),
                similarity=float(near[at]),
                chosen=why,
                familiar=None if strange is None else not strange[number],
                attention=None if looked is None else float(looked[at]),
            )
            found.append(tile)
        return found

    def _read(self, slide: str, tiles: list[Read], progress: Progress) -> list[Read]:
        """Return the tiles with answers: those that are familiar, if more than half are."""
        regions = [Region(slide, (tile.x0, tile.y0), tile.side0) for tile in tiles]
        judge: Any = getattr(self.responder, "unfamiliar", None)
        strange: set[Region] = set(judge(regions)) if judge else set()
        if judge:
            pairs = zip(tiles, regions, strict=True)
            tiles = [replace(tile, familiar=region not in strange) for tile, region in pairs]
        if 2 * len(strange) >= len(tiles):
            return tiles
        rows = [row for row, region in enumerate(regions) if region not in strange]
        asked = [Sample(slide, (regions[row],), turns=(self.question,)) for row in rows]
        step = self.responder.batch
        for start in range(0, len(rows), step):
            progress(start, len(rows))
            answers = self._answers(asked[start : start + step])
            for row, said in zip(rows[start : start + step], answers, strict=True):
                tiles[row] = replace(tiles[row], **said._asdict())
        progress(len(rows), len(rows))
        return tiles

    def _answers(self, samples: Sequence[Sample]) -> Iterator[Said]:
        """Yield each tile's answer: the most probable one allowed, else what the model writes."""
        options, yes_no = self.options, self.options == YES_NO
        asked = [options] * len(samples)
        found = probabilities(self.responder, samples, asked) if options else None
        if found is not None:
            for row in found:
                best = int(row.argmax())
                yield Said(options[best], float(row[0 if yes_no else best]), tuple(row.tolist()))
            return
        for text in self.responder.answer(samples):
            option = matched(text, options) if options else None
            yield Said(option or text or "(nothing)", float(option == "yes") if yes_no else None)

    def _combined(self, tiles: Sequence[Read], run: EmbedRun, attend: Attention | None) -> Verdict:
        said = [Said(t.answer, t.probability, t.chances) for t in tiles if t.answer]
        if not said:
            strange = sum(tile.familiar is False for tile in tiles)
            rule = (
                f"{strange} of {len(tiles)} tiles chosen, half or more, are unlike what "
                f"{self.responder.name} was trained on"
            )
            return Verdict("outside what this model was trained on", None, True, rule, {})  # noqa: FBT003
        here = conditions(self, run) | {"choice of tiles": "attended" if attend else "plain"}
        return combine(self.question, self.options, said, self.rule, here)


def conditions(asker: SlideAsker, run: EmbedRun) -> dict[str, Any]:
    """Return under what a rule was fitted, or is to be used, in the words of its refusal."""
    return {
        "version of the model": asker.responder.digest[:12],
        "encoder": asker.embedder.encoder.id,
        "kind of tiles": run.key.tiles,
        "budget": asker.budget,
        "choice of tiles": "plain",
    }


def own_rule(responder: Responder) -> Presence:
    """Return the rule that ships with clover-mini; the untuned one for all other models.

    Raises:
        DataError: the rule's file is damaged.
    """
    if responder.name != SHIPPED:
        return Presence()
    path = fetch(SHIPPED).with_name("slide.yaml")
    return Presence.read(path) if path.is_file() else Presence()


def _sorted(tiles: Sequence[Read], said: Verdict, *, yes_no: bool) -> tuple[Read, ...]:
    """Return the tiles that speak for an answer first, and last what was not read."""

    def place(tile: Read) -> tuple[bool, float, float]:
        chance = tile.probability or 0.0
        if yes_no:
            return not tile.answer, 0.0, chance if said.text == "no" else -chance
        name = tile.answer if tile.answer in said.scores else plain(tile.answer)
        return not tile.answer, -said.scores.get(name, 0.0), -chance

    return tuple(sorted(tiles, key=place))


def ask_slide(
    slide: Path | str,
    question: str,
    responder: Responder,
    *,
    encoder: Encoder | str = "mini-clip",
    budget: int = BUDGET,
    store: Store | None = None,
    spec: TileSpec | None = None,
    mpp: float | None = None,
    attend: Attention | None = None,
    rule: Presence | None = None,
    device: str = "auto",
    batch: int = 32,
    workers: int = 2,
    progress: Callable[[str], Progress] | None = None,
) -> SlideAnswer:
    """Answer a question about a slide; for several slides keep one `SlideAsker`.

    Args:
        slide: a path or an address.
        question: in plain words.
        responder: what reads tiles, of `open_responder`.
        encoder: reads images and texts, and chooses tiles.
        budget: tiles to read, at most.
        store: where tiles and features are kept (default: the user's store).
        spec: how the slide is cut (default: the encoder's native tiles).
        mpp: um per level-0 pixel, over what the header says.
        attend: choose tiles by another model's attention, too.
        rule: for questions of yes and no (default: the model's own, or untuned).
        device: of the encoder: auto, cpu, cuda, cuda:1 or mps.
        batch: tiles per forward pass of the encoder.
        workers: threads that read tiles for it.
        progress: given the name of a part, returns what is called with (done, total) of it.

    Raises:
        UsageError: nothing is asked, or the encoder reads no texts.
        DataError: not a slide, no usable resolution, or no tile on it.
        ResourceError: no weights, no space, or another process is embedding the slide.
    """
    built = build_encoder(encoder) if isinstance(encoder, str) else encoder
    embedder = Embedder(built, store, device=device, batch=batch, workers=workers)
    asker = SlideAsker(question, responder, embedder, budget=budget, rule=rule)
    return asker(slide, spec=spec, mpp=mpp, attend=attend, progress=progress)

"""The part of `pathcli ask` that asks slides: tiles are chosen, read, and shown as evidence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pathcli.cli import options as o
from pathcli.cli import show

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from pathcli.slides.discovery import Found
    from pathcli.types import Progress
    from pathcli.vlm.responders import Responder
    from pathcli.vlm.slide import SlideAnswer


@dataclass(frozen=True)
class SlideOptions:
    """What of the command line concerns slides alone."""

    encoder: str
    budget: int
    attend: Path | None
    slide_mpp: float | None
    store: str | None
    device: str
    out: Path


def ask_slides(
    slides: Sequence[str],
    questions: Sequence[str],
    opened: Callable[[], Responder],
    options: SlideOptions,
    *,
    json: bool,
) -> None:
    """Ask each slide each question, write the evidence, and exit with the batch's code.

    The model is opened last: what is wrong with anything else is said before.
    """
    from pathcli.cli.batch import finish, run_batch  # noqa: PLC0415
    from pathcli.encoders import build_encoder  # noqa: PLC0415
    from pathcli.encoders.build import text_encoder  # noqa: PLC0415
    from pathcli.encoders.embedding import Embedder  # noqa: PLC0415
    from pathcli.evals.evidence import answer_json, attending, write_evidence  # noqa: PLC0415
    from pathcli.slides.discovery import discover  # noqa: PLC0415
    from pathcli.slides.readers import public_name  # noqa: PLC0415
    from pathcli.types import NOTICE  # noqa: PLC0415
    from pathcli.vlm.slide import SlideAsker  # noqa: PLC0415

    found = discover(list(slides))
    encoder = text_encoder(build_encoder(options.encoder))
    if options.attend:
        attending(options.attend)
    embedder = Embedder(encoder, o.open_store(options.store), device=options.device)
    responder = opened()
    settings = [responder.digest, embedder.encoder.id, str(options.budget), str(options.attend)]
    askers = [SlideAsker(q, responder, embedder, budget=options.budget) for q in questions]

    def work(slide: Found, progress: Progress) -> dict[str, Any]:
        tiling = _tiling(slide, options)
        attend = _attention(slide, options, tiling, progress)
        rows = []
        for asker in askers:
            said = asker(slide.path, attend=attend, progress=lambda _: progress, **tiling)
            files = write_evidence(
                options.out / folder_name(slide, asker.question, *settings), said
            )
            if not json:
                _print(said, files, several=len(askers) > 1)
            rows.append(answer_json(said) | {"files": files})
        warnings = list(dict.fromkeys(text for row in rows for text in row["warnings"]))
        return {"path": public_name(slide.path), "warnings": warnings, "answers": rows}

    done = run_batch(found, work, options.out)
    if not json and done.results:
        show.say(f"scope: {responder.scope}. {NOTICE}")
    if json and len(slides) == len(done.results) == len(askers) == 1:
        show.as_json(done.results[0]["answers"][0])
        return
    finish(done, [], as_json=json, out=options.out)


def _tiling(slide: Found, options: SlideOptions) -> dict[str, Any]:
    from pathcli.cli.tile import resolution  # noqa: PLC0415

    mpp, source = resolution(slide, options.slide_mpp)
    return {"mpp": mpp, "mpp_source": source}


def _attention(
    slide: Found,
    options: SlideOptions,
    tiling: dict[str, Any],
    progress: Callable[[int, int], None],
) -> Any:  # noqa: ANN401 - an Attention, imported late
    if options.attend is None:
        return None
    from pathcli.evals.evidence import attention_of  # noqa: PLC0415

    return attention_of(
        options.attend,
        slide.path,
        store=o.open_store(options.store),
        device=options.device,
        progress=progress,
        **tiling,
    )


def folder_name(slide: Found, question: str, *settings: str) -> str:
    """Return where an answer's evidence goes: slides of one name, questions, models lie apart."""
    from pathlib import PurePosixPath  # noqa: PLC0415

    from pathcli.slides.readers import public_name  # noqa: PLC0415
    from pathcli.types import digest  # noqa: PLC0415

    name = public_name(slide.path)
    return f"{PurePosixPath(name).stem}-ask-{digest([name, question, *settings])[:6]}"


def _print(said: SlideAnswer, files: dict[str, str], *, several: bool) -> None:
    """Print one answer: what, how sure, by which rule, and where the evidence is."""
    from pathcli.cli.ask import sure  # noqa: PLC0415
    from pathcli.slides.readers import public_name  # noqa: PLC0415

    asked = f" {said.question}" if several else ""
    text = f"no answer: {said.text}" if said.abstained else said.text
    show.answer(f"{public_name(said.slide)}:{asked} {text}{sure(said.confidence)}")
    show.say(f"rule: {said.rule}")
    for rank, tile in enumerate(said.tiles[:5], 1):
        chance = "" if tile.probability is None else f", P {tile.probability:.2f}"
        what = tile.answer or ("unfamiliar" if tile.familiar is False else "not read")
        show.say(
            f"  {rank}. x {tile.x0}, y {tile.y0}: {what}{chance}, cosine {tile.similarity:.3f}"
        )
    more = f"; {len(said.tiles) - 5} more" if len(said.tiles) > 5 else ""  # noqa: PLR2004
    show.say(f"evidence{more}: {files['sheet']} (look at it), {files['geojson']} (QuPath)")

"""The demo's last chapter: the embedded model is asked about the slide, and about patches."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pathcli.data.images import read_image
from pathcli.data.layouts import images_in
from pathcli.encoders import build_encoder
from pathcli.encoders.embedding import Embedder
from pathcli.errors import DataError
from pathcli.evals.evidence import evidence_sheet
from pathcli.evals.tile_sheet import sheet
from pathcli.report import Picture, Section
from pathcli.types import NOTICE, Sample
from pathcli.vlm.ask import answers
from pathcli.vlm.responders import open_responder
from pathcli.vlm.slide import SlideAsker

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from pathcli.store import Store
    from pathcli.types import Answer
    from pathcli.vlm.responders import Responder

SLIDE_QUESTION = "Is there tumor?"
PATCH_QUESTIONS = ("What tissue is this?", "Is it malignant?")
SHOWN = 10  # patches
_ABSTAINED = (
    "It gives no answer, and that is right: {rule}. A model that answers here would be guessing. "
    "Tiles framed in orange are the unfamiliar ones."
)


def asked(
    path: Path | str, store: Store, patches: Path | None, *, mpp: float | None, device: str
) -> list[Section]:
    """Ask clover-mini about a slide, and about a folder of patches; return a page's sections.

    Raises:
        DataError: not a slide, no tile on it, or see `shown`.
        ResourceError: weights are neither here nor to be had.
    """
    images = shown(patches) if patches else []
    responder = open_responder(device=device)
    sections = [_slide(path, store, responder, mpp=mpp, device=device)]
    return sections + ([_patches(images, responder)] if images else [])


def shown(patches: Path) -> list[Path]:
    """Return the first images of a folder, which the demo asks about.

    Raises:
        DataError: there is none, or one of them cannot be read.
    """
    images = list(images_in(patches))[:SHOWN]
    if not images:
        msg = f"{patches}: a folder without images"
        raise DataError(msg)
    for image in images:
        read_image(str(image))
    return images


def _slide(
    path: Path | str, store: Store, responder: Responder, *, mpp: float | None, device: str
) -> Section:
    embedder = Embedder(build_encoder("mini-clip"), store, device=device)
    said = SlideAsker(SLIDE_QUESTION, responder, embedder, budget=10)(path, mpp=mpp)
    told = f'Asked "{said.question}", {said.model} says: {said.text}. '
    sure = "" if said.confidence is None else f"Confidence {said.confidence:.2f}. "
    why = _ABSTAINED.format(rule=said.rule) if said.abstained else f"{sure}Rule: {said.rule}."
    caption = f'Tiles chosen for "{said.about}", and some from everywhere. {NOTICE}'
    return Section(
        "A question about the slide",
        text=f"{told}{why} Scope: {said.scope}.",
        code=f'pathcli ask {said.slide} "{said.question}"',
        pictures=[Picture(evidence_sheet(said), caption, strip=True)],
    )


def _patches(patches: Sequence[Path], responder: Responder) -> Section:
    samples = [Sample(p.name, (str(p),), turns=(q,)) for p in patches for q in PATCH_QUESTIONS]
    said = answers(samples, responder)
    pairs = [said[i : i + len(PATCH_QUESTIONS)] for i in range(0, len(said), len(PATCH_QUESTIONS))]
    captions = [[p.name, *map(_line, some)] for p, some in zip(patches, pairs, strict=True)]
    pixels = [read_image(str(p)) for p in patches]
    return Section(
        "Questions about patches",
        text=f"Asked of each: {' '.join(PATCH_QUESTIONS)} Confidences are calibrated on patches "
        f"that training never saw. Scope: {responder.scope}.",
        code=f'pathcli ask patch.png "{PATCH_QUESTIONS[0]}"',
        pictures=[Picture(sheet(pixels, captions), NOTICE, strip=True)],
    )


def _line(answer: Answer) -> str:
    sure = "" if answer.confidence is None else f" ({answer.confidence:.2f})"
    return "no answer: unfamiliar" if answer.abstained else answer.text + sure

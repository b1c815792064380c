"""`pathcli chat`: questions about images, one after another, each read with those before it."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from pathcli.cli import options as o
from pathcli.cli.ask import sure
from pathcli.errors import UsageError

app = typer.Typer(rich_markup_mode=None, add_completion=False)

Images = Annotated[list[str], typer.Argument(help="Images of patches, shown together.")]


@app.command()
def chat(
    images: Images,
    model: o.Model = o.SHIPPED,
    load: o.Load = "auto",
    max_tokens: o.MaxTokens = None,
    device: o.Device = "auto",
) -> None:
    """Ask follow-up questions about the same images.

    Type a question a line; an empty line begins anew, the end of input (Ctrl-D) ends. Images
    are encoded once. Questions may also be piped in. Nobody calibrated answers that follow on
    others: only the first of a talk has a confidence.
    """
    from pathcli.cli import show  # noqa: PLC0415
    from pathcli.data.images import read_image  # noqa: PLC0415
    from pathcli.slides.discovery import is_slide  # noqa: PLC0415
    from pathcli.types import NOTICE  # noqa: PLC0415
    from pathcli.vlm.ask import Talk  # noqa: PLC0415
    from pathcli.vlm.responders import open_responder  # noqa: PLC0415

    o.check(None, device)
    for image in images:  # said now, not after the first question
        if is_slide(image):
            msg = f"{image} is a slide; chat is about patches: pathcli ask {image} QUESTION"
            raise UsageError(msg)
        read_image(image)
    responder = open_responder(model, device=device, load=load)
    talk = Talk(images, responder, max_tokens)
    show.say(f"scope: {responder.scope}. {NOTICE}")
    while True:
        show.prompt("> ")
        line = sys.stdin.readline()
        if not line:
            return
        if not line.strip():
            talk = Talk(images, responder, max_tokens)
            continue
        first = not talk.turns
        found = talk(line.strip())
        told = found.text + (sure(found.confidence) if first else "")
        show.answer(f"no answer: {found.text}" if found.abstained else told)

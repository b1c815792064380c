"""`pathcli ask`: images and a question in, an answer out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pathcli.cli import options as o

app = typer.Typer(rich_markup_mode=None, add_completion=False)

Images = Annotated[list[str], typer.Argument(help="Images of patches: PNG, JPEG, TIFF.")]
Question = Annotated[str, typer.Argument(help='What to ask, in quotes: "what tissue?".')]
RunFolder = Annotated[
    Path | None,
    typer.Option("--run", help="A run of yours [default: the shipped clover-mini].", metavar="DIR"),
]
Most = Annotated[int, typer.Option("--max-tokens", help="Most tokens of an answer.", min=1)]


@app.command()
def ask(
    images: Images,
    question: Question,
    run: RunFolder = None,
    max_tokens: Most = 64,
    device: o.Device = "auto",
    json: o.Json = False,
) -> None:
    """Ask a vision-language model about patches.

    The shipped clover-mini knows three kinds of lung tissue, and abstains on images unlike any
    it was trained on. No confidence is given: none has been calibrated yet.
    """
    from pathcli.cli import show  # noqa: PLC0415
    from pathcli.types import NOTICE  # noqa: PLC0415
    from pathcli.vlm.ask import ask as ask_of  # noqa: PLC0415

    o.check(None, device)
    found = ask_of(images, question, run=run, device=device, max_new_tokens=max_tokens)
    if json:
        show.as_json(
            {
                "answer": "" if found.abstained else found.text,
                "confidence": None,
                "abstained": found.abstained,
                "scores": {},
                "evidence": list(found.evidence),
                "scope": found.scope,
                "notice": NOTICE,
            }
        )
        return
    show.answer(f"no answer: {found.text}" if found.abstained else found.text)
    if found.abstained:
        show.say(f"unfamiliar: {', '.join(found.evidence)}")
    show.say(f"scope: {found.scope}. {NOTICE}")

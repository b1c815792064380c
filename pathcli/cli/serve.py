"""`pathcli serve`: a model's answers over HTTP, in OpenAI's format."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from pathcli.cli import options as o
from pathcli.errors import ResourceError

app = typer.Typer(rich_markup_mode=None, add_completion=False)

Host = Annotated[
    str,
    typer.Option("--host", help="Address to listen on; others than this machine's need a token."),
]
Port = Annotated[
    int, typer.Option("--port", help="Port to listen on; 0 is any free one.", min=0, max=65535)
]
Token = Annotated[
    str | None,
    typer.Option(
        "--token",
        help="What clients send as their key [default: $PATHCLI_TOKEN].",
        metavar="TEXT",
    ),
]
MaxBody = Annotated[
    int, typer.Option("--max-body", help="Most megabytes of a request.", metavar="MB", min=1)
]


@app.command()
def serve(
    model: o.Model = o.SHIPPED,
    load: o.Load = "auto",
    host: Host = "127.0.0.1",
    port: Port = 8000,
    token: Token = None,
    max_body: MaxBody = 20,
    device: o.Device = "auto",
    json: o.Json = False,
) -> None:
    """Answer questions about images over HTTP, as OpenAI's endpoints do.

    It has /v1/chat/completions, /v1/models and /health, for any client of OpenAI's; images are
    sent as data: URLs. It listens on this machine alone: for others --host and a token are
    needed. Interrupt it to end it.
    """
    from pathcli.cli import show  # noqa: PLC0415

    try:
        from pathcli.vlm.serve import server  # noqa: PLC0415
    except ImportError as error:
        if error.name not in {"fastapi", "uvicorn", "starlette"}:
            raise
        msg = "serve needs fastapi and uvicorn: pip install 'pathcli[serve]'"
        raise ResourceError(msg) from None
    from pathcli.types import NOTICE  # noqa: PLC0415
    from pathcli.vlm.responders import open_responder  # noqa: PLC0415
    from pathcli.vlm.serve.limits import MEGA, Limits  # noqa: PLC0415

    o.check(None, device)
    token = token or os.environ.get("PATHCLI_TOKEN", "").strip() or None
    server.check(host, token)
    with server.bind(host, port) as bound:
        responder = open_responder(model, device=device, load=load)
        limits = Limits(body=max_body * MEGA)
        served = server.application(responder, token=token, limits=limits)
        bound.listen()
        where, name = server.address(bound), served.state.model
        if json:
            about = {"address": where, "model": name, "scope": responder.scope, "notice": NOTICE}
            show.as_json(about)
            sys.stdout.flush()
        else:
            header = ' -H "Authorization: Bearer $PATHCLI_TOKEN"' if token else ""
            show.say(f"{name} answers at {where}; try: curl{header} {where}/models. {NOTICE}")
        server.run(served, bound)

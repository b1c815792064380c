"""The HTTP server: where it listens, who may ask, and how it begins and ends.

It listens on this machine alone unless a token is given, and fetches nothing.
"""

from __future__ import annotations

import hmac
import ipaddress
import re
import signal
import socket
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import uvicorn
from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException

from pathcli.errors import ResourceError, UsageError
from pathcli.vlm.serve.limits import Limits, RefusedError
from pathcli.vlm.serve.service import Service, refusal
from pathcli.vlm.serve.wire import card

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

    from pathcli.vlm.responders import Responder

_END_S = 30  # answers that are under way are waited for so long when the server ends


def is_loopback(host: str) -> bool:
    """Tell whether a host's name or address is this machine's own, reached from nowhere else."""
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def check(host: str, token: str | None) -> None:
    """Refuse to be reached from elsewhere without a token.

    Raises:
        UsageError: no token, or one that no header can hold.
    """
    if token is None and not is_loopback(host):
        msg = f"--host {host} lets others in; set PATHCLI_TOKEN, or --token, which they must send"
        raise UsageError(msg)
    if token is not None and not (token.isascii() and token.isprintable() and " " not in token):
        msg = "the token holds a blank, a line's end, or letters that are not ASCII"
        raise UsageError(msg)


def bind(host: str, port: int) -> socket.socket:
    """Return a socket that has an address; port 0 is any free one. Nobody is let in yet.

    Raises:
        UsageError: no such host.
        ResourceError: the address is taken, or not to be had.
    """
    try:
        family, kind, *_, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        msg = f"--host {host}: no such host ({error})"
        raise UsageError(msg) from error
    made = socket.socket(family, kind)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(place)
    except OSError as error:
        made.close()
        msg = f"{host}:{port} cannot be had ({error.strerror}); give another --port, 0 for any"
        raise ResourceError(msg) from error
    return made


def address(bound: socket.socket) -> str:
    """Return the address of the endpoint, as clients want it."""
    host, port = bound.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"


def _name(host: str) -> str:
    """Return what a header Host names: `request.url` takes this machine where it is odd."""
    return re.sub(r":\d*$", "", host).removeprefix("[").removesuffix("]").lower()


class Guard:
    """Lets those in who know the token, or, where there is none, those who mean this machine.

    A page in a browser can give this machine's address a name of its own: without a token the
    Host that a request names must be this machine's.
    """

    def __init__(self, app: ASGIApp, token: str | None) -> None:
        """Stand before an application."""
        self.app, self.token = app, token and f"Bearer {token}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it before its body is read."""
        try:
            if scope["type"] == "http":
                self._check(Request(scope))
        except RefusedError as refused:
            await refusal(refused)(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    def _check(self, request: Request) -> None:
        if self.token:
            given = request.headers.get("authorization", "").encode()
            if not hmac.compare_digest(given, self.token) and request.url.path != "/health":
                why = "no such token; send the server's as: Authorization: Bearer TOKEN"
                ask = {"WWW-Authenticate": "Bearer"}
                raise RefusedError(why, status=401, code="invalid_api_key", headers=ask)
        elif not is_loopback(_name(host := request.headers.get("host", ""))):
            why = f"Host {host!r:.60} is not this machine; others need a token"
            raise RefusedError(why, status=403, code="wrong_host")


def application(
    responder: Responder, *, token: str | None = None, limits: Limits | None = None
) -> FastAPI:
    """Return what serves a model: /health, /v1/models and /v1/chat/completions."""
    service = Service(responder, limits or Limits())
    app = FastAPI(lifespan=service.life, openapi_url=None)
    app.state.model = service.model
    about = card(service.model, responder.scope, service.begun)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "model": service.model, "waiting": len(service.worker)}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [about]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        if name != service.model:
            raise HTTPException(404, f"there is no model {name!r:.100}, but {service.model!r}")
        return about

    app.add_api_route("/v1/chat/completions", service.chat, methods=["POST"], response_model=None)

    @app.exception_handler(HTTPException)
    async def wrong(_: Request, error: HTTPException) -> Response:
        why = f"{error.detail}; this server has /v1/chat/completions (POST), /v1/models, /health"
        heads = dict(error.headers or {})
        return refusal(RefusedError(why, status=error.status_code, headers=heads))

    app.add_middleware(Guard, token=token)
    return app


def server(app: FastAPI) -> uvicorn.Server:
    """Return a server that is not begun; it logs nothing of what is asked."""
    return uvicorn.Server(
        uvicorn.Config(
            app,
            http="h11",
            ws="none",
            loop="asyncio",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=_END_S,
        )
    )


def run(app: FastAPI, bound: socket.socket) -> None:
    """Serve until SIGINT or SIGTERM, which end it in order: what is under way is answered."""
    signals = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(one, lambda *_: None) for one in signals]  # uvicorn raises them anew
    try:
        server(app).run(sockets=[bound])
    finally:
        for one, handler in zip(signals, before, strict=True):
            signal.signal(one, handler)

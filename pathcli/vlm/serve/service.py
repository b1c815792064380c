"""One request after another: its bytes are read, its images looked at, the model asked."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import Request, Response
from fastapi.responses import JSONResponse
from starlette.requests import ClientDisconnect

from pathcli.errors import DataError, PathcliError, UsageError
from pathcli.types import Sample
from pathcli.vlm.ask import limited
from pathcli.vlm.serve.limits import MEGA, Limits, RefusedError, busy
from pathcli.vlm.serve.pictures import Pictures
from pathcli.vlm.serve.wire import Asked, Reply, chunks, completion, read, worth
from pathcli.vlm.serve.worker import Worker

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from fastapi import FastAPI

    from pathcli.vlm.responders import Responder
    from pathcli.vlm.serve.worker import Job

log = logging.getLogger("pathcli")

_READERS = 4  # requests whose images are decoded at a time
_GONE = 499  # of a client that has left; nobody reads it


def served_as(name: str) -> str:
    """Return what a responder's name is to clients: no path and no address of this machine."""
    if name.startswith(("http://", "https://")):
        return name.partition("#")[2]
    return Path(name).resolve().name if Path(name).exists() else name


class Service:
    """A model, and what each request to it comes to."""

    def __init__(self, responder: Responder, limits: Limits) -> None:
        """Take what answers, and the most that is borne."""
        self.responder, self.limits = responder, limits
        self.model, self.begun = served_as(responder.name), int(time.time())
        self.worker = Worker(responder, limits.waiting)
        self._pictures = Pictures()
        self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="images")
        self._held = 0

    @asynccontextmanager
    async def life(self, _: FastAPI) -> AsyncIterator[None]:
        """Answer as long as the server runs."""
        running = asyncio.create_task(self.worker.run())
        yield
        running.cancel()
        with suppress(asyncio.CancelledError):
            await running
        self._readers.shutdown(cancel_futures=True)
        self._pictures.close()

    async def chat(self, request: Request) -> Response:
        """Answer a conversation, or say why not."""
        try:
            return await self._chat(request)
        except RefusedError as error:
            return refusal(error)
        except ClientDisconnect:
            return Response(status_code=_GONE)
        except PathcliError as error:
            return refusal(RefusedError(str(error), status=503, code="unavailable"))
        except Exception as error:  # one request must not end the others
            log.exception("a request failed")
            why = f"internal error ({type(error).__name__}); the server goes on"
            return refusal(RefusedError(why, status=500, code="internal_error"))

    async def _chat(self, request: Request) -> Response:
        self.worker.check()
        asked, paths = await self._received(request)
        names = {path: f"image {n}" for n, path in reversed([*enumerate(paths, start=1)])}
        try:
            sample = Sample(paths[0], tuple(paths), turns=asked.turns)
            job = self.worker.put(sample, limited(self.responder.decoding, asked.max_tokens))
            reply = await _waited(request, self.worker, job)
        except (UsageError, DataError) as error:
            raise RefusedError(_said(error, names), code="invalid_value") from error
        finally:
            self._pictures.release(paths)
        seen = tuple(names.get(path, path) for path in reply.answer.evidence)
        reply = replace(reply, answer=replace(reply.answer, evidence=seen))
        head = {"X-Pathcli": json.dumps(worth(reply.answer))}
        if asked.stream:
            events = chunks(reply, self.model, usage=asked.usage)
            return Response(events, headers=head, media_type="text/event-stream")
        return JSONResponse(completion(reply, self.model), headers=head)

    # --- what comes in -------------------------------------------------------------------------

    async def _received(self, request: Request) -> tuple[Asked, list[str]]:
        """Return a conversation, and the files of its images, which the caller releases."""
        body = bytearray()
        try:
            async with asyncio.timeout(self.limits.body_s):
                await self._read(request, body)
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._readers, self._understood, body)
        except TimeoutError:
            msg = f"the request did not come within {self.limits.body_s:g} s"
            close = {"Connection": "close"}
            raise RefusedError(msg, status=408, code="timeout", headers=close) from None
        finally:
            self._held -= len(body)

    async def _read(self, request: Request, body: bytearray) -> None:
        """Fill `body` with what is sent, whatever its length is said to be.

        Raises:
            RefusedError: it is too much, or all requests together are.
        """
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            msg = "send JSON, and the header Content-Type: application/json"
            raise RefusedError(msg, status=415, code="unsupported_media_type")
        most = self.limits.body
        msg = f"the request has more than {most / MEGA:g} MB"
        large = RefusedError(msg, status=413, code="request_too_large")
        said = request.headers.get("content-length", "")
        if said.isdecimal() and int(said) > most:
            raise large
        async for chunk in request.stream():
            body += chunk
            self._held += len(chunk)
            if len(body) > most:
                raise large
            if self._held > self.limits.held:
                raise busy(1)

    def _understood(self, body: bytearray) -> tuple[Asked, list[str]]:
        asked = read(bytes(body), self.limits)
        if asked.model != self.model:
            msg = f"model: there is no {asked.model!r:.100}; this server has {self.model!r}"
            raise RefusedError(msg, status=404, param="model", code="model_not_found")
        paths = self._pictures.keep(asked.images, self.limits.pixels)
        return replace(asked, images=()), paths


async def _waited(request: Request, worker: Worker, job: Job) -> Reply:
    """Return the reply; a question whose client leaves before its turn is not asked.

    Raises:
        ClientDisconnect: the client has left.
        Exception: the question's own.
    """
    left = asyncio.ensure_future(request.receive())  # after a body, nothing comes but the end
    either: set[asyncio.Future[Any]] = {job.reply, left}
    try:
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not job.reply.done() and worker.drop(job):
            raise ClientDisconnect
        return await job.reply
    finally:
        left.cancel()
        worker.drop(job)


def _said(error: PathcliError, names: dict[str, str]) -> str:
    text = str(error)
    for path, name in names.items():
        text = text.replace(path, name)
    return text


def refusal(refused: RefusedError) -> Response:
    """Return the response of a request that is not answered."""
    return JSONResponse(refused.to_json(), refused.status, refused.headers)

"""The model's one thread: conversations wait for it in line, and are answered several at a time."""

from __future__ import annotations

import asyncio
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pathcli.vlm.ask import AT_ONCE, answers, told
from pathcli.vlm.serve.limits import busy
from pathcli.vlm.serve.wire import Reply

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pathcli.types import Answer, Sample
    from pathcli.vlm.responders import Decoding, Responder

log = logging.getLogger("pathcli")


@dataclass(eq=False)
class Job:
    """A question, and the reply or the error that will be there."""

    sample: Sample
    decoding: Decoding
    reply: asyncio.Future[Reply]


class Worker:
    """Answers what waits. All but the model itself happens on the event loop."""

    def __init__(self, responder: Responder, most: int) -> None:
        """Take a model, and how many may wait for it."""
        self.responder, self.most = responder, most
        self._waiting: list[Job] = []
        self._wake = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._pace = 1.0  # seconds an answer took lately

    def __len__(self) -> int:
        """Return how many wait."""
        return len(self._waiting)

    def check(self) -> None:
        """Refuse one more where too many wait.

        Raises:
            RefusedError: come again later.
        """
        if len(self) >= self.most:
            raise busy(len(self) * self._pace)

    def put(self, sample: Sample, decoding: Decoding) -> Job:
        """Put a question at the end of the line.

        Raises:
            RefusedError: it is too long already.
        """
        self.check()
        job = Job(sample, decoding, asyncio.get_running_loop().create_future())
        self._waiting.append(job)
        self._wake.set()
        return job

    def drop(self, job: Job) -> bool:
        """Take a question out of the line; False if it is being answered, or was."""
        with suppress(ValueError):
            self._waiting.remove(job)
            return True
        return False

    async def run(self) -> None:
        """Answer until cancelled; what is being answered then is finished."""
        loop = asyncio.get_running_loop()
        try:
            while True:
                while not self._waiting:
                    self._wake.clear()
                    await self._wake.wait()
                jobs = self._next()
                begun = time.monotonic()
                samples, decoding = [job.sample for job in jobs], jobs[0].decoding
                found = await loop.run_in_executor(self._thread, self._answered, samples, decoding)
                self._pace = (time.monotonic() - begun) / len(jobs)
                for job, reply in zip(jobs, found, strict=True):
                    if job.reply.done():  # the request was cancelled meanwhile
                        continue
                    if isinstance(reply, Reply):
                        job.reply.set_result(reply)
                    else:
                        job.reply.set_exception(reply)
        finally:
            self._thread.shutdown(cancel_futures=True)

    def _next(self) -> list[Job]:
        """Return the first in line, and those behind it that are searched for alike."""
        decoding = self._waiting[0].decoding
        jobs = [job for job in self._waiting if job.decoding == decoding][:AT_ONCE]
        for job in jobs:
            self._waiting.remove(job)
        return jobs

    # --- in the model's thread -----------------------------------------------------------------

    def _answered(self, samples: Sequence[Sample], decoding: Decoding) -> list[Reply | Exception]:
        """Return each question's reply, or its own error: those of a batch are asked apart."""
        try:
            found = answers(samples, self.responder, decoding)
            pairs = zip(samples, found, strict=True)
            return [self._counted(sample, answer, decoding) for sample, answer in pairs]
        except Exception as error:  # noqa: BLE001 - one question must not end the others
            half = len(samples) // 2
            if not half:
                return [error]
            parts = (samples[:half], samples[half:])
            return [reply for part in parts for reply in self._answered(part, decoding)]

    def _counted(self, sample: Sample, answer: Answer, decoding: Decoding) -> Reply:
        if answer.abstained:
            return Reply(answer)
        read, written = tokens(self.responder, sample, answer.text)
        chosen = answer.confidence is not None
        cut = not chosen and written is not None and written >= decoding.max_new_tokens
        return Reply(answer, read, written, cut)


def tokens(responder: Responder, sample: Sample, text: str) -> tuple[int | None, int | None]:
    """Return the tokens of a question, images among them, and of its answer; None if unknown.

    Both are known of pathcli's own models, those of the answer also of transformers' models.
    """
    from pathcli.vlm.own import RunResponder  # noqa: PLC0415 - it reads torch

    own = responder.examples if isinstance(responder, RunResponder) else None
    tokenizer: Any = own.language.tokenizer if own else getattr(responder, "tokenizer", None)
    if tokenizer is None:
        return None, None
    written = len(tokenizer(text, add_special_tokens=False)["input_ids"])
    if own is None:
        return None, written
    counts = [own.count] * len(sample.images)
    asked = told(sample, responder.taught)
    split = own.language.seq2seq
    return len(own.chat.ask(asked, tokenizer, counts, seq2seq=split).ids), written

"""What asking costs over the bare language model; one JSON line a part.

`words`: time to the first word and words a second of a responder's answer to a second question
about an image, over the connector and transformers' own `generate` on image tokens that lie
ready: what reading the words of a question and keeping image tokens cost.
`again`: images encoded by a first question on each of some images, and by a second.
`folder`: questions answered in batches over the same ones one at a time.
`slide`: of a question about a slide whose features are in the store, the share of the time that
is neither making image tokens nor the language model.

What is compared alternates; the median of the ratios of neighbours counts. Answers are as long
as a limit says: the ends of an answer are switched off, so that both sides say as much.

    python benchmarks/ask.py IMAGES [--slide SLIDE --store DIR] [--model NAME] [--rounds 5]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pathcli.data.layouts import images_in
from pathcli.encoders import build_encoder
from pathcli.encoders.embedding import Embedder
from pathcli.store import Store
from pathcli.types import Sample
from pathcli.vlm.own import RunResponder
from pathcli.vlm.responders import Decoding, open_responder
from pathcli.vlm.slide import SlideAsker
from pathcli.vlm.towers import sent

QUESTION = "Describe the tissue in this image."
LONG = 24  # words of an answer

Line = dict[str, Any]


def seconds(call: Callable[[], object]) -> float:
    """Return how long a call takes."""
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def ratio(over: Callable[[], object], under: Callable[[], object], rounds: int) -> Line:
    """Return the median ratio of neighbours in time, and both medians in seconds."""
    over(), under()  # nothing is built in what is timed
    times = [(seconds(over), seconds(under)) for _ in range(rounds)]
    each = [a / b for a, b in times]
    a, b = (statistics.median(column) for column in zip(*times, strict=True))
    return {
        "ratio": round(statistics.median(each), 3),
        "over_s": round(a, 3),
        "under_s": round(b, 3),
    }


def words(responder: RunResponder, images: Sequence[str], rounds: int) -> Iterable[Line]:
    """Compare the first word, and all of them, with the bare network's."""
    sample = Sample("x", (images[0],), turns=(QUESTION,))
    network = responder.examples.language.network
    batch = sent(responder.examples.ask([sample], np.random.default_rng(0)), responder.device)
    mask = batch["mask"].long()

    for name, count in (("first word", 1), ("words", LONG)):
        decoding = Decoding(count, min_new_tokens=count)

        def bare(count: int = count) -> object:
            with torch.inference_mode():
                embeds = responder.module.embeds(batch).to(network.dtype)
                how = {"max_new_tokens": count, "min_new_tokens": count}
                return network.generate(inputs_embeds=embeds, attention_mask=mask, **how)

        def ours(decoding: Decoding = decoding) -> object:
            return list(responder.answer([sample], decoding))

        found = ratio(bare, ours, rounds)
        yield {"part": name, "words": count, "share_of_bare_speed": found["ratio"], **found}


def again(responder: RunResponder, images: Sequence[str]) -> Line:
    """Count what the encoder sees of a first question, and of a second."""
    seen: list[int] = []
    encode = responder.seen.encoder.encode
    responder.seen.encoder.encode = lambda x: seen.append(len(x)) or encode(x)  # type: ignore[method-assign, func-returns-value]
    counts = []
    for question in (QUESTION, "Is it malignant?"):
        list(responder.answer([Sample(i, (i,), turns=(question,)) for i in images], Decoding(2)))
        counts.append(sum(seen))
        seen.clear()
    responder.seen.encoder.encode = encode  # type: ignore[method-assign]
    return {"part": "again", "images": len(images), "first": counts[0], "second": counts[1]}


def folder(responder: RunResponder, images: Sequence[str], rounds: int) -> Line:
    """Compare questions in batches with the same ones one at a time; images are known by then."""
    samples = [Sample(i, (i,), turns=("What tissue is this?",)) for i in images]

    def one_by_one() -> None:
        for sample in samples:
            list(responder.answer([sample], Decoding(8)))

    found = ratio(one_by_one, lambda: list(responder.answer(samples, Decoding(8))), rounds)
    return {"part": "folder", "questions": len(samples), "times_as_fast": found["ratio"], **found}


def slide(responder: RunResponder, path: str, store: Path | None, rounds: int) -> Line:
    """Time a question about a slide, and within it the encoder and the language model."""
    spent = [0.0]

    def timed(call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*given: Any, **named: Any) -> Any:  # noqa: ANN401
            begin = time.perf_counter()
            found = call(*given, **named)
            spent[0] += time.perf_counter() - begin
            return found

        return run

    embedder = Embedder(build_encoder("mini-clip"), Store(store))
    asker = SlideAsker("is there tumor?", responder, embedder)
    known = asker(path)  # features go into the store
    for place, name in (
        (responder.seen.encoder, "encode"),
        (responder.module, "generate"),
        (responder.module, "likelihoods"),
    ):
        setattr(place, name, timed(getattr(place, name)))
    shares, took = [], []
    for _ in range(rounds):
        responder.seen._kept.clear()  # noqa: SLF001 - as if it was asked for the first time
        spent[0] = 0.0
        took.append(seconds(lambda: asker(path)))
        shares.append(1 - spent[0] / took[-1])
    tiles = embedder(path).tiles
    found = {
        "tiles": tiles,
        "read": len(known.tiles),
        "share_else": round(statistics.median(shares), 4),
    }
    return {"part": "slide", **found, "seconds": round(statistics.median(took), 3)}


def main() -> None:
    """Print a line a part."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("images", type=Path)
    parser.add_argument("--model", default="clover-mini")
    parser.add_argument("--slide")
    parser.add_argument("--store", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--questions", type=int, default=32)
    given = parser.parse_args()
    images = [str(path) for path in images_in(given.images)][: given.questions]
    responder = open_responder(given.model)
    if not isinstance(responder, RunResponder):
        parser.error(f"{given.model} is no model of pathcli's own")
    print(json.dumps(again(responder, images)), flush=True)
    for line in words(responder, images, given.rounds):
        print(json.dumps(line), flush=True)
    print(json.dumps(folder(responder, images, given.rounds)), flush=True)
    if given.slide:
        print(json.dumps(slide(responder, given.slide, given.store, given.rounds)), flush=True)


if __name__ == "__main__":
    main()

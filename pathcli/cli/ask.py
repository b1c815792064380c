"""`pathcli ask`: images and a question in, answers out."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pathcli.cli import options as o
from pathcli.errors import DataError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from pathcli.types import Answer, Sample
    from pathcli.vlm.responders import Decoding, Responder

app = typer.Typer(rich_markup_mode=None, add_completion=False)

Asked = Annotated[
    list[str],
    typer.Argument(
        help='Images, folders of images, or a slide; then the question: "what tissue?".',
        metavar="IMAGES... QUESTION",
    ),
]
QuestionFile = Annotated[
    Path | None,
    typer.Option(
        "--question-file", help="Text file, a question a line, instead of one.", metavar="FILE"
    ),
]
Together = Annotated[
    bool, typer.Option("--together", help="One question on all images at once, not on each.")
]
Encoder = Annotated[
    str | None,
    typer.Option(
        "--encoder",
        help="Of a slide: what chooses tiles by the question [default: mini-clip].",
        metavar="NAME",
    ),
]
Budget = Annotated[
    int | None,
    typer.Option("--budget", help="Of a slide: most tiles to read [default: 16].", min=1),
]
Attend = Annotated[
    Path | None,
    typer.Option("--attend", help="Of a slide: choose tiles by a MIL run's attention, too."),
]
ShowPrompt = Annotated[
    bool, typer.Option("--show-prompt", help="Print what the model reads, and ask nothing.")
]


@app.command()
def ask(
    images: Asked,
    question_file: QuestionFile = None,
    together: Together = False,
    model: o.Model = o.SHIPPED,
    load: o.Load = "auto",
    max_tokens: o.MaxTokens = None,
    show_prompt: ShowPrompt = False,
    encoder: Encoder = None,
    budget: Budget = None,
    attend: Attend = None,
    slide_mpp: o.SlideMpp = None,
    out: o.Out = o.OUT,
    store: o.StoreRoot = None,
    device: o.Device = "auto",
    json: o.Json = False,
) -> None:
    """Ask a vision-language model about patches, or a slide.

    Every image is asked by itself. Of a slide the tiles that fit the question are read, and some
    from everywhere beside them; the answer comes with them as a sheet, a table and GeoJSON.

    The shipped clover-mini knows three kinds of lung tissue, and abstains on images unlike any
    it was trained on. A confidence is given where the question allows a few answers and somebody
    calibrated the model on data that was kept apart.
    """
    from pathcli.cli.ask_slides import SlideOptions, ask_slides  # noqa: PLC0415
    from pathcli.slides.discovery import is_slide  # noqa: PLC0415
    from pathcli.vlm.ask import limited, told  # noqa: PLC0415
    from pathcli.vlm.responders import BUDGET, open_responder  # noqa: PLC0415

    o.check(slide_mpp, device)
    opened = partial(open_responder, model, device=device, load=load)
    places, questions = _split(images, question_file)
    if any(map(is_slide, places)):
        _refuse(
            places,
            {"--together": together, "--show-prompt": show_prompt, "--max-tokens": max_tokens},
        )
        given = SlideOptions(
            encoder or "mini-clip", budget or BUDGET, attend, slide_mpp, store, device, out
        )
        ask_slides(places, questions, opened, given, json=json)
        return
    of_slides = {"--attend": attend, "--slide-mpp": slide_mpp, "--encoder": encoder}
    of_slides |= {"--budget": budget, "--store": store}
    for name in [n for n, v in of_slides.items() if v is not None]:
        msg = f"{name} is for slides, not for images"
        raise UsageError(msg)
    samples = _samples(places, questions, together=together)
    responder = opened()
    if show_prompt:
        prompts = [responder.prompt(told(sample, responder.taught)) for sample in samples]
        _show_prompts(samples, prompts, json=json)
        return
    _ask_images(samples, responder, limited(responder.decoding, max_tokens), json=json)


def _split(given: Sequence[str], file: Path | None) -> tuple[list[str], list[str]]:
    """Return images and questions.

    Raises:
        UsageError: one of them is missing.
        DataError: an image is not there, or the file of questions cannot be read or has none.
    """
    if file is None:
        places, questions = list(given[:-1]), [given[-1]]
        if places and os.path.exists(given[-1]):  # noqa: PTH110 - a Path bears no long question
            msg = f"{given[-1]} is a file, not a question; the question comes last"
            raise UsageError(msg)
    else:
        places, questions = list(given), _questions(file)
    if not places or not questions[0].strip():
        msg = "ask takes an image and a question: pathcli ask img.png 'what tissue?'"
        raise UsageError(msg)
    return places, questions


def _questions(file: Path) -> list[str]:
    """Return the questions of a file, one a line.

    Raises:
        DataError: it is not there, not text, or empty.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = "not UTF-8 text" if isinstance(error, UnicodeDecodeError) else error.strerror
        msg = f"{file}: questions cannot be read ({why})"
        raise DataError(msg) from error
    if questions := [line.strip() for line in lines if line.strip()]:
        return questions
    msg = f"{file}: no question in it; write one a line"
    raise DataError(msg)


def _refuse(places: Sequence[str], given: Mapping[str, object]) -> None:
    """Refuse what cannot be asked of a slide.

    Raises:
        UsageError: images among slides, or an option that is of images alone.
    """
    from pathcli.slides.discovery import is_slide  # noqa: PLC0415

    if images := [place for place in places if not is_slide(place)]:
        msg = f"{images[0]} is no slide, and others here are; ask slides and images apart"
        raise UsageError(msg)
    for name in [name for name, value in given.items() if value]:
        msg = f"{name} is for images, not for slides"
        raise UsageError(msg)


def _samples(places: Sequence[str], questions: Sequence[str], *, together: bool) -> list[Sample]:
    """Return every question on every image, or on all of them together.

    Raises:
        DataError: a place is not there, or a folder without images.
    """
    from pathcli.data.layouts import images_in  # noqa: PLC0415
    from pathcli.types import Sample  # noqa: PLC0415

    refs: list[str] = []
    for place in places:
        if not os.path.exists(place):  # noqa: PTH110 - before a model is read; see `_split`
            msg = f"{place}: no such file or folder; the question comes last, as one text in quotes"
            raise DataError(msg)
        found = list(images_in(Path(place))) if Path(place).is_dir() else [place]
        refs += map(str, found)
        if not found:
            msg = f"{place}: a folder without images; of slides name the files"
            raise DataError(msg)
    sets = [tuple(refs)] if together else [(ref,) for ref in refs]
    return [Sample(some[0], some, turns=(q,)) for some in sets for q in questions]


def _row(sample: Sample, answer: Answer) -> dict[str, Any]:
    """Return an answer as JSON values."""
    from pathcli.types import NOTICE  # noqa: PLC0415

    return _asked(sample) | {
        "answer": "" if answer.abstained else answer.text,
        "confidence": answer.confidence,
        "abstained": answer.abstained,
        "why": answer.text if answer.abstained else None,
        "scores": dict(answer.scores),
        "evidence": list(answer.evidence),
        "scope": answer.scope,
        "notice": NOTICE,
    }


def _asked(sample: Sample) -> dict[str, Any]:
    return {"images": list(sample.images), "question": sample.turns[-1]}


def _show_prompts(samples: Sequence[Sample], prompts: Sequence[str], *, json: bool) -> None:
    """Print what a model would read of each sample; or all as JSON."""
    from pathcli.cli import show  # noqa: PLC0415

    if json:
        rows = [_asked(s) | {"prompt": p} for s, p in zip(samples, prompts, strict=True)]
        show.as_json(rows[0] if len(rows) == 1 else rows)
        return
    for prompt in prompts:
        show.answer(prompt)


def _ask_images(
    samples: Sequence[Sample], responder: Responder, decoding: Decoding, *, json: bool
) -> None:
    """Print a line an answer as they come, and once what the model knows; or all as JSON.

    An image that cannot be read stops no other; the exit code tells of it.
    """
    from pathcli.cli import show  # noqa: PLC0415
    from pathcli.cli.batch import PARTIAL  # noqa: PLC0415

    several = len({s.turns for s in samples}) > 1
    rows: list[dict[str, Any]] = []
    found: list[Answer] = []
    for sample, answer in _answered(samples, responder, decoding):
        if isinstance(answer, DataError):
            if len(samples) == 1:
                raise answer
            show.error(str(answer))
            rows.append(_asked(sample) | {"error": str(answer)})
            continue
        found.append(answer)
        if json:
            rows.append(_row(sample, answer))
            continue
        asked = f"{sample.turns[-1]} " if several else ""
        where = f"{', '.join(map(str, sample.images))}: " if len(samples) > 1 else ""
        said = f"no answer: {answer.text}" if answer.abstained else answer.text
        show.answer(f"{where}{asked}{said}{sure(answer.confidence)}")
    if json:
        show.as_json(rows[0] if len(rows) == 1 else rows)
    else:
        _tell(found, responder)
    if len(found) < len(samples):
        show.say(f"{len(samples) - len(found)} of {len(samples)} questions could not be asked")
        raise typer.Exit(PARTIAL if found else DataError.exit_code)


def _answered(
    samples: Sequence[Sample], responder: Responder, decoding: Decoding
) -> Iterator[tuple[Sample, Answer | DataError]]:
    """Yield every sample with its answer, or with why it could not be asked."""
    from pathcli.vlm.ask import AT_ONCE, answers  # noqa: PLC0415

    def tried(part: Sequence[Sample]) -> list[Answer | DataError]:
        try:
            return [*answers(part, responder, decoding)]
        except DataError as error:
            half = len(part) // 2
            return [*tried(part[:half]), *tried(part[half:])] if half else [error]

    for start in range(0, len(samples), AT_ONCE):
        part = samples[start : start + AT_ONCE]
        yield from zip(part, tried(part), strict=True)


def _tell(found: Sequence[Answer], responder: Responder) -> None:
    """Print what the answers are worth: what is unfamiliar, who calibrated them, the scope."""
    from pathcli.cli import show  # noqa: PLC0415
    from pathcli.types import NOTICE  # noqa: PLC0415

    strange = sorted({name for a in found if a.abstained for name in a.evidence})
    if strange:
        show.say(f"unfamiliar: {', '.join(strange)}")
    given = [a for a in found if not a.abstained]
    if given and responder.temperature is None:
        show.say("confidence: uncalibrated; nobody measured how often it is right, loaded so")
    elif free := sum(a.confidence is None for a in given):
        show.say(f"confidence: uncalibrated for answers in free words ({free} of {len(found)})")
    show.say(f"scope: {responder.scope}. {NOTICE}")


def sure(confidence: float | None) -> str:
    """Return how sure a model is, in brackets, where somebody calibrated it; never as certain."""
    if confidence is None:
        return ""
    shown = f"{confidence:.2f}"
    return f" (confidence {'> 0.99' if shown == '1.00' else shown})"

"""Images and a question in, an answer out, with what it is worth beside it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pathcli.data.images import image_name, read_image
from pathcli.device import pick_device
from pathcli.encoders.imageset import centre_square
from pathcli.encoders.mini_clip import MiniClip
from pathcli.errors import UsageError
from pathcli.slides.discovery import SLIDE_SUFFIXES
from pathcli.types import Answer, Sample
from pathcli.vlm.responder import Responder

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

SCOPE = (
    "clover-mini was trained on patches of benign lung, lung adenocarcinoma and lung squamous "
    "cell carcinoma of one data set, and on a few of colon; it can say which tissue it is and "
    "whether it is malignant, in most wordings, and little else"
)
SLIDES = SLIDE_SUFFIXES - {".tif", ".tiff"}  # which patches have, too
UNKNOWN = "outside what this model was trained on"


def ask(
    images: Sequence[str | Path],
    question: str,
    *,
    run: Path | None = None,
    device: str = "auto",
    max_new_tokens: int = 64,
) -> Answer:
    """Return the answer of a vision-language model to a question about images. Research use only.

    The shipped clover-mini abstains where mini-clip finds an image unlike those both were
    trained on; a run of yours always answers. Decoding is greedy, and no confidence is given.

    Args:
        images: files of images; a model may have been trained on one at a time.
        question: in plain words.
        run: a finished run's folder, instead of clover-mini.
        device: auto, cpu, cuda, cuda:1 or mps.
        max_new_tokens: most tokens of the answer.

    Raises:
        UsageError: nothing is asked, or the run is of another task.
        DataError: an image is not there, or cannot be read.
        ResourceError: a run or weights are not here.
    """
    if not images or not question.strip():
        msg = "ask takes an image and a question: pathcli ask img.png 'what tissue?'"
        raise UsageError(msg)
    refs = tuple(str(image) for image in images)
    if slides := [ref for ref in refs if _suffix(ref) in SLIDES]:
        msg = f"{slides[0]} is a slide, and ask reads patches; cut one out, or: pathcli search"
        raise UsageError(msg)
    scope = SCOPE if run is None else f"what {run} was trained on, and nobody has measured here"
    strange = unfamiliar(refs, device) if run is None else ()
    if strange:
        return Answer(UNKNOWN, abstained=True, scope=scope, evidence=strange)
    responder = Responder.of(run, device)
    (text,) = responder([Sample(refs[0], refs, turns=(question,))], max_new_tokens=max_new_tokens)
    return Answer(text, abstained=False, scope=scope, evidence=refs)


def _suffix(ref: str) -> str:
    return ref[ref.rfind(".") :].lower()


def unfamiliar(refs: Sequence[str], device: str = "auto") -> tuple[str, ...]:
    """Return which images look like nothing that mini-clip was trained on.

    Raises:
        DataError: an image cannot be read.
    """
    import numpy as np  # noqa: PLC0415
    import torch  # noqa: PLC0415

    judge = MiniClip()
    squares = [centre_square(read_image(ref), judge.input_px) for ref in refs]
    here = pick_device(device)
    judge.load(here)
    pixels: Any = torch.from_numpy(np.stack(squares)).to(here)
    known = judge.familiar(judge.encode(pixels)).tolist()
    return tuple(image_name(ref) for ref, is_known in zip(refs, known, strict=True) if not is_known)

"""Who says that an image is no pathology, or that a text is not about humans.

Cheap: the rule of colours, an encoder that compares images with texts, a lexicon. Dear: a
vision-language model and a language model, each asked for yes or no. Their words are data,
assets/curation/pathology.yaml and species.yaml.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from pathcli.curation.clean_rows import read_picture
from pathcli.curation.species import read_lexicon
from pathcli.encoders.imageset import centre_square
from pathcli.encoders.zeroshot import class_probabilities, class_weights
from pathcli.errors import DataError
from pathcli.llm_messages import CUT, Message, Picture, json_in, object_schema
from pathcli.types import digest
from pathcli.vlm.asked import YES_NO, matched
from pathcli.weights import asset
from pathcli.yaml12 import read_mapping

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from numpy.typing import NDArray

    from pathcli.curation.models import Model
    from pathcli.curation.species import Lexicon
    from pathcli.llm_messages import Reply
    from pathcli.types import ByteArray, ImageRef, ImageTextEncoder

SAID = 16
"""Most tokens of a verdict."""
_SCHEMA = object_schema({"answer": {"type": "string", "enum": [*YES_NO]}})
_BRIGHT = 150  # of 255: no light of a lamp below it


@dataclass(frozen=True)
class Verdict:
    """Whether something is out, None where nobody could tell, and why."""

    out: bool | None
    why: str = ""


class TextJudge(Protocol):
    """Says of captions whether they speak of what is not human."""

    @property
    def name(self) -> str:
        """As it is shown."""
        ...

    @property
    def facts(self) -> Mapping[str, Any]:
        """Everything that decides its verdicts, as JSON values."""
        ...

    def __call__(self, captions: Sequence[str]) -> list[Verdict]:
        """Return a verdict for each caption, out if it is not about humans."""
        ...


class ImageJudge(Protocol):
    """Says of images whether they are pathology."""

    @property
    def name(self) -> str:
        """As it is shown."""
        ...

    @property
    def facts(self) -> Mapping[str, Any]:
        """Everything that decides its verdicts, as JSON values."""
        ...

    def __call__(self, refs: Sequence[ImageRef], pixels: Sequence[ByteArray]) -> list[Verdict]:
        """Return a verdict for each image, uint8 RGB [h, w, 3], out if it is no pathology."""
        ...


@cache
def words() -> dict[str, Any]:
    """Return assets/curation/pathology.yaml."""
    return read_mapping(asset("curation/pathology.yaml"), "it needs rule, kinds and questions")


# --- cheap -------------------------------------------------------------------------------


@dataclass(frozen=True)
class ByLexicon:
    """A caption is out that names an animal or a plant."""

    lexicon: Lexicon = field(default_factory=read_lexicon)
    name: str = "lexicon"

    @property
    def facts(self) -> dict[str, Any]:
        """Return which words it knows."""
        return {"lexicon": self.lexicon.digest}

    def __call__(self, captions: Sequence[str]) -> list[Verdict]:
        """See `TextJudge`; why is the name."""
        found = map(self.lexicon.found, captions)
        return [Verdict(bool(name), name) for name in found]


@dataclass(frozen=True)
class ByColour:
    """An image is out that has not the colours of haematoxylin and eosin in bright light."""

    name: str = "rule"
    facts: Mapping[str, Any] = field(default_factory=lambda: words()["rule"])

    def __call__(self, refs: Sequence[ImageRef], pixels: Sequence[ByteArray]) -> list[Verdict]:
        """See `ImageJudge`; why is the share that was too large or too small."""
        del refs
        return [self._one(image) for image in pixels]

    def _one(self, image: ByteArray) -> Verdict:
        rule = self.facts
        dark, flat, pink, of = colours(image, rule["side"], rule["coloured"], rule["black"])
        if dark > rule["dark"]:
            return Verdict(out=True, why=f"{dark:.0%} is dark")
        if flat > rule["flat"]:
            return Verdict(out=True, why=f"{flat:.0%} is flat, as in a drawing")
        if pink < rule["pink"] or of < rule["of_coloured"]:
            return Verdict(
                out=True, why=f"{pink:.0%} is pink or purple, {of:.0%} of what is coloured"
            )
        return Verdict(out=False)


def colours(
    image: ByteArray, side: int, coloured: int, black: int
) -> tuple[float, float, float, float]:
    """Return the shares of an image that are dark, flat, pink, and pink of what is coloured."""
    import cv2  # noqa: PLC0415 - only where there are images

    small = np.asarray(cv2.resize(image, (side, side), interpolation=cv2.INTER_AREA), np.uint8)
    steps = cv2.split(cv2.absdiff(small[:, 1:], small[:, :-1]))
    flat = np.maximum.reduce(steps) <= 1
    red, green, blue = planes = cv2.split(_on_white(small))
    most = np.maximum.reduce(planes)
    has_colour = most - np.minimum.reduce(planes) > coloured
    pink = has_colour & (green < red) & (green < blue)
    of = float(pink.sum() / max(int(has_colour.sum()), 1))
    return float((most < black).mean()), float(flat.mean()), float(pink.mean()), of


def _on_white(image: ByteArray) -> NDArray[np.float32]:
    """Return an image as if its brightest 5 % were white, where they are bright: tinted glass."""
    light = np.percentile(image[::3, ::3], 95, axis=(0, 1)).astype(np.float32)
    return image * (255 / light if light.min() >= _BRIGHT else np.float32(1))


class ByEncoder:
    """An image is out that an encoder finds nearer to the texts of another kind of image."""

    def __init__(self, encoder: ImageTextEncoder) -> None:
        """Compare the texts once; the encoder is loaded.

        Raises:
            DataError: a text has no direction in its space.
        """
        kinds = words()["kinds"]
        self.name, self._encoder = encoder.name, encoder
        self._kept = set(kinds["keep"])
        self._kinds = [*kinds["keep"], *kinds["drop"]]
        texts = [(kinds["keep"] | kinds["drop"])[kind] for kind in self._kinds]
        self._weights = class_weights(encoder, texts)
        self.facts = {"encoder": encoder.id, "texts": digest(kinds)}

    def __call__(self, refs: Sequence[ImageRef], pixels: Sequence[ByteArray]) -> list[Verdict]:
        """See `ImageJudge`; why is the kind it is taken for."""
        import torch  # noqa: PLC0415

        del refs
        side = self._encoder.input_px
        images = torch.from_numpy(np.stack([centre_square(image, side) for image in pixels]))
        with torch.inference_mode():
            features = self._encoder.encode(images).cpu().numpy().astype(np.float16)
        found = class_probabilities(features, self._weights, self._encoder.logit_scale)
        best = found.argmax(1)
        told = ((self._kinds[k], float(row[k])) for k, row in zip(best, found, strict=True))
        return [
            Verdict(out=False)
            if kind in self._kept
            else Verdict(out=True, why=f"{kind} ({share:.2f})")
            for kind, share in told
        ]


# --- dear --------------------------------------------------------------------------------


class _Asked:
    """Asks a model for yes or no, `out` being the word for what is to go."""

    def __init__(self, model: Model, question: str, out: str) -> None:
        """Take a model, which keeps its answers itself."""
        self.name, self._model, self.question, self._out = model.name, model, question, out
        known = {"digest": model.digest} if hasattr(model, "digest") else {}
        self.facts = {"model": model.name, **known, "asked": question}

    def _verdicts(self, talks: Iterable[list[Message]]) -> list[Verdict]:
        given: dict[str, Any] = {"schema": _SCHEMA} if self._model.takes_schema else {}
        replies = self._model.ask_all(talks, max_tokens=SAID, **given)
        return [self._verdict(reply) for reply in replies]

    def _verdict(self, reply: Reply) -> Verdict:
        """Return what a reply says; without yes or no it is no verdict, cut off or not."""
        text = reply.text
        with suppress(DataError, TypeError, KeyError):
            text = str(json_in(text)["answer"])
        said = None if reply.fault and not reply.fault.startswith(CUT) else matched(text, YES_NO)
        if said is None and reply.fault:
            return Verdict(None, reply.fault)
        return Verdict(
            None if said is None else said == self._out, f"says: {' '.join(text.split())[:80]}"
        )


class ByVision(_Asked):
    """An image is out that a vision-language model says is no pathology image."""

    def __init__(self, model: Model) -> None:
        """Take a model that sees, and keeps its answers itself."""
        super().__init__(model, str(words()["questions"]["image"]), out="no")

    def __call__(self, refs: Sequence[ImageRef], pixels: Sequence[ByteArray]) -> list[Verdict]:
        """See `ImageJudge`; what is neither yes nor no is no verdict."""
        del pixels
        return self._verdicts([Message("user", (_picture(ref), self.question))] for ref in refs)


class ByLanguage(_Asked):
    """A caption is out that a language model says is not about humans."""

    def __init__(self, model: Model) -> None:
        """Take a model, which keeps its answers itself."""
        super().__init__(model, str(words()["questions"]["text"]), out="yes")

    def __call__(self, captions: Sequence[str]) -> list[Verdict]:
        """See `TextJudge`; a fault, or what is neither yes nor no, is no verdict."""
        asked = (self.question.format(caption=text) for text in captions)
        return self._verdicts([Message("user", (text,))] for text in asked)


def _picture(ref: ImageRef) -> Picture:
    """Return an image as it is shown to a model: its short side at most `SHOWN_PX`."""
    return Picture.of(read_picture(ref, looked=False).pixels)

"""Who says that an image is no pathology, or that a text is not about humans.

Cheap: the rule of colours, an encoder that compares images with texts, a lexicon. Dear: a
vision-language model and a language model, each asked for yes or no. Their words are data,
assets/curation/pathology.yaml and species.yaml.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from pathcli.curation.species import read_lexicon
from pathcli.encoders.imageset import centre_square, image_digest
from pathcli.encoders.zeroshot import class_probabilities, class_weights
from pathcli.llm import Message
from pathcli.store.responses import response_key
from pathcli.types import Sample, digest
from pathcli.vlm.asked import YES_NO, matched
from pathcli.weights import asset
from pathcli.yaml12 import read_mapping

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from pathcli.curation.models import Model
    from pathcli.curation.species import Lexicon
    from pathcli.store.responses import Responses
    from pathcli.types import ByteArray, ImageRef, ImageTextEncoder
    from pathcli.vlm.responders import Responder

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


class ByVision:
    """An image is out that a vision-language model says is no pathology image."""

    def __init__(self, responder: Responder, kept: Responses | None = None) -> None:
        """Take a model; answers are looked for and kept in `kept`."""
        self.question = str(words()["questions"]["image"])
        self.name, self._responder, self._kept = responder.name, responder, kept
        self._told = [responder.digest, self.question, str(responder.decoding.options())]
        self.facts = {"model": responder.name, "digest": responder.digest, "asked": self.question}

    def __call__(self, refs: Sequence[ImageRef], pixels: Sequence[ByteArray]) -> list[Verdict]:
        """See `ImageJudge`; what is neither yes nor no is no verdict."""
        del pixels
        keys = [response_key(*self._told, image_digest(ref) or "") for ref in refs]
        said = {key: self._kept.get(key) if self._kept else None for key in keys}
        new: dict[str, ImageRef] = {}
        for key, ref in zip(keys, refs, strict=True):
            if said[key] is None:
                new.setdefault(key, ref)
        asked = [Sample("", (ref,), turns=(self.question,)) for ref in new.values()]
        for start in range(0, len(asked), self._responder.batch):
            batch = asked[start : start + self._responder.batch]
            some = list(new)[start : start + len(batch)]
            for key, text in zip(some, self._responder.answer(batch), strict=True):
                said[key] = text
                if self._kept:
                    self._kept.put(key, text, model=self.name)
        return [_verdict(said[key] or "", out="no") for key in keys]


class ByLanguage:
    """A caption is out that a language model says is not about humans."""

    def __init__(self, model: Model) -> None:
        """Take a model, which keeps its answers itself."""
        self.question = str(words()["questions"]["text"])
        self.name, self._model = model.name, model
        self.facts = {"model": model.name, "asked": self.question}

    def __call__(self, captions: Sequence[str]) -> list[Verdict]:
        """See `TextJudge`; a fault, or what is neither yes nor no, is no verdict."""
        talks = ([Message("user", (self.question.format(caption=text),))] for text in captions)
        replies = self._model.ask_all(talks, max_tokens=16)
        return [
            Verdict(None, reply.fault) if reply.fault else _verdict(reply.text, out="yes")
            for reply in replies
        ]


def _verdict(text: str, *, out: str) -> Verdict:
    said = matched(text, YES_NO)
    short = " ".join(text.split())[:80]
    return Verdict(None if said is None else said == out, f"says: {short}")

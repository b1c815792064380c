"""What answers questions about images, and the one place where a name becomes such a model.

clover-mini          the model that is shipped
FOLDER               a run of yours, or a converted checkpoint (`pathcli models convert`)
hf:ID, or its folder any image-text-to-text model of transformers
http://HOST/v1#NAME  a model behind an OpenAI-compatible endpoint (vLLM, Ollama)
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast, get_args

from pathcli.errors import ResourceError, UsageError
from pathcli.registry import did_you_mean

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from pathcli.endpoints import Budget
    from pathcli.store.responses import Responses
    from pathcli.types import ImageRef, Sample

SHIPPED = "clover-mini"
BUDGET = 16
"""Tiles of a slide that are read, at most."""
Load = Literal["auto", "float32", "bfloat16", "float16", "8bit", "4bit"]


@dataclass(frozen=True)
class Decoding:
    """How answers are searched for: greedy with one beam, else the likeliest of several."""

    max_new_tokens: int = 64
    min_new_tokens: int = 0
    beams: int = 1
    length_penalty: float = 1.0

    def options(self) -> dict[str, Any]:
        """Return these as keyword arguments."""
        return asdict(self)


class Unfinished(str):
    """An answer that the limit of tokens ended."""

    __slots__ = ()


class Responder(Protocol):
    """A vision-language model that answers. Research use only; not for diagnosis.

    Attributes:
        name: as it is shown.
        scope: what it was trained on, in words to stand beside an answer.
        decoding: its own published settings.
        batch: questions answered at a time.
        temperature: what log-probabilities of allowed answers are divided by before they are
            called a confidence, fitted on validation data; None where nobody fitted it.
        taught: sets of short answers that exclude one another, where it was taught any.
    """

    name: str
    scope: str
    decoding: Decoding
    batch: int
    temperature: float | None
    taught: Sequence[Sequence[str]]

    @property
    def digest(self) -> str:
        """SHA-256 of the weights, of how words are put to them, and of how images are prepared.

        Answers are kept under it.
        """
        ...

    def prompt(self, sample: Sample) -> str:
        """Return what the model is given to read, `<image>` where images stand."""
        ...

    def unfamiliar(self, images: Sequence[ImageRef]) -> list[ImageRef]:
        """Return which images are unlike those it was trained on: none, if it cannot tell.

        Raises:
            DataError: an image cannot be read.
        """
        ...

    def answer(self, samples: Sequence[Sample], decoding: Decoding | None = None) -> Iterator[str]:
        """Yield the answer to each sample's last question, in order.

        `turns` are question, answer, question...; a sample's own `answer` is never read. An
        answer that the limit of tokens ended is an `Unfinished`, where a model can tell.
        An image that was seen before is not encoded again.

        Raises:
            DataError: an image cannot be read.
        """
        ...

    def likelihoods(
        self, samples: Sequence[Sample], options: Sequence[Sequence[str]]
    ) -> list[NDArray[np.float64]] | None:
        """Return for each sample the log-probability of each of its options as the answer.

        The sum over the option's tokens and the end of the answer, float64 [options]; None
        where a model does not say.

        Raises:
            DataError: an image cannot be read.
        """
        ...


class Untaught:
    """What is true of models that others trained: nobody taught them here, or calibrated them."""

    temperature: float | None = None
    taught: Sequence[Sequence[str]] = ()

    def unfamiliar(self, images: Sequence[ImageRef]) -> list[ImageRef]:
        """Return none: it cannot tell."""
        del images
        return []


def open_responder(
    model: str = SHIPPED,
    *,
    device: str = "auto",
    load: str = "auto",
    kept: Responses | None = None,
    budget: Budget | None = None,
) -> Responder:
    """Return the model of a name (see above).

    Args:
        model: a name, a folder, hf:ID, or an endpoint's address.
        device: auto, cpu, cuda, cuda:1 or mps; of endpoints nothing.
        load: the language model's numbers; auto takes what a recipe or checkpoint says.
        kept: where an endpoint's replies are looked for and kept; others need none.
        budget: what may be spent at an endpoint.

    Raises:
        UsageError: the name says nothing, the folder holds no such model, or no such `load`.
        ResourceError: weights are not here.
    """
    if load not in get_args(Load):
        msg = f"load: {did_you_mean(load, list(get_args(Load)))}"
        raise UsageError(msg)
    numbers = cast("Load", load)
    if model.startswith(("http://", "https://")):
        from pathcli.vlm.endpoint import EndpointResponder  # noqa: PLC0415

        return EndpointResponder(model, kept=kept, budget=budget)
    folder = Path(model)
    if folder.is_file() or '"mm_vision_tower"' in _config(folder):  # LAVIS', xtuner's; LLaVA's
        msg = f"{model} is in its authors' layout; run: pathcli models convert {model} OUT"
        raise UsageError(msg)
    if model.startswith("hf:") or (folder / "config.json").is_file():
        from pathcli.vlm.hf import HFResponder  # noqa: PLC0415

        return HFResponder(model.removeprefix("hf:"), device=device, load=numbers)
    from pathcli.vlm.own import RunResponder  # noqa: PLC0415

    if model == SHIPPED:
        return RunResponder.shipped(device=device, load=numbers)
    if folder.is_dir():
        return RunResponder.of(folder, device=device, load=numbers)
    if "/" in model or model.startswith("."):
        msg = f"{model} is not here; name a run's folder, {SHIPPED}, hf:ID, or an endpoint"
        raise ResourceError(msg)
    msg = f"no model is called {model!r}: {SHIPPED}, a folder, hf:ID, or http://HOST/v1#NAME"
    raise UsageError(msg)


def _config(folder: Path) -> str:
    path = folder / "config.json"
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""

"""The nouns and protocols every module shares (standard library only).

Units stand in the name or in the docstring: `px` are pixels of the tile, `mpp` are
micrometres per pixel, `xy` are level-0 pixels of the slide (x first).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING, Any, Protocol

from pathcli.errors import UsageError

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    import torch
    from numpy.typing import NDArray

    IntArray = NDArray[np.int32]
    ByteArray = NDArray[np.uint8]
    HalfArray = NDArray[np.float16]

NOTICE = "Research use only; not for diagnosis."

Progress = Callable[[int, int], None]
"""Called with (done, total) while a long call runs."""


def silent(done: int, total: int) -> None:
    """Tell nobody: the `Progress` of a call that was given none."""
    del done, total


# --- parameters and keys -----------------------------------------------------------------


def digest(value: Any) -> str:  # noqa: ANN401 - any JSON-able value
    """Return 12 hex digits of SHA-256 over the canonical JSON of `value`."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


@dataclass(frozen=True)
class TileSpec:
    """Everything that decides which pixels are seen, and nothing else.

    A tile covers `size_px * mpp` micrometres a side and neighbours start `step_px * mpp`
    apart, whatever the slide's own resolution. `grid` is the version of the rule that turns
    these numbers into pixels (corner rounding, level choice, resampling).
    """

    size_px: int = 224
    mpp: float = 0.5
    step_px: int = 224
    tissue: str = "otsu"
    tissue_params: Mapping[str, float] = field(default_factory=dict)
    tissue_version: int = 1
    min_tissue: float = 0.5
    roi: str | None = None
    drop: tuple[str, ...] = ()
    grid: int = 1

    def __post_init__(self) -> None:
        """Refuse what cannot be tiled.

        Raises:
            UsageError: a size, step or mpp that is not positive, or a share outside 0..1.
        """
        wrong = []
        if self.size_px < 1 or self.step_px < 1:
            wrong += [f"tile size and step are at least 1 px, not {self.size_px}, {self.step_px}"]
        low, high = MPP_RANGE
        if not low <= self.mpp <= high:
            wrong += [f"--mpp {self.mpp:g} is outside {low:g}-{high:g} um per pixel"]
        if not 0 <= self.min_tissue <= 1:
            wrong += [f"--min-tissue is a share between 0 and 1, got {self.min_tissue:g}"]
        if wrong:
            raise UsageError("; ".join(wrong))

    @property
    def size_um(self) -> float:
        """Side of a tile in micrometres."""
        return self.size_px * self.mpp

    @property
    def digest(self) -> str:
        """Return the 12 hex digits that name this specification in the store."""
        return digest(self.to_json())

    def to_json(self) -> dict[str, Any]:
        """Return the specification as plain JSON values."""
        return asdict(self) | {
            "tissue_params": dict(self.tissue_params),
            "drop": sorted(self.drop),
            "mpp": float(self.mpp),
            "min_tissue": float(self.min_tissue),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> TileSpec:
        """Rebuild a specification from `to_json`."""
        return cls(**{**value, "drop": tuple(value["drop"])})


MPP_RANGE = (0.05, 20.0)
"""Micrometres per pixel a scan can have; anything outside is a broken header."""


WHOLE = TileSpec(size_px=1, mpp=1.0, step_px=1, tissue="whole", min_tissue=0.0)
"""Stands for plain images, which are not cut: each is used whole, whatever its size."""


@dataclass(frozen=True)
class Key:
    """What an entry of the store is: change any part and it is another entry."""

    item: str
    mpp: float
    tiles: str
    encoder: str | None = None

    @property
    def stem(self) -> str:
        """Return the file's name without suffix: the item and the slide mpp actually used."""
        return f"{self.item}@{self.mpp:.6g}"


# --- values ------------------------------------------------------------------------------


class TileStatus(IntEnum):
    """State of one tile, as stored in `status`."""

    OK = 0
    UNREADABLE = 1


@dataclass(frozen=True)
class SlideInfo:
    """What the store keeps of a slide: nothing that could name a patient.

    `width` and `height` are level-0 pixels, `bounds` is the scanned part of them
    (x, y, width, height), `mpp` is micrometres per level-0 pixel as the header has it.
    """

    item: str
    fingerprint: str
    width: int
    height: int
    mpp: float | None
    vendor: str
    objective: float | None
    bounds: tuple[int, int, int, int]
    reader: str


@dataclass(frozen=True)
class Tiles:
    """Tiles of one slide: `xy` int32 [n, 2] level-0 pixels, `status` uint8 [n].

    Rows are ordered by (y, x). `slide_mpp` is the resolution actually used, `tissue_share`
    the share of the scanned area called tissue, `warnings` what the user should know; `dropped`
    counts the tiles of each flag, `file_bytes` is the file's size then, None where not known.
    """

    item: str
    xy: IntArray = field(repr=False)
    status: ByteArray = field(repr=False)
    spec: TileSpec
    slide_mpp: float
    width: int
    height: int
    tissue_share: float
    warnings: tuple[str, ...] = ()
    dropped: Mapping[str, int] | None = None
    file_bytes: int | None = None

    def __len__(self) -> int:
        """Return the number of tiles."""
        return len(self.xy)

    @property
    def key(self) -> Key:
        """Return the key of these tiles in the store."""
        return Key(self.item, self.slide_mpp, self.spec.digest)

    @property
    def side0(self) -> float:
        """Side of a tile in level-0 pixels, not rounded."""
        return self.spec.size_um / self.slide_mpp


@dataclass(frozen=True)
class Features:
    """Features of one slide: float16 [n, d], or tokens [n, t, d]; rows not `OK` are NaN."""

    key: Key
    values: HalfArray = field(repr=False)
    xy: IntArray = field(repr=False)
    status: ByteArray = field(repr=False)


@dataclass(frozen=True)
class Bag:
    """What a head reads at once: the tiles of one case, of one slide or of several.

    `features` is float16 [n, d] without unreadable rows, `xy` int32 [n, 2] level-0 px, and
    `slide_of` int32 [n] the index in `slides` of the slide a row is from. Rows are ordered
    by slide, then (y, x).
    """

    name: str
    patient: str
    label: int | None
    slides: tuple[str, ...]
    features: HalfArray = field(repr=False)
    xy: IntArray = field(repr=False)
    slide_of: IntArray = field(repr=False)


@dataclass(frozen=True)
class Region:
    """A square of a slide, `side0` level-0 pixels wide, its corner at level-0 `xy`."""

    slide: str
    xy: tuple[int, int]
    side0: int


@dataclass(frozen=True)
class Member:
    """A file inside a tar archive: `size` bytes from byte `offset` on.

    In a Parquet file `offset` is the row, and `name` is `column[row]`.
    """

    archive: str
    offset: int
    size: int
    name: str


ImageRef = str | Region | Member
"""Where the pixels of an image are: a file, a square of a slide, a file inside an archive."""


@dataclass(frozen=True)
class Sample:
    """One example of images and text: a caption, an instruction, a question.

    `turns` are what is said before `answer` (nothing, for a caption); `label` is the class,
    where there is one; `group` is what must not be split (patient, slide, original tile), ""
    where nobody knows it.
    """

    name: str
    images: tuple[ImageRef, ...]
    answer: str = ""
    turns: tuple[str, ...] = ()
    label: str = ""
    group: str = ""


@dataclass(frozen=True)
class Answer:
    """What was said and by what; `confidence` is None where nobody calibrated the `scores`."""

    text: str
    abstained: bool
    scope: str
    evidence: tuple[str, ...] = ()
    confidence: float | None = None
    scores: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class HeadOutput:
    """What a head says of one bag: float logits [c], and attention [n] that sums to one."""

    logits: torch.Tensor
    attention: torch.Tensor


@dataclass(frozen=True)
class Report:
    """What a run has to show: metrics with intervals, rows, and where it all came from.

    `metrics` maps a name to `{"value", "low", "high", "n"}`; `low` and `high` are None for
    plain counts. `rows` are flat dictionaries, `provenance` is any JSON.
    """

    title: str
    metrics: Mapping[str, Mapping[str, float | None]]
    rows: tuple[Mapping[str, Any], ...]
    provenance: Mapping[str, Any]


# --- protocols ---------------------------------------------------------------------------


class Slide(Protocol):
    """A slide that gives pixels; `read` may be called from several threads at once."""

    path: Path | str
    info: SlideInfo
    downsamples: tuple[float, ...]
    why: str  # which reader serves the pixels, and why that one

    def read(self, xy: tuple[int, int], level: int, size: tuple[int, int]) -> ByteArray:
        """Return uint8 RGB [height, width, 3] of `size` (w, h) pixels of `level` at level-0 `xy`.

        Pixels outside the scan are the slide's background.

        Raises:
            DataError: the region cannot be decoded, or the file is gone.
        """
        ...

    def close(self) -> None:
        """Release the file."""
        ...


class Encoder(Protocol):
    """Images in, vectors out. Cheap to build: weights are read by `load`.

    `id` names weights, preprocessing, pooling and precision; `input_px` is the side the network
    sees; `native` is the TileSpec it was trained for, as `native_source` says. One that has
    `reentrant = True` is given batches by several threads at once where that is faster.
    """

    name: str
    input_px: int
    native: TileSpec
    native_source: str

    @property
    def id(self) -> str:
        """Return name and digest; two encoders with one id give equal features."""
        ...

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Shape of one image's features, (d,) or (t, d); known after `load`."""
        ...

    def load(self, device: str) -> None:
        """Read the weights onto `device`.

        Raises:
            ResourceError: the weights are not here and cannot be fetched.
            DataError: the checkpoint is corrupt or of another architecture.
        """
        ...

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Return float32 [b, *row_shape] for uint8 images [b, h, w, 3] (RGB)."""
        ...


class ImageTextEncoder(Encoder, Protocol):
    """An encoder whose images and texts meet in one space, where cosines compare them.

    `text_limit` is how many tokens a text may have, special ones included; `logit_scale`,
    known after `load`, is what cosines are multiplied by before a softmax.
    """

    text_limit: int
    logit_scale: float

    def encode_text(self, texts: Sequence[str]) -> torch.Tensor:
        """Return float32 [n, d], not normalised; what is beyond `text_limit` is cut off."""
        ...

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Return how many tokens each text has before anything is cut off."""
        ...


class Head(Protocol):
    """A bag's features in, the slide's prediction and every tile's attention out.

    Built as `Head(dim_in, classes, *, ...)`: what the data decide comes first, what a recipe
    may set is keyword-only.
    """

    def __call__(self, features: torch.Tensor) -> HeadOutput:
        """Return logits and attention for features float32 [n, d], n of at least 1."""
        ...

    def loss(self, features: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        """Return the training loss, a scalar, for one bag and its label int64 []."""
        ...

"""A path in, a `Slide` out: OpenSlide first, then tiffslide, then plain images.

Nothing but pixels of the scan, its resolution, vendor, objective and dimensions is read
from a file: labels, macro images and header text can name a patient.
"""

from __future__ import annotations

import hashlib
import logging
import math
import threading
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import cv2
import numpy as np

from pathcli.errors import DataError, ResourceError
from pathcli.registry import resolve
from pathcli.slides.dicom import is_ycbcr_named_rgb
from pathcli.slides.direct import DirectReader, UnservedError
from pathcli.store.store import item_name
from pathcli.types import MPP_RANGE, Slide, SlideInfo

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pathcli.types import ByteArray

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp"}
TIFF_SUFFIXES = {".tif", ".tiff", ".btf", ".tf8", ".svs"}
_BLOCKS, _BLOCK_BYTES = 64, 4096
_SQUARE = 0.02  # relative difference of the axes up to which pixels count as square

log = logging.getLogger("pathcli")


def open_slide(path: Path | str, reader: str = "auto") -> Slide:
    """Open a slide with the named reader, or with the first that understands it.

    Over that one the direct reader serves pixels where it can; `why` of the slide says so.

    Raises:
        DataError: it is not there, empty, or no reader understands it.
    """
    if "://" not in str(path):
        path = Path(path)
        _require_content(path)
    if reader != "auto":
        opened: Slide = resolve("reader", reader)(path)
        return opened
    below = _first_to_understand(path)
    try:
        return DirectReader(below)
    except UnservedError as error:
        below.why = f"{below.info.reader}: {error}"
        plain: Slide = below
        return plain


def open_direct(path: Path | str) -> Slide:
    """Open a slide for the direct reader or not at all.

    Raises:
        DataError: no reader understands it, or its file is not tiled as needed.
    """
    below = _first_to_understand(path)
    try:
        return DirectReader(below)
    except UnservedError as error:
        below.close()
        msg = f"{public_name(path)}: cannot be read directly: {error}"
        raise DataError(msg) from error


def _first_to_understand(path: Path | str) -> Any:  # noqa: ANN401 - whichever reader it is
    failures: list[str] = []
    shown = public_name(path)
    for name in _candidates(path, remote="://" in str(path)):
        try:
            return resolve("reader", name)(path)
        except DataError as error:
            failures.append(str(error).removeprefix(f"{shown}: "))
    msg = f"{shown}: not a slide that can be read ({'; '.join(failures)})"
    raise DataError(msg)


def _require_content(path: Path) -> None:
    if not path.exists():
        msg = f"{path}: no such file"
        raise DataError(msg)
    if path.is_file() and path.stat().st_size == 0:
        msg = f"{path}: empty file (0 bytes)"
        raise DataError(msg)


def _candidates(path: Path | str, *, remote: bool) -> list[str]:
    name = str(path).lower()
    suffix = Path(name).suffix
    if remote or name.endswith((".ome.tif", ".ome.tiff")):
        return ["tiffslide"]
    if suffix in IMAGE_SUFFIXES:
        return ["image"]
    if suffix in TIFF_SUFFIXES:
        return ["openslide", "tiffslide", "image"]
    return ["openslide"]


def _number(properties: Mapping[str, Any], name: str) -> float | None:
    try:
        value = float(properties[name])
    except (KeyError, TypeError, ValueError):
        return None
    return value if math.isfinite(value) and value > 0 else None


def _mpp(path: Path | str, properties: Mapping[str, Any], prefix: str) -> float | None:
    """Return the header's resolution as the mean of both axes; None if they differ, or none is."""
    x, y = (_number(properties, f"{prefix}.mpp-{axis}") for axis in "xy")
    if not x or not y:
        return None
    if abs(x - y) > _SQUARE * max(x, y):
        log.warning("%s: the header's pixels are not square (%g x %g um), ignored", path, x, y)
        return None
    return (x + y) / 2


def public_name(path: Path | str) -> str:
    """Return a path as it may be shown and stored: an address without user, token or query.

    >>> public_name("https://me:pw@host/a.tiff?sig=secret")
    'https://host/a.tiff'
    """
    text = str(path)
    if "://" not in text:
        return text
    parts = urlsplit(text)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def sampled_fingerprint(path: Path | str) -> str:
    """Return the digest of a file's size and 64 blocks spread over it, as hex."""
    from fsspec.core import url_to_fs  # noqa: PLC0415

    files, place = url_to_fs(str(path))
    size = int(files.size(place))
    state = hashlib.sha256(str(size).encode())
    for i in range(_BLOCKS):
        start = max(0, size - _BLOCK_BYTES) * i // (_BLOCKS - 1)
        state.update(files.cat_file(place, start=start, end=min(size, start + _BLOCK_BYTES)))
    return state.hexdigest()


def _stem(path: Path | str, vendor: str) -> str:
    """Return the readable name of a slide; a DICOM slide is named after its folder."""
    name = Path(str(path)).resolve().parent.name if vendor == "dicom" else Path(str(path)).name
    for ending in (".ome.tif", ".ome.tiff"):
        if name.lower().endswith(ending):
            return name[: -len(ending)]
    return name if vendor == "dicom" else Path(name).stem


def slide_info(
    path: Path | str,
    fingerprint: str,
    vendor: str,
    reader: str,
    **known: Any,  # noqa: ANN401 - the other fields, checked by SlideInfo
) -> SlideInfo:
    """Return what is known of a slide, its name in the store made of file name and content."""
    item = item_name(_stem(path, vendor), fingerprint)
    return SlideInfo(item=item, fingerprint=fingerprint, vendor=vendor, reader=reader, **known)


class OpenSlideReader:
    """SVS, NDPI, MRXS, DICOM, SCN, BIF, VMS, ZVI, Philips, Ventana and generic tiled TIFF."""

    why = "openslide: as asked"

    def __init__(self, path: Path | str) -> None:
        """Open `path`.

        Raises:
            DataError: OpenSlide does not understand it.
        """
        import openslide  # noqa: PLC0415

        self.path = path
        self._openslide = openslide
        self._lock = threading.Lock()
        self._handle = self._open()
        handle = self._handle
        properties = handle.properties
        width, height = handle.dimensions
        vendor = properties.get(openslide.PROPERTY_NAME_VENDOR, "unknown")
        quick = properties.get(openslide.PROPERTY_NAME_QUICKHASH1)
        box = [_bound(properties, name) for name in ("x", "y", "width", "height")]
        self.downsamples = tuple(handle.level_downsamples)
        self.dimensions = tuple(handle.level_dimensions)
        self.info = slide_info(
            path,
            quick or sampled_fingerprint(path),
            vendor,
            "openslide",
            width=width,
            height=height,
            mpp=_mpp(path, properties, "openslide"),
            objective=_number(properties, openslide.PROPERTY_NAME_OBJECTIVE_POWER),
            bounds=(box[0] or 0, box[1] or 0, box[2] or width, box[3] or height),
        )
        colour = properties.get(openslide.PROPERTY_NAME_BACKGROUND_COLOR, "FFFFFF")
        self._background = np.array(list(bytes.fromhex(colour)), np.float32)
        self._ycbcr = vendor == "dicom" and is_ycbcr_named_rgb(path)

    def _open(self) -> Any:  # noqa: ANN401 - openslide is untyped
        try:
            return self._openslide.OpenSlide(str(self.path))
        except self._openslide.OpenSlideError as error:
            msg = f"{self.path}: OpenSlide: {error}"
            raise DataError(msg) from error

    def read(self, xy: tuple[int, int], level: int, size: tuple[int, int]) -> ByteArray:
        """Return uint8 RGB [h, w, 3]; see `Slide.read`. A handle that failed is reopened once."""
        handle = self._handle
        try:
            rgba = np.asarray(handle.read_region(xy, level, size))
        except self._openslide.OpenSlideError:
            rgba = np.asarray(self._retry(handle, xy, level, size))
        rgb, alpha = rgba[..., :3], rgba[..., 3:]
        if self._ycbcr:
            rgb = cv2.cvtColor(np.ascontiguousarray(rgb[..., [0, 2, 1]]), cv2.COLOR_YCrCb2RGB)
        rgb = np.array(rgb, np.uint8)
        clear = alpha[..., 0] < 255  # noqa: PLR2004 - outside the scan, or at its edge
        if clear.any():
            part = alpha[clear] / np.float32(255)
            rgb[clear] = np.rint(rgb[clear] * part + self._background * (1 - part))
        return rgb

    def _retry(self, failed: Any, xy: tuple[int, int], level: int, size: tuple[int, int]) -> Any:  # noqa: ANN401
        """Read through a handle of its own: one error makes a handle useless for everyone.

        The shared handle is renewed too, but another thread's bad region may spoil it again
        before this one reads.
        """
        if not Path(self.path).exists():
            msg = f"{self.path}: the file is gone"
            raise DataError(msg)
        with self._lock:
            if self._handle is failed:
                self._handle = self._open()
        own = self._open()
        try:
            return own.read_region(xy, level, size)
        except self._openslide.OpenSlideError as error:
            msg = f"{self.path}: region {xy} of level {level} cannot be decoded ({error})"
            raise DataError(msg) from error
        finally:
            own.close()

    def close(self) -> None:
        """Release the file."""
        self._handle.close()


def _bound(properties: Mapping[str, Any], name: str) -> int | None:
    value = _number(properties, f"openslide.bounds-{name}")
    return None if value is None else int(value)


class TiffSlideReader:
    """OME-TIFF, TIFF that OpenSlide refuses, and remote TIFF (any fsspec address)."""

    why = "tiffslide: as asked"

    def __init__(self, path: Path | str) -> None:
        """Open `path`, a local path or an address such as https:// or s3://.

        Raises:
            DataError: it is not an RGB TIFF.
        """
        import tiffslide  # noqa: PLC0415

        self.path = path if isinstance(path, Path) else public_name(path)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                handle = tiffslide.TiffSlide(str(path))
                width, height = handle.dimensions
                probe = handle.read_region((0, 0), 0, (1, 1), as_array=True)
        except ImportError as error:
            msg = f"{self.path}: remote slides need: pip install 'pathcli[remote]' ({error.name})"
            raise ResourceError(msg) from error
        except Exception as error:  # tifffile raises what the bytes provoke
            remote = str(path) != str(self.path)  # its messages quote the address, secrets too
            why = type(error).__name__ if remote else _why_no_tiff(error)
            msg = f"{self.path}: tiffslide: {why}"
            raise DataError(msg) from error
        if probe.shape != (1, 1, 3) or probe.dtype != np.uint8:
            handle.close()
            pixel = f"{probe.dtype} {probe.shape[2:]}"
            msg = f"{self.path}: tiffslide: not 8-bit RGB (a pixel is {pixel})"
            raise DataError(msg)
        self._handle = handle
        self.downsamples = tuple(float(d) for d in handle.level_downsamples)
        self.dimensions = tuple((int(w), int(h)) for w, h in handle.level_dimensions)
        self.info = slide_info(
            self.path,
            sampled_fingerprint(path),
            str(handle.properties.get("tiffslide.vendor") or "tiff"),
            "tiffslide",
            width=int(width),
            height=int(height),
            mpp=_mpp(self.path, handle.properties, "tiffslide"),
            objective=_number(handle.properties, "tiffslide.objective-power"),
            bounds=(0, 0, int(width), int(height)),
        )

    def read(self, xy: tuple[int, int], level: int, size: tuple[int, int]) -> ByteArray:
        """Return uint8 RGB [h, w, 3]; see `Slide.read`."""
        try:
            region = self._handle.read_region(xy, level, size, as_array=True)
        except Exception as error:  # codecs raise what the bytes provoke
            msg = f"{self.path}: region {xy} of level {level} cannot be decoded ({one_line(error)})"
            raise DataError(msg) from error
        return np.ascontiguousarray(region)

    def close(self) -> None:
        """Release the file."""
        self._handle.close()


def _why_no_tiff(error: Exception) -> str:
    """Return tifffile's own verdict; anything else it raises means that bytes are missing."""
    if type(error).__name__ == "TiffFileError":
        return "not a TIFF file"
    return f"truncated or damaged TIFF ({type(error).__name__})"


def one_line(error: Exception) -> str:
    """Return the type and first words of a foreign error; never its bulk."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:80]}" if lines else type(error).__name__


def slide_mpp(slide: Slide, given: float | None = None) -> float:
    """Return micrometres per level-0 pixel: the given value, else the header's.

    Rounded to six digits, the precision of the store's keys.

    Raises:
        DataError: there is none, or it is outside what a scan can have.
    """
    value = given if given is not None else slide.info.mpp
    name = str(slide.path)
    if value is None:
        msg = f"{name}: the file does not say its resolution; give it, e.g. --slide-mpp 0.25"
        raise DataError(msg)
    if not MPP_RANGE[0] <= value <= MPP_RANGE[1]:
        source = "given" if given is not None else "in its header"
        msg = (
            f"{name}: the resolution {source} is {value:.4g} um per pixel, outside "
            f"{MPP_RANGE[0]:g}-{MPP_RANGE[1]:g}; give the right one, e.g. --slide-mpp 0.25"
        )
        raise DataError(msg)
    return float(f"{value:.6g}")

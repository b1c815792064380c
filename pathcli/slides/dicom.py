"""DICOM headers in, two facts out: a file's series, and whether its colours are named right.

Nothing else of a header is read or shown: it names the patient.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

_JPEG_BASELINE = "1.2.840.10008.1.2.4.50"
_HEAD_BYTES = 65536
_ITEM, _EXPLICIT_LONG = 8, 12  # bytes of an item's and of an explicit-VR element's header
_TAGS = ["SeriesInstanceUID", "ImageType", "TotalPixelMatrixColumns", "PhotometricInterpretation"]


def _header(path: Path) -> tuple[Any, bytes]:
    """Return the few header elements used here and the first bytes of the pixel data.

    Empty for what is not DICOM; pydicom's own message, which quotes the header, is dropped.
    """
    from pydicom import dcmread  # noqa: PLC0415

    try:
        with path.open("rb") as file:
            header = dcmread(file, stop_before_pixels=True, specific_tags=_TAGS)
            return header, file.read(_HEAD_BYTES)
    except Exception:  # noqa: BLE001 - pydicom raises whatever the bytes provoke
        return {}, b""


def series_uid(path: Path) -> str | None:
    """Return a DICOM file's SeriesInstanceUID, or None."""
    header, _ = _header(path)
    uid = header.get("SeriesInstanceUID")
    return str(uid) if uid else None


def is_ycbcr_named_rgb(path: Path | str) -> bool:
    """Tell whether the series of a file says RGB while its frames hold YCbCr.

    wsi2dcm and others write such files; OpenSlide believes the header and shows them pink.
    A frame that carries a JFIF marker, or whose chroma is subsampled, is YCbCr. The largest
    volume image decides, whichever file of the series was named.
    """
    largest, found = -1, False
    uid = series_uid(Path(path))
    for other in sorted(Path(path).parent.iterdir()):
        if other.suffix.lower() != Path(path).suffix.lower():
            continue
        header, head = _header(other)
        columns = int(header.get("TotalPixelMatrixColumns") or 0)
        volume = "VOLUME" in (header.get("ImageType") or ())
        if volume and columns > largest and header.get("SeriesInstanceUID") == uid:
            syntax = header.file_meta.get("TransferSyntaxUID")
            named = header.get("PhotometricInterpretation") == "RGB" and syntax == _JPEG_BASELINE
            largest, found = columns, named and _frame_is_ycbcr(head[_EXPLICIT_LONG:])
    return found


def _frame_is_ycbcr(items: bytes) -> bool:
    """Look at the first frame behind the offset table of encapsulated pixel data."""
    table = int.from_bytes(items[4:_ITEM], "little")
    jpeg = items[2 * _ITEM + table :]
    if jpeg[:2] != b"\xff\xd8":
        return False
    at = 2
    while at + 4 <= len(jpeg) and jpeg[at] == 0xFF:  # noqa: PLR2004 - every marker's first byte
        marker, length = jpeg[at + 1], int.from_bytes(jpeg[at + 2 : at + 4], "big")
        body = jpeg[at + 4 : at + 2 + length]
        if marker == 0xE0 and body[:5] == b"JFIF\0":  # noqa: PLR2004 - APP0
            return True
        if marker == 0xC0:  # noqa: PLR2004 - baseline frame header: sampling of component 1
            return len(body) > 7 and body[7] != 0x11  # noqa: PLR2004
        at += 2 + length
    return False

"""DICOM headers in, two facts out: a file's series, and whether its colours are named right."""

from __future__ import annotations

from pathlib import Path

_JPEG_BASELINE = "1.2.840.10008.1.2.4.50"
_HEAD_BYTES = 65536
_ITEM, _EXPLICIT_LONG = 8, 12  # bytes of an item's and of an explicit-VR element's header


def series_uid(path: Path) -> str | None:
    """Return a DICOM file's SeriesInstanceUID, reading no other element, or None."""
    from pydicom import dcmread  # noqa: PLC0415
    from pydicom.errors import InvalidDicomError  # noqa: PLC0415

    try:
        header = dcmread(path, stop_before_pixels=True, specific_tags=["SeriesInstanceUID"])
    except (InvalidDicomError, OSError, EOFError):
        return None
    uid = header.get("SeriesInstanceUID")
    return str(uid) if uid else None


def is_ycbcr_named_rgb(path: Path | str) -> bool:
    """Tell whether a JPEG series says RGB while its frames hold YCbCr.

    wsi2dcm and others write such files; OpenSlide believes the header and shows them pink.
    A frame that carries a JFIF marker, or whose chroma is subsampled, is YCbCr.
    """
    from pydicom import dcmread  # noqa: PLC0415

    tags = ["PhotometricInterpretation"]
    with Path(path).open("rb") as file:
        header = dcmread(file, stop_before_pixels=True, specific_tags=tags)
        if header.get("PhotometricInterpretation") != "RGB":
            return False
        if header.file_meta.TransferSyntaxUID != _JPEG_BASELINE:
            return False
        head = file.read(_HEAD_BYTES)
    return _frame_is_ycbcr(head[_EXPLICIT_LONG:])


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

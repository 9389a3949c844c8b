"""What a file is, by its first bytes: an image that we read, or what stands in place of one."""

import re

HEAD = 64  # bytes that tell an image

_IMAGES = (
    (rb"\xff\xd8\xff", "JPEG"),
    (rb"\x89PNG\r\n\x1a\n", "PNG"),
    (rb"RIFF.{4}WEBP", "WEBP"),
    (rb"GIF8[79]a", "GIF"),
    (rb"BM.{4}\0\0\0\0", "BMP"),
    (rb"II[*+]\0|MM\0[*+]", "TIFF"),
    (rb"P[1-6]\s|P[Ff]\n", "PPM"),
    (rb".{4}ftyp.{0,40}avi[fs]", "AVIF"),
    (rb"\0\0\0\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51", "JPEG2000"),
)
_OTHERS = (
    (rb"version https://git-lfs", "a git-lfs pointer (git lfs pull fetches the image itself)"),
    (rb"(?:\.\./)*(?:\.git)?/annex/objects/", "a git-annex pointer (git annex get fetches it)"),
    (rb"\s*(?:<!doctype html|<html|<head|<body)", "an HTML page, as of a download that failed"),
    (rb"(?:\s*<\?xml.{0,2000})?\s*<svg", "an SVG drawing"),
    (rb"\s*<\?xml", "an XML document, as of a download that failed"),
    (rb"\s*[{\[]\s*[\"{\[\]}]", "JSON"),
    (rb"\0\x05\x16[\0\x07]", "what macOS keeps about a file (AppleDouble)"),
    (rb".{4}ftyp.{0,40}(?:hei[cxms]|hev[cx]|mif1|msf1)", "HEIC: convert it to JPEG"),
    (rb".{4}ftyp|\x1aE\xdf\xa3|\0\0\x01[\xba\xb3]", "a film"),
    (rb"\xff\x0a|\0\0\0\x0cJXL ", "JPEG XL: convert it to JPEG"),
    (rb"%PDF", "a PDF document"),
    (rb"%!PS|\xc5\xd0\xd3\xc6", "PostScript"),
    (rb"8BPS", "a Photoshop document"),
    (rb"PK\x03\x04", "a zip archive"),
    (rb"\x1f\x8b|BZh|\xfd7zXZ|7z\xbc\xaf|Rar!", "a compressed file"),
    (rb".{257}ustar", "a tar archive"),
    (rb"\x93NUMPY", "a NumPy array"),
    (rb"\x89HDF", "an HDF5 file"),
)


def image_format(data: bytes) -> str | None:
    """The format of an image that `decode` reads, told by its first HEAD bytes; or None."""
    return _first(_IMAGES, data[:HEAD])


def what_else(data: bytes) -> str:
    """What bytes are that are no image we read, for a message."""
    if not data:
        return "an empty file"
    if not data.strip(b"\0"):
        return f"{len(data)} zero bytes, as of a copy that was cut off"
    return _first(_OTHERS, data[:4096]) or (
        f"{len(data)} bytes that start with {data[:8]!r}, no known format"
    )


def _first(table: tuple[tuple[bytes, str], ...], data: bytes) -> str | None:
    matches = (name for start, name in table if re.match(start, data, re.DOTALL | re.IGNORECASE))
    return next(matches, None)

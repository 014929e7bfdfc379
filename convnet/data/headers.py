"""What an image file says of itself, read from its bytes before anything is decoded.

Decoders trust headers, so what a small file can use to burn minutes or gigabytes is
looked for here: compressed texts in a PNG, thousands of scans in a JPEG.
"""

import struct
import zlib

_MAGIC = {
    b"\xff\xd8\xff": "JPEG",
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"GIF87a": "GIF",
    b"GIF89a": "GIF",
    b"BM": "BMP",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"II+\0": "TIFF",  # BigTIFF
    b"MM\0+": "TIFF",
}
# Pillow warns from this size on. With the same limit, every image that it would
# warn about is refused, and no warning filter (a global) needs to change.
MAX_PIXELS = 89_478_485
# Pixels that all scans of a JPEG together may go over. The shortest scan can cover the
# whole image; real files have about 10 scans.
MAX_SCANNED = 16 * MAX_PIXELS
_SCAN_BYTES = 10  # of the shortest one: its header
_ORIENTATION = 0x0112
_PNG_PIXELS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")


def kind(data: bytes) -> str | None:
    """The format that the first bytes announce, by Pillow's name for it."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    return next(
        (name for magic, name in _MAGIC.items() if data.startswith(magic)), None
    )


def orientation(exif: bytes) -> int:
    """Orientation in an EXIF block, 1 to 8; 1 (upright) if absent or unreadable.

    EXIF 2.32: tag 0x0112 of the first directory of what is a small TIFF file.
    """
    exif = exif.removeprefix(b"Exif\0\0")
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    if order is None:
        return 1
    try:
        (start,) = struct.unpack_from(order + "I", exif, 4)
        (entries,) = struct.unpack_from(order + "H", exif, start)
        for entry in range(start + 2, start + 2 + 12 * entries, 12):
            tag, field, count = struct.unpack_from(order + "HHI", exif, entry)
            if tag == _ORIENTATION:
                # A SHORT; some writers make it a LONG.
                code = {3: "H", 4: "I"}.get(field)
                if code is None or count != 1:
                    return 1
                (value,) = struct.unpack_from(order + code, exif, entry + 8)
                return value if 1 <= value <= 8 else 1
    except struct.error:  # a broken block does not make the pixels unreadable
        pass
    return 1


def check_size(width: int, height: int) -> None:
    """Raises ValueError if an image has more than MAX_PIXELS, or none."""
    if not 0 < width * height <= MAX_PIXELS:
        raise ValueError(f"{width}x{height} pixels, the limit is {MAX_PIXELS:,} in all")


def jpeg_exif(data: bytes) -> bytes:
    """The EXIF block of a JPEG; empty if there is none before the pixels."""
    at = 2
    while data[at : at + 1] == b"\xff" and at + 4 <= len(data):
        marker = data[at + 1]
        if marker == 0xFF:  # padding
            at += 1
            continue
        if marker == 0x01 or 0xD0 <= marker <= 0xD7:  # without a length
            at += 2
            continue
        if marker == 0xDA:  # the pixels
            break
        length = int.from_bytes(data[at + 2 : at + 4])
        if marker == 0xE1 and data.startswith(b"Exif\0\0", at + 4):
            return data[at + 4 : at + 2 + length]
        at += 2 + length
    return b""


def check_scans(data: bytes, width: int, height: int) -> None:
    """Raises ValueError if a JPEG would go over its pixels too many times.

    Among pixels the marker of a scan cannot occur by chance; thumbnails and other
    metadata may add a few to the count.
    """
    if len(data) // _SCAN_BYTES * width * height <= MAX_SCANNED:
        return  # To look for them takes longer than all else here.
    scans = data.count(b"\xff\xda")
    if scans * width * height > MAX_SCANNED:
        raise ValueError(f"{scans} scans of {width}x{height} pixels")


def png_pixels(data: bytes) -> tuple[bytes, bytes]:
    """A PNG reduced to the chunks that make its first picture, and its EXIF block.

    Texts, colour profiles (a kilobyte of them can unfold to a megabyte, any number of
    times) and the further frames of an animation are left out. Checksums of what stays
    are compared, which Pillow leaves undone for pixels.

    Raises:
        ValueError: the image is too large, the file truncated or a checksum wrong.
    """
    kept, exif, start, at = [], b"", 0, 8
    while True:
        if at + 12 > len(data):
            raise ValueError("the file is truncated")
        (length,) = struct.unpack_from(">I", data, at)
        name, end = data[at + 4 : at + 8], at + 12 + length
        if end > len(data):
            raise ValueError("the file is truncated")
        if name in _PNG_PIXELS:
            (checksum,) = struct.unpack_from(">I", data, end - 4)
            if zlib.crc32(memoryview(data)[at + 4 : end - 4]) != checksum:
                raise ValueError(f"wrong checksum of the chunk {name.decode()}")
            if name == b"IHDR" and length >= 8:
                check_size(*struct.unpack_from(">II", data, at + 8))
        else:
            if name == b"eXIf":
                exif = data[at + 8 : end - 4]
            kept.append(data[start:at])
            start = end
        at = end
        if name == b"IEND":
            break
    kept.append(data[start:at])
    return kept[0] if len(kept) == 1 else b"".join(kept), exif

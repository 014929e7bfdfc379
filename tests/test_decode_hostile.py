"""Files made to do harm, and rare variants, against pixels known beforehand."""

import errno
import io
import os
import struct
import time
import zlib

import numpy as np
import pytest
from PIL import Image

from convnet.data import decode as decode_lib
from convnet.data import headers
from convnet.data.decode import MAX_BYTES, DecodeError, decode, shape
from convnet.data.resize import Resize

pytestmark = pytest.mark.filterwarnings("ignore:::PIL")

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (6, 9, 3), np.uint8)


def encoded(image: Image.Image, format: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def plain(data: bytes, size: int = 0) -> np.ndarray:
    return decode(data, "x", size=size, resize=Resize())


def refused(data, size: int = 0) -> str:
    began = time.process_time()
    with pytest.raises(DecodeError) as caught:
        decode(data, "x", size=size, resize=Resize())
    assert time.process_time() - began < 2
    assert caught.value.reason.isprintable()
    return caught.value.reason


def chunk(name: bytes, body: bytes) -> bytes:
    checksum = struct.pack(">I", zlib.crc32(name + body))
    return struct.pack(">I", len(body)) + name + body + checksum


def png(width: int, height: int, depth: int, colour: int, rows: bytes, *more) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    chunks = chunk(b"IHDR", header), *more, chunk(b"IDAT", zlib.compress(rows, 9))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks) + chunk(b"IEND", b"")


def tiff(entries: dict[int, tuple[int, int]], body: bytes) -> bytes:
    """A TIFF of one directory; the value None stands for the place of `body`."""
    start = 8 + 2 + 12 * len(entries) + 4
    directory = struct.pack("<H", len(entries))
    for tag, (field, value) in sorted(entries.items()):
        value = start if value is None else value
        directory += struct.pack("<HHII", tag, field, 1, value)
    return b"II*\0" + struct.pack("<I", 8) + directory + bytes(4) + body


@pytest.mark.parametrize("depth, level, white", [(2, 2, 3), (4, 9, 15), (8, 7, 255)])
def test_transparent_gray_of_a_png(depth, level, white):
    levels = np.array([0, level, white, level - 1])
    bits = "".join(format(v, f"0{depth}b") for v in levels)
    row = int(bits, 2).to_bytes(len(bits) // 8)
    data = png(4, 1, depth, 0, b"\0" + row, chunk(b"tRNS", struct.pack(">H", level)))
    want = np.rint(levels * 255 / white)
    want[1] = 255
    np.testing.assert_array_equal(plain(data)[0, :, 0], want)


def test_transparent_16_bit_gray_and_colour_of_a_png():
    gray = struct.pack(">3H", 300, 301, 65535)
    data = png(3, 1, 16, 0, b"\0" + gray, chunk(b"tRNS", struct.pack(">H", 300)))
    assert plain(data)[0, :, 0].tolist() == [255, 1, 255]
    colour = struct.pack(">6H", 300, 400, 500, 65535, 0, 256)
    key = chunk(b"tRNS", struct.pack(">3H", 300, 400, 500))
    data = png(2, 1, 16, 2, b"\0" + colour, key)
    assert plain(data)[0].tolist() == [[255, 255, 255], [255, 0, 1]]


def test_interlaced_png():
    # Adam7 of 2x2: passes 1 (0,0), 6 (1,0) and 7 (the second row).
    pixels = RGB[:2, :2]
    passes = [pixels[:1, :1], pixels[:1, 1:], pixels[1:]]
    rows = b"".join(b"\0" + part.tobytes() for part in passes)
    header = struct.pack(">IIBBBBB", 2, 2, 8, 2, 0, 0, 1)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows))
    data = b"\x89PNG\r\n\x1a\n" + body + chunk(b"IEND", b"")
    np.testing.assert_array_equal(plain(data), pixels)


def test_12_bit_tiff_is_not_dark():
    levels = np.array([0, 1000, 4095, 2048])
    bits = "".join(format(v, "012b") for v in levels)
    body = int(bits, 2).to_bytes(6)
    short = {258: 12, 259: 1, 262: 1, 277: 1}
    long = {256: 4, 257: 1, 273: None, 278: 1, 279: len(body)}
    fields = {tag: (3, value) for tag, value in short.items()}
    fields |= {tag: (4, value) for tag, value in long.items()}
    want = np.rint(levels * 255 / 4095)
    np.testing.assert_array_equal(plain(tiff(fields, body))[0, :, 0], want)


def test_gif_frame_smaller_than_its_canvas():
    image = Image.fromarray(np.array([[0, 1], [1, 0]], np.uint8), "P")
    image.putpalette([255, 0, 0, 0, 0, 255])
    data = bytearray(encoded(image, "GIF", transparency=1, optimize=False))
    data[6:10] = struct.pack("<HH", 4, 3)
    want = np.full((3, 4, 3), 255)
    want[0, 0] = want[1, 1] = 255, 0, 0
    np.testing.assert_array_equal(plain(bytes(data)), want)


def test_bmp_from_the_top_and_run_lengths():
    upside_down = bytearray(encoded(Image.fromarray(RGB[::-1]), "BMP"))
    upside_down[22:26] = struct.pack("<i", -6)
    np.testing.assert_array_equal(plain(bytes(upside_down)), RGB)
    palette = b"".join(bytes([i, i, 255 - i, 0]) for i in range(256))
    runs = b"\x03\x05\x01\x09\0\0\0\x04\1\2\3\4\0\1"  # 5 5 5 9, below 1 2 3 4
    sizes = struct.pack("<IHHI", 0, 0, 0, 54 + 1024)
    info = (40, 4, 2, 1, 8, 1, len(runs), 0, 0, 256, 0)
    header = b"BM" + sizes + struct.pack("<IiiHHIIiiII", *info)
    indices = np.array([[1, 2, 3, 4], [5, 5, 5, 9]])
    want = np.stack([255 - indices, indices, indices], -1)
    np.testing.assert_array_equal(plain(header + palette + runs), want)


def test_one_wrong_bit_of_a_png_is_noticed():
    data = bytearray(encoded(Image.fromarray(RGB), "PNG"))
    data[data.index(b"IDAT") + 20] ^= 1
    assert refused(bytes(data)) == "wrong checksum of the chunk IDAT"


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "BMP", "TIFF"])
def test_every_cut_is_an_error(format):
    data = encoded(Image.fromarray(RGB[:, :8]), format)  # BMP pads rows to 4 bytes
    for length in range(1, len(data)):
        assert refused(data[:length])


@pytest.mark.parametrize("name", ["zTXt", "iCCP"])
def test_texts_that_unfold_cost_nothing(name):
    data = encoded(Image.fromarray(RGB), "PNG")
    body = b"k\0\0" + zlib.compress(bytes(1_000_000), 9)
    bomb = data[:33] + chunk(name.encode(), body) * 2000 + data[33:]  # 2 GB in 2 MB
    began = time.process_time()
    np.testing.assert_array_equal(plain(bomb), RGB)
    assert time.process_time() - began < 1


def test_jpeg_of_thousands_of_scans():
    data = encoded(Image.new("L", (8000, 8000)), "JPEG", progressive=True)
    scan = data[data.rindex(b"\xff\xda") :][:10]
    assert "scans of 8000x8000 pixels" in refused(data[:-2] + scan * 9000 + data[-2:])


def test_small_tiff_of_huge_tiles():
    body = zlib.compress(bytes(1000))
    short = {258: 8, 259: 8, 262: 1, 277: 1}
    long = {256: 64, 257: 64, 322: 40_000, 323: 40_000, 324: None, 325: len(body)}
    fields = {tag: (3, value) for tag, value in short.items()}
    fields |= {tag: (4, value) for tag, value in long.items()}
    assert "40000x40000 pixels, the limit" in refused(tiff(fields, body))


def test_tiff_that_lacks_a_strip():
    for rows, whole in ((4, True), (2, False)):
        short = {258: 8, 259: 1, 262: 1, 277: 1}
        long = {256: 4, 257: 4, 273: None, 278: rows, 279: 4 * rows}
        fields = {tag: (3, value) for tag, value in short.items()}
        fields |= {tag: (4, value) for tag, value in long.items()}
        data = tiff(fields, bytes(range(16)))
        if whole:
            assert plain(data)[..., 0].ravel().tolist() == list(range(16))
        else:
            assert refused(data) == "strips or tiles of the image are missing"


def test_webp_of_a_huge_canvas():
    data = bytearray(encoded(Image.new("RGBA", (9, 9), (1, 2, 3, 4)), "WEBP"))
    at = data.index(b"VP8X")
    data[at + 12 : at + 18] = b"\xff\x3f\0" * 2  # 16384 x 16384
    assert refused(bytes(data))


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    assert "symbolic links" in refused(tmp_path / "a")
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for ever
    assert refused(tmp_path / "pipe") == "not a regular file"
    assert refused("/dev/zero") == "not a regular file"
    assert "null" in refused("a\0b")
    assert refused("x" * 5000) == "File name too long"
    with open(tmp_path / "big", "wb") as file:
        file.truncate(MAX_BYTES + 1)  # sparse
    assert "bytes, the limit is" in refused(tmp_path / "big")


@pytest.mark.parametrize("number", [errno.EACCES, errno.ENOENT, errno.EIO])
def test_file_that_is_there_but_does_not_open(number, tmp_path, monkeypatch):
    """No permission, it vanished just now, or its disk is broken."""

    def fail(*arguments):
        raise OSError(number, os.strerror(number), str(tmp_path / "x.png"))

    (tmp_path / "x.png").write_bytes(encoded(Image.fromarray(RGB), "PNG"))
    monkeypatch.setattr(decode_lib, "open", fail, raising=False)
    assert refused(tmp_path / "x.png") == os.strerror(number)


def test_reasons_are_one_printable_line():
    error = DecodeError("x", "first\nsecond \x1b[31m" + "long " * 99)
    assert error.reason.startswith("first second ?[31mlong long")
    assert error.reason.isprintable() and len(error.reason) <= 200


def test_orientation_of_other_writers():
    def block(order: str, entry: bytes) -> bytes:
        start = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(order + "IH", 8, 1)
        return b"Exif\0\0" + start + entry

    for order in "<>":
        entry = struct.pack(order + "HHIHH", 0x0112, 3, 1, 6, 0)
        assert headers.orientation(block(order, entry)) == 6
        assert headers.orientation(block(order, entry)[6:]) == 6  # WebP has no prefix
        entry = struct.pack(order + "HHII", 0x0112, 4, 1, 3)
        assert headers.orientation(block(order, entry)) == 3
        entry = struct.pack(order + "HHIHH", 0x0112, 3, 1, 9, 0)
        assert headers.orientation(block(order, entry)) == 1
        assert headers.orientation(block(order, entry[:5])) == 1


def test_orientation_behind_other_markers():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(Image.fromarray(RGB), "JPEG", exif=exif)
    # A comment, then a marker without a body, then padding before the EXIF block.
    data = data[:2] + b"\xff\xfe\0\x04hi" + b"\xff\xd0" + b"\xff" + data[2:]
    assert plain(data).shape == (9, 6, 3) and shape(data, "x") == (9, 6)
    assert headers.orientation(headers.jpeg_exif(data)) == 6


def test_both_decoders_of_jpegs_give_the_same_pixels(monkeypatch):
    """Whether simplejpeg is installed must not change a training run."""
    pytest.importorskip("simplejpeg")
    quick, taken = decode_lib._quick_jpeg, []

    def counted(*arguments):
        taken.append(quick(*arguments) is not None)
        return quick(*arguments)

    monkeypatch.setattr(decode_lib, "_quick_jpeg", counted)
    rng, cases = np.random.default_rng(2), []
    for width, height in ((1, 1), (7, 9), (17, 33), (160, 120), (2000, 3)):
        noise = Image.fromarray(rng.integers(0, 256, (5, 6, 3), np.uint8))
        for subsampling in (0, 1, 2):
            exif = Image.Exif()
            exif[0x0112] = int(rng.integers(1, 9))
            options = {"subsampling": subsampling, "exif": exif}
            options["progressive"] = bool(rng.integers(2))
            options["quality"] = int(rng.integers(30, 99))
            cases.append(encoded(noise.resize((width, height)), "JPEG", **options))
    cases.append(encoded(Image.fromarray(RGB[..., 0]), "JPEG"))
    calls = [
        (data, size, resize)
        for data in cases
        for size in (0, 1, 8, 32)
        for resize in ("crop", "squash", "pad")
    ]
    first = [decode(d, "x", size=size, resize=Resize(rule)) for d, size, rule in calls]
    assert all(taken)
    monkeypatch.setattr(decode_lib, "simplejpeg", None)
    for (data, size, rule), pixels in zip(calls, first, strict=True):
        again = decode(data, "x", size=size, resize=Resize(rule))
        np.testing.assert_array_equal(again, pixels)
        assert again.flags.writeable and again.flags.c_contiguous
        if not size:
            assert shape(data, "x") == pixels.shape[:2]
    assert not any(taken[len(calls) :])

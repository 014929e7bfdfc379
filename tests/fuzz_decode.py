"""Damaged images by the thousand: `python -m tests.fuzz_decode --inputs=10000`.

Valid files of every format are cut, flipped bit by bit, overwritten and spliced, and
decoded in a process of its own under a limit of memory. Input number i depends on the
seed and i alone, so that whatever is found can be found again.
"""

import argparse
import io
import multiprocessing
import resource
import sys
import time
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from convnet.data.decode import DecodeError, decode
from convnet.data.resize import Resize

ADDRESS_SPACE = 4 << 30  # bytes that the process may map
PATIENCE = 60  # wall-clock seconds for one input, on however busy a machine
SLOW = 2.0  # seconds of CPU time


@dataclass
class Findings:
    """What became of the inputs; `crashes`, `hangs` and `others` should be empty."""

    decoded: int = 0
    refused: int = 0
    crashes: list[str] = field(default_factory=list)
    hangs: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)  # other exceptions, bad results
    slowest: float = 0.0  # seconds of CPU time
    peak: int = 0  # bytes of resident memory, beyond those at the start


def originals() -> dict[str, bytes]:
    """Small valid files: every format, in the variants that take other code."""
    rng = np.random.default_rng(0)
    rgb = Image.fromarray(rng.integers(0, 256, (5, 6, 3), np.uint8)).resize((48, 40))
    alpha = Image.merge("RGBA", (*rgb.split(), rgb.getchannel(0)))
    deep = Image.fromarray(rng.integers(0, 65536, (40, 48), np.uint16))
    palette, bilevel, gray = rgb.quantize(16), rgb.convert("1"), rgb.convert("L")
    exif = Image.Exif()
    exif[0x0112] = 6

    def frames() -> dict:  # anew each time: saving leaves traces in an image
        return {"save_all": True, "append_images": [rgb.rotate(90)]}

    wanted = {
        "jpeg": (rgb, "JPEG", {"exif": exif}),
        "jpeg progressive": (rgb, "JPEG", {"progressive": True}),
        "jpeg gray": (gray, "JPEG", {}),
        "jpeg cmyk": (rgb.convert("CMYK"), "JPEG", {}),
        "jpeg restarts": (rgb, "JPEG", {"restart_marker_blocks": 2}),
        "mpo": (rgb.copy(), "MPO", frames()),
        "png": (rgb, "PNG", {"exif": exif}),
        "png alpha": (alpha, "PNG", {}),
        "png palette": (palette, "PNG", {"transparency": b"\0\x80\xff"}),
        "png 16": (deep, "PNG", {}),
        "png 1": (bilevel, "PNG", {}),
        "apng": (rgb, "PNG", frames()),
        "webp": (rgb, "WEBP", {"exif": exif}),
        "webp lossless": (alpha, "WEBP", {"lossless": True}),
        "webp alpha": (alpha, "WEBP", {}),
        "webp animated": (rgb, "WEBP", frames()),
        "gif": (palette, "GIF", {"transparency": 3}),
        "gif animated": (rgb, "GIF", frames()),
        "bmp": (rgb, "BMP", {}),
        "bmp palette": (palette, "BMP", {}),
        "bmp alpha": (alpha, "BMP", {}),
        "tiff": (rgb.copy(), "TIFF", {"exif": exif}),
        "tiff 16": (deep, "TIFF", {}),
        "tiff frames": (rgb.copy(), "TIFF", frames()),
        "tiff big": (rgb.copy(), "TIFF", {"big_tiff": True}),
    }
    for compression in ("tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits", "zstd"):
        wanted[f"tiff {compression}"] = (
            rgb.copy(),
            "TIFF",
            {"compression": compression},
        )
    wanted["tiff group4"] = (bilevel, "TIFF", {"compression": "group4"})
    files = {}
    for name, (image, format, options) in wanted.items():
        file = io.BytesIO()
        image.save(file, format, **options)
        files[name] = file.getvalue()
    return files


def damaged(data: bytes, rng: np.random.Generator) -> bytes:
    """One to four kinds of damage."""
    array = np.frombuffer(data, np.uint8).copy()
    for _ in range(rng.integers(1, 5)):
        # Headers decide most: half of the damage is done to the first 64 bytes.
        reach = len(array) if rng.random() < 0.5 else min(64, len(array))
        at = int(rng.integers(0, max(reach, 1)))
        kind = rng.integers(0, 6)
        if kind == 0:
            array = array[: rng.integers(0, len(array) + 1)]
        elif kind == 1 and len(array):  # bits
            array[at] ^= 1 << rng.integers(0, 8)
        elif kind == 2 and len(array):  # bytes
            length = min(int(rng.integers(1, 5)), len(array) - at)
            array[at : at + length] = rng.integers(0, 256, length)
        elif kind == 3 and len(array):  # extreme numbers
            array[at : at + 4] = rng.choice([0, 1, 0x7F, 0x80, 0xFF])
        elif kind == 4:  # missing
            array = np.delete(array, slice(at, at + int(rng.integers(1, 64))))
        else:  # repeated
            array = np.insert(array, at, array[at : at + int(rng.integers(1, 64))])
    return array.tobytes()


def made(files: dict[str, bytes], seed: int, index: int) -> tuple[str, bytes, int]:
    """Input number `index`: what it was, its bytes, the size to decode it to."""
    rng = np.random.default_rng([seed, index])
    name = list(files)[index % len(files)]
    return name, damaged(files[name], rng), int(rng.choice([0, 8, 32]))


def check(data: bytes, size: int) -> bool:
    """Decodes; returns whether there were pixels, raises if the contract is broken."""
    try:
        pixels = decode(data, "x", size=size, resize=Resize())
    except DecodeError as error:
        assert error.reason and error.reason.isprintable(), error.reason
        assert " at 0x" not in error.reason, error.reason
        return False
    assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3
    assert not size or pixels.shape == (size, size, 3)
    return True


def _work(pipe, seed: int, start: int, stop: int) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    files = originals()
    before = _resident()  # a process inherits the peak of the one that started it
    for index in range(start, stop):
        _, data, size = made(files, seed, index)
        began = time.process_time()
        try:
            outcome = check(data, size)
        except Exception as error:
            outcome = f"{type(error).__name__}: {error}"
        peak = _resident() - before
        pipe.send((index, outcome, time.process_time() - began, peak))


def _resident() -> int:
    """The most bytes of resident memory so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def run(inputs: int, seed: int) -> Findings:
    """Decodes that many inputs; a process that dies or hangs is replaced."""
    found, names = Findings(), list(originals())
    context = multiprocessing.get_context("spawn")
    index = 0
    while index < inputs:
        ours, theirs = context.Pipe(duplex=False)
        worker = context.Process(target=_work, args=(theirs, seed, index, inputs))
        worker.start()
        theirs.close()
        try:
            while index < inputs and ours.poll(PATIENCE):
                index, outcome, seconds, peak = ours.recv()
                name = f"{index} ({names[index % len(names)]})"
                found.decoded += outcome is True
                found.refused += outcome is False
                if isinstance(outcome, str):
                    found.others.append(f"{name}: {outcome}")
                if seconds > SLOW:
                    found.hangs.append(f"{name}: {seconds:.1f} s")
                found.slowest = max(found.slowest, seconds)
                found.peak = max(found.peak, peak)
                index += 1
            if index < inputs:
                found.hangs.append(f"{index}: more than {PATIENCE} s")
        except EOFError:
            worker.join()
            found.crashes.append(f"{index}: exit status {worker.exitcode}")
        worker.kill()
        worker.join()
        index += index < inputs
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    result = run(arguments.inputs, arguments.seed)
    print(
        f"{result.decoded} decoded, {result.refused} refused; slowest "
        f"{result.slowest:.2f} s of CPU time, peak {result.peak / 2**20:.0f} MiB"
    )
    for what in ("crashes", "hangs", "others"):
        print(f"{what}: {len(getattr(result, what))}")
        for line in getattr(result, what)[:20]:
            print("   ", line)
    sys.exit(bool(result.crashes or result.hangs or result.others))

"""Images per second from a file's bytes to pixels, beside other decoders.

usage: python -m benchmarks.decode [--threads=1,2] [--repeats=5] [--output=FILE.json]

Every decoder reads the same bytes, cuts out the centre and scales it. Pillow is used as
its manual shows it; OpenCV and simplejpeg are peers where they are installed. None of
the pictures is real, but sizes and details are those of photographs.
"""

import functools
import importlib.util
import io
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from absl import flags
from PIL import Image, ImageOps

from benchmarks import table as table_lib
from benchmarks.table import Row, Table
from convnet import cli
from convnet.data.decode import decode, fit
from convnet.data.resize import Resize
from convnet.errors import UsageError

# Name: width and height, format, size to decode to, how many.
_CASES = {
    "JPEG 300x224 to 224": ((300, 224), "JPEG", 224, 32),
    "JPEG 300x224 to 96": ((300, 224), "JPEG", 96, 32),
    "JPEG 300x224 to 32": ((300, 224), "JPEG", 32, 32),
    "JPEG 3000x2000 to 224": ((3000, 2000), "JPEG", 224, 2),
    "JPEG 32x32": ((32, 32), "JPEG", 32, 256),
    "PNG 32x32": ((32, 32), "PNG", 32, 256),
    "PNG 32x32 to 64": ((32, 32), "PNG", 64, 256),
}


def define(values: flags.FlagValues, argv: list[str]) -> None:
    """Defines the flags of this benchmark."""
    del argv
    table_lib.define(values, peer_python=False)
    flags.DEFINE_list("threads", ["1", "2"], "that decode", flag_values=values)


def main(values: flags.FlagValues) -> None:
    """Measures every case with every number of threads."""
    threads = [int(n) if n.isdecimal() else 0 for n in values.threads]
    if not threads or min(threads) < 1:
        raise UsageError(
            f"--threads={','.join(values.threads)}: want numbers from 1 on"
        )
    table = Table(values.output, "decoders")
    for case, (shape, format, size, count) in _CASES.items():
        files = pictures(shape, format, count)
        peers = decoders(format)
        for number in threads:
            sides = [
                functools.partial(rate, call, files, size, number)
                for call in (_ours, *peers.values())
            ]
            found = table_lib.interleave(sides, values.repeats)
            ours, *others = [table_lib.median(one) for one in found]
            name = f"{case}, {number} thread{'s' if number > 1 else ''}"
            for peer, other in zip(peers, others, strict=True):
                table.add(Row(name, "images/s", ours, other, peer))


def pictures(shape: tuple[int, int], format: str, count: int) -> list[bytes]:
    """Files of smooth noise with some grain, all different."""
    rng = np.random.default_rng(0)
    width, height = shape
    files = []
    for _ in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (9, 12, 3), np.uint8))
        smooth = np.asarray(coarse.resize(shape, Image.Resampling.BICUBIC))
        grain = rng.normal(0, 6, (height, width, 3))
        file = io.BytesIO()
        image = Image.fromarray(np.clip(smooth + grain, 0, 255).astype(np.uint8))
        image.save(file, format, **({"quality": 90} if format == "JPEG" else {}))
        files.append(file.getvalue())
    return files


def rate(
    call: Callable[[bytes, int], np.ndarray],
    files: list[bytes],
    size: int,
    threads: int,
) -> float:
    """Images per second of so many threads that decode all files for half a second."""

    def work(_: int) -> int:
        done, end = 0, time.perf_counter() + 0.5
        while time.perf_counter() < end:
            for data in files:
                call(data, size)
            done += len(files)
        return done

    call(files[0], size)
    with ThreadPoolExecutor(threads) as pool:
        began = time.perf_counter()
        return sum(pool.map(work, range(threads))) / (time.perf_counter() - began)


def decoders(format: str) -> dict[str, Callable[[bytes, int], np.ndarray]]:
    """The peers that are installed and read the format."""
    found = {"Pillow": _pillow}
    if importlib.util.find_spec("cv2"):
        found["OpenCV"] = _opencv
    if format == "JPEG" and importlib.util.find_spec("simplejpeg"):
        found["simplejpeg"] = _simplejpeg
    return found


def _ours(data: bytes, size: int) -> np.ndarray:
    return decode(data, "x", size=size, resize=Resize())


def _pillow(data: bytes, size: int) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        image.draft("RGB", (2 * size, 2 * size))
        image = ImageOps.exif_transpose(image).convert("RGB")
        return np.array(ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR))


def _opencv(data: bytes, size: int) -> np.ndarray:
    import cv2

    cv2.setNumThreads(1)
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
    height, width = pixels.shape[:2]
    short = min(height, width)
    top, left = (height - short) // 2, (width - short) // 2
    pixels = pixels[top : top + short, left : left + short]
    how = cv2.INTER_AREA if short > size else cv2.INTER_LINEAR
    return np.array(cv2.resize(pixels, (size, size), interpolation=how))


def _simplejpeg(data: bytes, size: int) -> np.ndarray:
    import simplejpeg

    pixels = simplejpeg.decode_jpeg(data, min_height=2 * size, min_width=2 * size)
    return fit(pixels, size, Resize())


if __name__ == "__main__":
    cli.run(main, define, __doc__)

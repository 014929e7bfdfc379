"""Arrays -> pictures for people, uint8 (h, w, 3): inputs, heat maps, contact sheets.

Three kinds of input are drawn: pictures, series (one spatial axis), and maps (all
others: the last two spatial axes are a map, those before it, and channels, give many).
"""

import io
from collections.abc import Sequence

import numpy as np

SIDE = 224  # pixels that a picture is drawn with, about
_GAP = 2  # between the parts of a sheet
_PAPER = 255
_FRAME = (255, 176, 0)
_STRIP = 12  # pixels a row of a series' feature map


def kind(shape: Sequence[int], dtype: str) -> str:
    """Returns "picture", "series" or "maps" of an input (*spatial, c)."""
    if len(shape) == 2:
        return "series"
    picture = dtype == "uint8" and len(shape) == 3 and shape[-1] in (1, 3)
    return "picture" if picture else "maps"


def example(stored: np.ndarray) -> np.ndarray:
    """Draws an input as it is stored."""
    what = kind(stored.shape, str(stored.dtype))
    if what == "picture":
        return enlarge(_rgb(stored))
    if what == "series":
        return _plot(stored, None)
    return tiles(coloured(_stack(stored), "viridis", *_range(stored)))


def relevance(stored: np.ndarray, heat: np.ndarray, signed: bool) -> np.ndarray:
    """Draws which part of an input mattered.

    Args:
      stored: the input (*spatial, c).
      heat: (*spatial).
      signed: whether negative values count: red is for, blue against. Otherwise the
        larger, the brighter.
    """
    what = kind(stored.shape, str(stored.dtype))
    if what == "series":
        return _plot(stored, _scaled(heat, signed))
    if what == "picture":
        small = _rgb(stored)
        shown = _smooth(_scaled(heat, signed), enlarge(small).shape[:2])
        return _overlay(enlarge(small), shown, signed)
    shown = _scaled(heat, signed).reshape(-1, *heat.shape[-2:])
    limits = (-1.0, 1.0) if signed else (0.0, 1.0)
    return tiles(coloured(shown, "RdBu_r" if signed else "magma", *limits))


def pixels(heat: np.ndarray, signed: bool, stored: np.ndarray) -> np.ndarray:
    """Draws a value for each place of the input, sharp, without the input behind it."""
    if kind(stored.shape, str(stored.dtype)) != "picture":
        return relevance(stored, heat, signed)
    limits = (-1.0, 1.0) if signed else (0.0, 1.0)
    colours = "RdBu_r" if signed else "magma"
    return enlarge(coloured(_scaled(heat, signed), colours, *limits))


def gradient(values: np.ndarray, stored: np.ndarray) -> np.ndarray:
    """Draws a gradient (*spatial, c) in the picture's own colours around grey."""
    if kind(stored.shape, str(stored.dtype)) != "picture":
        return relevance(stored, np.abs(values).max(-1), False)
    scale = max(float(np.quantile(np.abs(values), 0.995)), 1e-12)
    grey = np.clip(0.5 + 0.5 * values / scale, 0, 1)
    return enlarge(_rgb(np.rint(255 * grey).astype(np.uint8)))


def sheet(maps: np.ndarray, signed: bool, columns: int) -> np.ndarray:
    """Draws channels of one feature map (*places, c) on one scale.

    Of more than two spatial axes, the last place of the first ones is drawn.
    """
    limit = max(float(np.quantile(np.abs(maps), 0.998)), 1e-12)
    limits = (-limit, limit) if signed else (0.0, limit)
    colours = "RdBu_r" if signed else "magma"
    if maps.ndim == 2:  # (t, c): a row for each channel
        rows = coloured(maps.T, colours, *limits)
        return _repeat(rows, _STRIP, max(1, 2 * SIDE // rows.shape[1]))
    while maps.ndim > 3:
        maps = maps[-1]
    drawn = coloured(np.moveaxis(maps, -1, 0), colours, *limits)
    return tiles(drawn, columns, SIDE // columns)


def filters(kernel: np.ndarray) -> np.ndarray:
    """Draws the filters of a first layer (*k, c, features)."""
    limit = np.abs(kernel).max() or 1.0
    *window, c, features = kernel.shape
    if len(window) == 1:
        return _repeat(
            coloured(kernel.reshape(-1, features).T, "RdBu_r", -limit, limit),
            _STRIP,
            max(1, SIDE // (window[0] * c)),
        )
    if len(window) == 2 and c == 3:
        # Each by its own contrast: zero is grey.
        each = np.abs(kernel).max((0, 1, 2), keepdims=True)
        drawn = 0.5 + 0.5 * kernel / np.where(each == 0, 1, each)
        drawn = np.rint(255 * np.moveaxis(drawn, -1, 0)).astype(np.uint8)
    else:
        flat = np.moveaxis(kernel, -1, 0).reshape(features, *window, c)
        flat = np.moveaxis(flat, -1, 1).reshape(-1, *window[-2:])
        drawn = coloured(flat, "RdBu_r", -limit, limit)
    return tiles(drawn, 12, 48)


def forecast(answer: np.ndarray, place: Sequence[int]) -> np.ndarray:
    """Draws a predicted map (h, w, k) of output place[-1], a cross at the place."""
    drawn = coloured(answer[..., place[-1]], "viridis", *_range(answer))
    row, column = place[0], place[1]
    drawn = drawn.copy()
    drawn[row], drawn[:, column] = _lighter(drawn[row]), _lighter(drawn[:, column])
    drawn[row, column] = _FRAME
    return enlarge(drawn)


def _lighter(colours: np.ndarray) -> np.ndarray:
    return (0.5 * colours + 127).astype(np.uint8)


def box(picture: np.ndarray, box: Sequence[slice], spatial: Sequence[int]) -> None:
    """Draws a frame around a box of places, in place."""
    scale = [p / side for p, side in zip(picture.shape[:2], spatial, strict=True)]
    (top, bottom), (left, right) = (
        (round(part.start * s), round(part.stop * s) - 1)
        for part, s in zip(box, scale, strict=True)
    )
    for offset in (0, 1):
        picture[[top + offset, bottom - offset], left : right + 1] = _FRAME
        picture[top : bottom + 1, [left + offset, right - offset]] = _FRAME


def tiles(
    pictures: Sequence[np.ndarray], columns: int = 4, side: int = 160
) -> np.ndarray:
    """Lays pictures of one size, uint8 (h, w, 3), out in rows, each about `side`."""
    times = max(1, round(side / max(pictures[0].shape[:2])))
    pictures = [_repeat(one, times, times) for one in pictures]
    h, w, _ = pictures[0].shape
    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    shape = (rows * (h + _GAP) - _GAP, columns * (w + _GAP) - _GAP, 3)
    out = np.full(shape, _PAPER, np.uint8)
    for place, one in enumerate(pictures):
        y, x = divmod(place, columns)
        y, x = y * (h + _GAP), x * (w + _GAP)
        out[y : y + h, x : x + w] = one
    return out


def coloured(values: np.ndarray, name: str, low: float, high: float) -> np.ndarray:
    """Values (...) -> uint8 (..., 3), by one of matplotlib's colour maps."""
    import matplotlib

    span = (high - low) or 1.0
    share = np.clip((np.asarray(values, np.float64) - low) / span, 0, 1)
    return matplotlib.colormaps[name](share, bytes=True)[..., :3]


def enlarge(picture: np.ndarray, side: int = SIDE) -> np.ndarray:
    """Repeats pixels until the shorter side has about `side`; never shrinks."""
    times = max(1, round(side / min(picture.shape[:2])))
    return _repeat(picture, times, times)


def png(picture: np.ndarray) -> bytes:
    """The bytes of a PNG file."""
    return _encoded(picture, "png", optimize=True)


def webp(picture: np.ndarray) -> bytes:
    """The bytes of a WebP file, small enough for a page that holds many."""
    return _encoded(picture, "webp", quality=88, method=4)


def _encoded(picture: np.ndarray, kind: str, **options: object) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(picture)).save(file, kind, **options)
    return file.getvalue()


def _rgb(stored: np.ndarray) -> np.ndarray:
    return np.repeat(stored, 3, -1) if stored.shape[-1] == 1 else stored


def _repeat(picture: np.ndarray, down: int, across: int) -> np.ndarray:
    return picture.repeat(down, 0).repeat(across, 1)


def _range(values: np.ndarray) -> tuple[float, float]:
    return float(values.min()), float(values.max())


def _stack(stored: np.ndarray) -> np.ndarray:
    """Maps (n, h, w): the channels, and the leading axes, one after the other."""
    moved = np.moveaxis(np.asarray(stored, np.float32), -1, -3)
    return moved.reshape(-1, *moved.shape[-2:])


def _scaled(heat: np.ndarray, signed: bool) -> np.ndarray:
    """-1..1 or 0..1: the few largest places are cut, so that others are seen."""
    heat = np.asarray(heat, np.float64)
    if not signed:
        heat = heat - heat.min()
    limit = float(np.quantile(np.abs(heat), 0.995)) or float(np.abs(heat).max())
    return np.clip(heat / (limit or 1.0), -1, 1)


def _smooth(values: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    from PIL import Image

    image = Image.fromarray(values.astype(np.float32))
    return np.asarray(image.resize(shape[::-1], Image.Resampling.BILINEAR))


def _overlay(picture: np.ndarray, heat: np.ndarray, signed: bool) -> np.ndarray:
    """The picture in grey, coloured where it mattered, the stronger the more."""
    grey = 0.35 * 255 + 0.5 * picture.mean(-1, keepdims=True)
    if signed:
        colour = coloured(heat, "RdBu_r", -1, 1).astype(np.float64)
        strength = np.sqrt(np.abs(heat))[..., None]
    else:
        grey = 0.75 * picture.mean(-1, keepdims=True)
        colour = coloured(0.25 + 0.75 * heat, "inferno", 0, 1).astype(np.float64)
        strength = heat[..., None]
    strength = 0.72 * strength
    return np.rint((1 - strength) * grey + strength * colour).astype(np.uint8)


def _plot(series: np.ndarray, heat: np.ndarray | None) -> np.ndarray:
    """A series (t, c) as lines, over the colours of `heat` (t,) in -1..1."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, 2.1), dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    series = np.asarray(series, np.float64)
    low, high = _range(series)
    margin = 0.05 * (high - low) or 1.0
    limits = (low - margin, high + margin)
    if heat is not None:
        extent = (-0.5, len(heat) - 0.5, *limits)
        axes.imshow(
            heat[None], cmap="RdBu_r", vmin=-1.4, vmax=1.4, aspect="auto", extent=extent
        )
    axes.plot(series[:, :4], linewidth=1.2, color="#1d2430")
    axes.set(xlim=(-0.5, len(series) - 0.5), ylim=limits, xlabel="step")
    axes.tick_params(labelsize=8)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()

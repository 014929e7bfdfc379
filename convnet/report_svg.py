"""Small charts as SVG text: their colours follow the page, light or dark.

Drawn here and not by matplotlib so that a chart is a few kilobytes, takes its colours
from the page's style sheet and has the same bytes everywhere.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup, escape

WIDTH, HEIGHT = 400, 250
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 26, 38


def number(value: float, digits: int = 4) -> str:
    """A number for people: `digits` significant ones, thousands apart, no exponent
    where it can be avoided."""
    value = float(value)
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("∞" if value > 0 else "−∞")
    if value == 0:
        return "0"
    if not 1e-4 <= abs(value) < 1e9:
        return f"{value:.{digits - 1}e}".replace("-", "−")
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    text = f"{value:,.{decimals}f}"
    return (text.rstrip("0").rstrip(".") if "." in text else text).replace("-", "−")


def percent(share: float, digits: int = 2) -> str:
    return "–" if math.isnan(share) else f"{100 * share:.{digits}f}%"


def short(value: float) -> str:
    """A tick's label: 1200 -> 1.2k."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.6g}{unit}".replace("-", "−")
    return f"{value:.6g}".replace("-", "−")


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{number(seconds, 3)} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"


def size(count: float) -> str:
    """1234567 -> 1.23 M."""
    for scale, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count:.3g}"


@dataclass(frozen=True)
class Scale:
    """From values to 0..1 along an axis, and where its ticks are."""

    low: float
    high: float
    log: bool = False
    label: Callable[[float], str] = short

    @classmethod
    def around(
        cls, values: Iterable[float], log: bool = False, zero: bool = False, **rest
    ) -> "Scale":
        """Holds all finite values (and 0 with `zero`), rounded out to whole ticks."""
        values = np.asarray(list(values), np.float64)
        values = values[np.isfinite(values) & ((values > 0) | (not log))]
        if not len(values):
            return cls(0.1, 1, log=True, **rest) if log else cls(0, 1, **rest)
        low, high = float(values.min()), float(values.max())
        if log:
            margin = (high / low) ** 0.04 if high > low else 2.0
            return cls(low / margin, high * margin, log=True, **rest)
        low, high = (min(low, 0.0), max(high, 0.0)) if zero else (low, high)
        if high - low <= 1e-9 * max(abs(low), abs(high), 1e-30):
            low, high = low - (abs(low) * 0.1 or 1), high + (abs(high) * 0.1 or 1)
        step = tick_step(low, high)
        return cls(math.floor(low / step) * step, math.ceil(high / step) * step, **rest)

    def place(self, values: np.ndarray | float) -> np.ndarray:
        values = np.asarray(values, np.float64)
        low, high = self.low, self.high
        if self.log:
            with np.errstate(divide="ignore", invalid="ignore"):
                values = np.log(values)
            low, high = math.log(low), math.log(high)
        return (values - low) / (high - low)

    def ticks(self) -> list[float]:
        if not self.log:
            step = tick_step(self.low, self.high)
            first, last = math.ceil(self.low / step - 1e-9), self.high / step + 1e-9
            # Rounded so that 3 * 0.1 is labelled 0.3.
            return [
                float(f"{i * step:.10g}") for i in range(first, math.floor(last) + 1)
            ]
        decades = range(
            math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1
        )
        every = max(1, len(decades) // 5)
        for factors in ((1,), (1, 3), (1, 2, 5)):
            ticks = [f * 10.0**d for d in decades[::every] for f in factors]
            ticks = [t for t in ticks if self.low <= t <= self.high]
            if len(ticks) >= 3:
                break
        return ticks


def tick_step(low: float, high: float) -> float:
    """1, 2 or 5 times a power of ten, so that the span has about five ticks."""
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    return next(f * power for f in (1, 2, 5, 10) if f * power >= rough * 0.999)


class Plot:
    """A chart with labelled axes; `svg` gives its text. Colours are CSS classes."""

    def __init__(self, x: Scale, y: Scale, x_label: str, y_label: str = "") -> None:
        self.x, self.y, self.x_label, self.y_label = x, y, x_label, y_label
        self.marks: list[str] = []

    def at(self, xs, ys) -> np.ndarray:
        """Pixels (n, 2) of points; nan stays nan."""
        across = LEFT + self.x.place(xs) * (WIDTH - LEFT - RIGHT)
        down = HEIGHT - BOTTOM - self.y.place(ys) * (HEIGHT - TOP - BOTTOM)
        return np.stack(np.broadcast_arrays(across, down), -1)

    def line(self, xs: Sequence[float], ys: Sequence[float], style: str) -> None:
        """A polyline, broken where a point is no number."""
        path, pen = [], "M"
        for x, y in self.at(xs, ys).tolist():
            if math.isfinite(x) and math.isfinite(y):
                # A stroke without length shows a point that stands alone.
                path.append(f"{pen}{x:.1f} {y:.1f}" + ("h0" if pen == "M" else ""))
                pen = "L"
            else:
                pen = "M"
        self.marks.append(f'<path class="line {style}" d="{"".join(path)}"/>')

    def points(self, xs: Sequence[float], ys: Sequence[float], style: str) -> None:
        """Dots, as one path of strokes without length."""
        dots = "".join(f"M{x:.1f} {y:.1f}h0" for x, y in self.at(xs, ys).tolist())
        self.marks.append(f'<path class="dots {style}" d="{dots}"/>')

    def bars(self, edges: Sequence[float], tops: Sequence[float], style: str) -> None:
        """One bar between each two edges, from the axis up to `tops`."""
        lefts = self.at(edges[:-1], tops).tolist()
        rights = self.at(edges[1:], tops).tolist()
        floor = HEIGHT - BOTTOM
        path = "".join(
            f"M{x0 + 0.5:.1f} {floor}V{y:.1f}H{x1 - 0.5:.1f}V{floor}z"
            for (x0, y), (x1, _) in zip(lefts, rights, strict=True)
            if math.isfinite(y) and y < floor
        )
        self.marks.append(f'<path class="bars {style}" d="{path}"/>')

    def svg(self, alt: str) -> Markup:
        """The chart; `alt` says in words what it shows."""
        right, floor = WIDTH - RIGHT, HEIGHT - BOTTOM
        parts = [
            f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img"'
            f' aria-label="{escape(alt)}"><g class="axes">'
        ]
        for tick in self.y.ticks():
            y = self.at(self.x.low, tick)[1]
            parts.append(f'<path d="M{LEFT} {y:.1f}H{right}"/>')
            label = escape(self.y.label(tick))
            parts.append(
                f'<text x="{LEFT - 6}" y="{y + 4:.1f}" class="end">{label}</text>'
            )
        for tick in self.x.ticks():
            x = self.at(tick, self.y.low)[0]
            label = escape(self.x.label(tick))
            parts.append(f'<path d="M{x:.1f} {floor}v4"/>')
            parts.append(
                f'<text x="{x:.1f}" y="{floor + 17}" class="middle">{label}</text>'
            )
        middle = (LEFT + right) / 2
        parts.append(f'<path class="base" d="M{LEFT} {floor}H{right}"/>')
        parts.append(
            f'<text x="{middle}" y="{HEIGHT - 6}" class="middle name">'
            f"{escape(self.x_label)}</text>"
        )
        if self.y_label:
            parts.append(f'<text y="10" class="name">{escape(self.y_label)}</text>')
        return Markup("".join([*parts, "</g>", *self.marks, "</svg>"]))


def sparkline(series: np.ndarray, alt: str, points: int = 240) -> Markup:
    """A float (t, c) series as lines without axes, at most four channels of it.

    Each pixel column keeps its lowest and highest value, so that peaks survive.
    """
    series = np.asarray(series, np.float64)
    series = series.reshape(len(series), -1)[:, :4]
    finite = series[np.isfinite(series)]
    low, high = (finite.min(), finite.max()) if finite.size else (0.0, 1.0)
    span = (high - low) or 1.0
    lines = []
    for c, channel in enumerate(series.T):
        parts = np.array_split(np.arange(len(channel)), min(points // 2, len(channel)))
        kept = {int(p[i(channel[p])]) for p in parts for i in (np.argmin, np.argmax)}
        kept = sorted(kept | {0, len(channel) - 1})
        across = np.array(kept) / max(len(channel) - 1, 1) * 200
        down = 96 - (channel[kept] - low) / span * 92
        path = "L".join(
            f"{x:.1f} {y:.1f}"
            for x, y in zip(across, down, strict=True)
            if math.isfinite(y)
        )
        if path:
            lines.append(f'<path class="line c{c}" d="M{path}"/>')
    return Markup(
        '<svg class="spark" viewBox="0 0 200 100" preserveAspectRatio="none"'
        f' role="img" aria-label="{escape(alt)}">{"".join(lines)}</svg>'
    )

"""The report's figures for a regression: values, errors, and whole examples."""

from collections.abc import Sequence

import numpy as np
from markupsafe import Markup, escape

from convnet.report_figures import Figure, picture
from convnet.report_svg import Plot, Scale, number, sparkline

SHOWN = 1500  # dots in a scatter plot


def figures(labels: np.ndarray, predictions: np.ndarray) -> list[Figure]:
    """Predicted against true values, and the errors."""
    truth = np.asarray(labels, np.float64).ravel()
    guess = np.asarray(predictions, np.float64).ravel()
    finite = np.isfinite(truth) & np.isfinite(guess)
    truth, guess = truth[finite], guess[finite]
    if not truth.size:
        return []
    few = np.arange(len(truth))
    if len(few) > SHOWN:
        few = np.sort(np.random.default_rng(0).choice(len(few), SHOWN, replace=False))
    both = Scale.around(np.concatenate([truth[few], guess[few]]))
    plot = Plot(both, both, "truth", "prediction")
    plot.points(truth[few], guess[few], "a")
    plot.line([both.low, both.high], [both.low, both.high], "guide")
    scatter = Figure(
        "Prediction against truth",
        plot.svg("Predictions against the truth"),
        "Every dot is one value; a perfect model puts all of them on the dashed line."
        + (f" {SHOWN:,} of {len(truth):,} are drawn." if len(truth) > SHOWN else ""),
    )
    errors = guess - truth
    # The middle 99.8%: one outlier must not squeeze all others into one bar.
    low, high = np.quantile(errors, [0.001, 0.999])
    span = Scale.around([low, high])
    edges = np.linspace(span.low, span.high, 32)
    counts = np.histogram(errors, edges)[0]
    plot = Plot(span, Scale.around(counts, zero=True), "prediction − truth", "values")
    plot.bars(edges, counts, "a see")
    plot.line([0, 0], [plot.y.low, plot.y.high], "guide")
    outside = len(errors) - int(counts.sum())
    mean = number(errors.mean())
    histogram = Figure(
        "Errors",
        plot.svg(f"Histogram of errors, mean {mean}"),
        "A narrow heap around zero (dashed) is good; a heap beside zero means that the"
        " model is always too high or too low."
        + (f" {outside:,} of {len(errors):,} values lie outside." if outside else ""),
        [("a", f"mean error {mean}")],
    )
    return [scatter, histogram]


def examples(
    ids: Sequence[str],
    labels: np.ndarray,
    predictions: np.ndarray,
    losses: np.ndarray,
) -> list[Figure]:
    """Truth, prediction and difference of the best, the median and the worst example.

    labels, predictions: (n, *spatial, outputs): lines for one spatial axis, maps for
    two; of three, the middle slice. The first output is shown. Else no figure.
    """
    finite = np.flatnonzero(np.isfinite(losses))
    if labels.ndim < 3 or not len(finite):
        return []
    order = finite[np.argsort(losses[finite], kind="stable")]
    places = {"Best": 0, "Median": len(order) // 2, "Worst": len(order) - 1}
    found = []
    for name, place in places.items():
        i = order[place]
        title = f"{name} example: {ids[i]}"
        body, legend, note = compare(labels[i], predictions[i], title)
        legend = [*legend, ("plain", f"loss {number(losses[i])}")]
        found.append(Figure(title, body, note, legend))
    return found


def compare(
    truth: np.ndarray, guess: np.ndarray, alt: str
) -> tuple[Markup, list[tuple[str, str]], str]:
    """(picture, legend, how to read it) of one target (*spatial, outputs) and its
    prediction."""
    truth, guess = (np.asarray(a, np.float64)[..., 0] for a in (truth, guess))
    while truth.ndim > 2:
        truth, guess = truth[len(truth) // 2], guess[len(guess) // 2]
    if truth.ndim == 1:
        lines = sparkline(np.stack([truth, guess], -1), alt)
        return lines, [("a", "truth"), ("b", "prediction")], "Both share one scale."
    note = (
        "Truth and prediction share one scale. Red: predicted too high, blue: too low."
    )
    return maps(truth, guess, alt), [], note


def maps(truth: np.ndarray, guess: np.ndarray, alt: str) -> Markup:
    """Three float (h, w) maps in colour: truth and prediction on one scale, and their
    difference on a scale around zero."""
    from matplotlib import colormaps

    both = np.concatenate([truth.ravel(), guess.ravel()])
    low, high = float(np.nanmin(both)), float(np.nanmax(both))
    most = float(np.nanmax(np.abs(guess - truth)))
    panels = []
    for name, field, bottom, top, colours in (
        ("truth", truth, low, high, "viridis"),
        ("prediction", guess, low, high, "viridis"),
        ("difference", guess - truth, -most, most, "RdBu_r"),
    ):
        shares = (field - bottom) / ((top - bottom) or 1.0)
        uri = picture(colormaps[colours](shares, bytes=True)[..., :3])
        crisp = ' class="crisp"' if max(field.shape) <= 96 else ""
        span = escape(f"{number(bottom, 3)} to {number(top, 3)}")
        panels.append(
            f'<div><img src="{uri}" alt="{escape(alt)}: {name}, {span}"{crisp}>'
            f"<b>{name}</b><small>{span}</small></div>"
        )
    return Markup(f'<div class="maps">{"".join(panels)}</div>')

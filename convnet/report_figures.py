"""The report's figures: each one a picture, a legend and a sentence how to read it."""

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from convnet import metrics
from convnet.report_svg import Plot, Scale, number, percent

PAIRS = 30  # confusions listed where there are too many classes for a matrix


@dataclass(frozen=True)
class Figure:
    """body: SVG or HTML. note: how to read it. legend: (CSS class, text) pairs."""

    title: str
    body: Markup
    note: str
    legend: Sequence[tuple[str, str]] = ()


def whole_percent(share: float) -> str:
    return f"{100 * share:.6g}%"


def picture(image: np.ndarray, limit: int = 192) -> str:
    """A data URI of a uint8 (h, w, c) image: PNG while small, else JPEG of at most
    `limit` pixels a side. Of channels that are neither 1 nor 3 the first is shown."""
    from PIL import Image

    image = np.asarray(image)
    image = image if image.shape[-1] == 3 else image[..., 0]
    pillow = Image.fromarray(np.ascontiguousarray(image))
    small = max(pillow.size) <= 64
    pillow.thumbnail((limit, limit))
    buffer = io.BytesIO()
    kind, options = ("png", {"optimize": True}) if small else ("jpeg", {"quality": 82})
    pillow.save(buffer, kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def recorded(history: list[dict], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of a metric; nan where the run logged no number."""
    rows = [(row["step"], row[key]) for row in history if key in row]
    values = [math.nan if value is None else float(value) for _, value in rows]
    return np.array([step for step, _ in rows], np.float64), np.array(values)


def thin(
    steps: np.ndarray, values: np.ndarray, most: int = 200
) -> tuple[np.ndarray, np.ndarray]:
    """At most `most` points, each the mean of its neighbours. A part that holds only
    nan stays nan."""
    if len(steps) <= most:
        return steps, values
    means = []
    for part in np.array_split(values, most):
        finite = part[np.isfinite(part)]
        means.append(finite.mean() if finite.size else math.nan)
    return np.array([p.mean() for p in np.array_split(steps, most)]), np.array(means)


def curve(
    history: list[dict],
    title: str,
    keys: Mapping[str, str],
    note: str,
    shares: bool = False,
    log: bool = False,
) -> Figure | None:
    """Metrics over steps; `keys` maps a metric's key to its name. None if none is
    recorded. With `log`, values that span more than a factor of 30 get a log axis."""
    lines = {key: recorded(history, key) for key in keys}
    lines = {key: line for key, line in lines.items() if len(line[0])}
    if not lines:
        return None
    drawn = {key: thin(*line) for key, line in lines.items()}
    steps = np.concatenate([s for s, _ in drawn.values()])
    values = np.concatenate([v for _, v in drawn.values()])
    finite = values[np.isfinite(values)]
    log = bool(log and finite.size and finite.min() > 0)
    log = log and finite.max() > 30 * finite.min()
    show = percent if shares else number
    plot = Plot(
        Scale(float(min(steps.min(), 0)), float(max(steps.max(), 1))),
        Scale.around(values, log=log, **({"label": whole_percent} if shares else {})),
        "step",
        f"{title.lower()}, log scale" if log else title.lower(),
    )
    legend, words = [], []
    for key, (xs, ys) in drawn.items():
        style = "b" if key.startswith("test/") else "a"
        plot.line(xs, ys, style)
        if len(xs) == 1 or (style == "b" and len(xs) <= 60):
            keep = np.isfinite(ys)
            plot.points(xs[keep], ys[keep], style)
        last = show(lines[key][1][-1])
        legend.append((style, f"{keys[key]} {last}"))
        words.append(f"{keys[key]} ends at {last}")
    if len(finite) < len(values):
        note += " Where a line breaks off, the run logged something that is no number."
    return Figure(title, plot.svg(f"{title} by step: {', '.join(words)}"), note, legend)


def curves(history: list[dict]) -> list[Figure]:
    both = {"train": "training", "test": "test"}
    found = [
        curve(
            history,
            "Loss",
            {f"{part}/loss": name for part, name in both.items()},
            "Lower is better. When the test line turns upwards while the training line"
            " still falls, the model is learning its training examples by heart.",
            log=True,
        ),
        curve(
            history,
            "Accuracy",
            {f"{part}/accuracy": name for part, name in both.items()},
            "The share of examples that were answered correctly. Training examples are"
            " often altered (flipped, cropped), which makes them the harder ones.",
            shares=True,
        ),
        curve(
            history,
            "Learning rate",
            {"learning_rate": "learning rate"},
            "How large a step the optimizer takes; large steps explore, small ones at"
            " the end settle.",
        ),
    ]
    return [figure for figure in found if figure]


def reliability(confidences: np.ndarray, correct: np.ndarray) -> Figure:
    found = metrics.calibration(confidences, correct)
    plot = Plot(
        Scale(0, 1, label=whole_percent),
        Scale(0, 1, label=whole_percent),
        "confidence",
        "accuracy",
    )
    rows = found["bins"]
    edges = [row["low"] for row in rows] + [1.0]
    plot.bars(edges, [row["accuracy"] for row in rows], "a soft")
    for row in rows:
        if row["count"]:
            hits = round(row["accuracy"] * row["count"])
            middle = (row["low"] + row["high"]) / 2
            interval = metrics.wilson(hits, row["count"])
            plot.line([middle, middle], interval, "a thin")
    plot.line([0, 1], [0, 1], "guide")
    gap = float(confidences.mean() - correct.mean())
    verdict = ""
    if abs(gap) > 0.01:
        verdict = f" On the whole this model is too {'sure' if gap > 0 else 'modest'}."
    return Figure(
        "Calibration",
        plot.svg(
            "Accuracy by confidence in 15 bins, expected calibration error "
            f"{percent(found['ece'])}"
        ),
        "Of the answers given with 80% confidence, 80% should be right: then the bars"
        " end on the dashed line. Below it the model is too sure of itself, above it"
        f" too modest.{verdict} The expected calibration error (ECE) is the mean"
        " distance to the line; the fine lines are 95% intervals.",
        [("a", f"ECE {percent(found['ece'])}")],
    )


def confidence_histogram(confidences: np.ndarray, correct: np.ndarray) -> Figure:
    edges = np.linspace(0, 1, 21)
    right = np.histogram(confidences[correct], edges)[0]
    wrong = np.histogram(confidences[~correct], edges)[0]
    plot = Plot(
        Scale(0, 1, label=whole_percent),
        Scale.around(right + wrong, zero=True),
        "confidence",
        "examples",
    )
    plot.bars(edges, right + wrong, "a")
    plot.bars(edges, wrong, "b")
    return Figure(
        "Confidence",
        plot.svg(
            f"Histogram of confidences: {len(confidences):,} answers, of them"
            f" {wrong.sum():,} wrong"
        ),
        "How sure the model was of its answers. Wrong answers (stacked below the right"
        " ones) should lie to the left: then a low confidence is a warning.",
        [("a", f"right {right.sum():,}"), ("b", f"wrong {wrong.sum():,}")],
    )


def binary(
    labels: np.ndarray, probabilities: np.ndarray, classes: Sequence[str]
) -> list[Figure]:
    """Probabilities of both classes, and precision against recall."""
    negative, positive = classes
    edges = np.linspace(0, 1, 26)
    yes = np.histogram(probabilities[labels == 1], edges)[0]
    no = np.histogram(probabilities[labels == 0], edges)[0]
    plot = Plot(
        Scale(0, 1, label=whole_percent),
        Scale.around([*yes, *no], zero=True),
        f"probability of “{positive}”",
        "examples",
    )
    plot.bars(edges, no, "a see")
    plot.bars(edges, yes, "b see")
    plot.line([0.5, 0.5], [plot.y.low, plot.y.high], "guide")
    found = [
        Figure(
            "Probabilities of both classes",
            plot.svg(f"Histograms of the probability of {positive} for both classes"),
            "Two separate heaps, one at each end, are what you want; where they"
            " overlap, the model cannot tell the classes apart. Right of the dashed"
            f" line (50%) the answer is “{positive}”.",
            [("a", f"{negative} ({no.sum():,})"), ("b", f"{positive} ({yes.sum():,})")],
        )
    ]
    if 0 < labels.sum() < len(labels):
        found.append(precision_recall(labels, probabilities, positive))
    return found


def precision_recall(
    labels: np.ndarray, probabilities: np.ndarray, positive: str
) -> Figure:
    from sklearn.metrics import precision_recall_curve

    precision, recall, thresholds = precision_recall_curve(labels, probabilities)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    best = int(f1[:-1].argmax())
    said, hits = probabilities > 0.5, (probabilities > 0.5) & (labels == 1)
    at_half = (hits.sum() / max(said.sum(), 1), hits.sum() / labels.sum())
    kept = np.unique(np.linspace(0, len(recall) - 1, 300).round().astype(int))
    plot = Plot(
        Scale(0, 1, label=whole_percent),
        Scale(0, 1, label=whole_percent),
        "recall",
        "precision",
    )
    plot.line(recall[kept], precision[kept], "b")
    share = labels.mean()
    plot.line([0, 1], [share, share], "guide")
    plot.points(at_half[1:], at_half[:1], "a big")
    average = metrics.average_precision(labels, probabilities)
    return Figure(
        "Precision and recall",
        plot.svg(
            f"Precision against recall, average precision {number(average)};"
            f" at threshold 50% precision {percent(at_half[0])}, recall"
            f" {percent(at_half[1])}"
        ),
        f"Recall: how many of all “{positive}” were found; precision: how many of those"
        " found are right. A higher threshold trades recall for precision. At 50% (the"
        f" dot) recall is {percent(at_half[1], 1)}, precision {percent(at_half[0], 1)}."
        f" F1 is highest at a threshold of {percent(thresholds[best], 1)}, but choose"
        " a threshold on validation examples, not on these. Dashed: guessing.",
        [("b", f"average precision {number(average)}"), ("a", "threshold 50%")],
    )


def matrix(counts: np.ndarray, names: list[str]) -> list[dict]:
    """Rows of the confusion matrix: counts and how strongly to colour each (0 to 1)."""
    totals = np.maximum(counts.sum(1, keepdims=True), 1)
    # The root brings out rare confusions beside the diagonal.
    shades = np.sqrt(counts / totals).round(3)
    return [
        {"name": name, "cells": list(zip(row.tolist(), shade.tolist(), strict=True))}
        for name, row, shade in zip(names, counts, shades, strict=True)
    ]


def pairs(counts: np.ndarray, names: list[str]) -> list[dict]:
    """The most frequent confusions, and their share of the true class's examples."""
    wrong = counts - np.diag(np.diag(counts))
    order = np.argsort(-wrong, axis=None, kind="stable")[:PAIRS]
    found = []
    for true, predicted in zip(*np.unravel_index(order, wrong.shape), strict=True):
        count = int(wrong[true, predicted])
        if count:
            share = percent(count / counts[true].sum(), 1)
            found.append(
                {
                    "label": names[true],
                    "predicted": names[predicted],
                    "count": count,
                    "share": share,
                }
            )
    return found

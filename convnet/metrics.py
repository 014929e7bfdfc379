"""What an evaluation says: intervals, confusions, calibration, errors (NumPy only)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What a model answered on a test set of n examples, each exactly once.

    ids: n names. losses: float (n,).
    classification: labels int (n,), probabilities float (n, k).
    binary: labels int (n,), 1 is the positive class; probabilities float (n,) of it.
    regression: labels float (n, *target), predictions of the same shape; the last
    axis of a target are its outputs. `baseline` maps the name of a reference method
    (for example "persistence") to its mean squared error on the same examples.
    """

    ids: list[str]
    labels: np.ndarray
    losses: np.ndarray
    probabilities: np.ndarray | None = None
    predictions: np.ndarray | None = None
    baseline: Mapping[str, float] = field(default_factory=dict)


def wilson(successes: float, n: float, z: float = 1.96) -> tuple[float, float]:
    """Score interval (low, high) for the probability behind `successes` of `n`.

    Unlike the textbook p +- z sqrt(p (1 - p) / n) it stays inside 0..1 and is sound for
    small n and for shares near 0 and 1. z = 1.96 is 95%. n = 0 gives (0, 1).
    Wilson (1927), "Probable inference, the law of succession, and statistical
    inference".
    """
    if not 0 <= successes <= n:
        raise ValueError(f"successes must lie in 0..{n}, got {successes}")
    if n == 0:
        return 0.0, 1.0
    share, z2 = successes / n, z * z
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = z * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    # At 0 and n the exact bound is 0 and 1; rounding would leave it a hair beside.
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == n else min(1.0, centre + half)
    return low, high


def confusion(
    labels: np.ndarray,
    predictions: np.ndarray,
    k: int,
    weights: np.ndarray | None = None,
) -> np.ndarray:
    """Counts of (truth, prediction): int64 (k, k), rows are the truth.

    labels, predictions: int (n,) in 0..k-1. weights: bool or int (n,), how often each
    example counts; rows of weight 0 (padding, unreadable images) may hold anything.
    """
    labels, predictions = np.asarray(labels), np.asarray(predictions)
    if weights is None:
        weights = np.ones(labels.shape, np.int64)
    weights = np.asarray(weights)
    if weights.dtype.kind not in "bui":
        raise ValueError(f"weights must be whole numbers, got {weights.dtype}")
    kept = weights != 0
    pairs = np.stack([labels[kept], predictions[kept]]).astype(np.int64)
    if pairs.size and (pairs.min() < 0 or pairs.max() >= k):
        raise ValueError(f"class {pairs.min()}..{pairs.max()} outside 0..{k - 1}")
    counts = np.zeros((k, k), np.int64)
    np.add.at(counts, tuple(pairs), weights[kept].astype(np.int64))
    return counts


def per_class(confusion: np.ndarray) -> list[dict]:
    """Recall with its 95% Wilson interval, precision and count of each of k classes.

    confusion: int (k, k), rows are the truth. Recall is nan for a class without
    examples, precision is nan for a class that was never predicted.
    """
    rows = []
    for i, (truth, predicted) in enumerate(
        zip(confusion.sum(1).tolist(), confusion.sum(0).tolist(), strict=True)
    ):
        hits = int(confusion[i, i])
        rows.append(
            {
                "recall": hits / truth if truth else math.nan,
                "interval": wilson(hits, truth),
                "precision": hits / predicted if predicted else math.nan,
                "count": truth,
            }
        )
    return rows


def calibration(confidences: np.ndarray, correct: np.ndarray, bins: int = 15) -> dict:
    """Expected calibration error and reliability diagram, equal-width bins.

    confidences: float (n,), the probability of the predicted class. correct: bool (n,).
    Bins are (low, high], the first one holds 0 as well. Returns {"ece", "bins":
    [{"low", "high", "confidence", "accuracy", "count"}]}; the means of an empty bin are
    nan, and so is the error of no examples. Raises ValueError for a confidence that is
    no number.
    Guo et al. (2017), "On calibration of modern neural networks", equation 3.
    """
    confidences = np.asarray(confidences, np.float64)
    correct = np.asarray(correct, np.float64)
    if not np.isfinite(confidences).all():
        raise ValueError("confidences must be finite")
    # float32 softmax may exceed 1 by a rounding error.
    confidences = confidences.clip(0, 1)
    edges = np.linspace(0, 1, bins + 1)
    places = np.searchsorted(edges, confidences, side="left").clip(1, bins) - 1
    rows, gap = [], 0.0
    for i in range(bins):
        inside = places == i
        count = int(inside.sum())
        confidence = float(confidences[inside].mean()) if count else math.nan
        accuracy = float(correct[inside].mean()) if count else math.nan
        if count:
            gap += count * abs(accuracy - confidence)
        rows.append(
            {
                "low": float(edges[i]),
                "high": float(edges[i + 1]),
                "confidence": confidence,
                "accuracy": accuracy,
                "count": count,
            }
        )
    n = len(confidences)
    return {"ece": gap / n if n else math.nan, "bins": rows}


def average_precision(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """Area under precision against recall, as a sum of steps; nan without positives.

    labels: (n,) 0 or 1. probabilities: float (n,) of the positive class.
    """
    if not np.any(labels):
        return math.nan
    from sklearn.metrics import average_precision_score

    return float(average_precision_score(labels, probabilities))


def regression(labels: np.ndarray, predictions: np.ndarray) -> dict:
    """{"mse", "rmse", "r2", "outputs": [{"mse", "rmse", "r2"}, ...]} in float64.

    labels, predictions: float (n,) or (n, *spatial, outputs). The mean runs over
    examples and places. r2 is 1 - residual / total sum of squares, each output against
    its own mean and all outputs pooled (weighted by variance); nan where the truth is
    constant.
    """
    labels = np.asarray(labels, np.float64)
    predictions = np.asarray(predictions, np.float64)
    if labels.shape != predictions.shape:
        raise ValueError(f"labels {labels.shape}, predictions {predictions.shape}")
    outputs = labels.shape[-1] if labels.ndim > 1 else 1
    truth, guess = labels.reshape(-1, outputs), predictions.reshape(-1, outputs)
    if not truth.size:
        empty = {"mse": math.nan, "rmse": math.nan, "r2": math.nan}
        return {**empty, "outputs": [dict(empty) for _ in range(outputs)]}
    residual = np.square(guess - truth).sum(0)
    total = np.square(truth - truth.mean(0)).sum(0)

    def scores(residual: float, total: float, count: int) -> dict:
        mse = float(residual / count)
        r2 = float(1 - residual / total) if total > 0 else math.nan
        return {"mse": mse, "rmse": math.sqrt(mse), "r2": r2}

    each = [scores(r, t, len(truth)) for r, t in zip(residual, total, strict=True)]
    return {**scores(residual.sum(), total.sum(), truth.size), "outputs": each}

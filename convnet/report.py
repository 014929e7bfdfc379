"""One HTML page that says what a run did: it needs no network and no other file."""

import base64
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from markupsafe import Markup

from convnet import files, metrics, report_figures, report_regression, report_style
from convnet.metrics import Evaluation
from convnet.report_svg import duration, number, percent, size, sparkline

GALLERY = 64  # pictures of the augmented batch
LISTED = 1000  # unreadable inputs named in the page
MATRIX = 20  # classes up to which the confusion matrix is drawn
WORST = 20  # classes shown unfolded


@dataclass(frozen=True, eq=False)
class Mistake:
    """One example that the model got most wrong.

    label, predicted: a class (its index or name), or in regression a number or array;
    of a style network "" and the picture uint8 (h, w, 3) that it made. probability: of
    the predicted class (None where there are none). image: uint8 (h, w, c),
    or series: float (t, c), or neither.
    """

    id: str
    label: Any
    predicted: Any
    probability: float | None = None
    image: np.ndarray | None = None
    series: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class Report:
    """Everything that the page shows.

    classes: k names; in binary (negative, positive); else empty.
    config: nested and resolved. changed: dotted key -> value where it differs from the
    default. environment: versions, devices, threads. command: reproduces the run.
    result: as in result.json. history: the rows of metrics.jsonl, "step" and any of
    "train/loss", "test/loss", "train/accuracy", "test/accuracy", "learning_rate",
    "images_per_second", "input_wait" (share of the time, 0 to 1). skipped: (id, reason)
    of unreadable inputs. augmented: uint8 (n, h, w, c), c 1 or 3, with a caption each.
    summary: the model's table as plain text.
    """

    title: str
    task: Literal["classification", "binary", "regression", "style"]
    classes: tuple[str, ...]
    config: dict
    changed: dict[str, Any]
    environment: dict[str, str]
    command: str
    result: dict
    history: list[dict]
    evaluation: Evaluation
    skipped: Sequence[tuple[str, str]] = ()
    augmented: np.ndarray | None = None
    augmented_labels: Sequence[str] = ()
    summary: str = ""
    mistakes: Sequence[Mistake] = field(default_factory=list)


def write(path: Path, contents: Report) -> None:
    """Renders the page and puts it at `path` in one move: a reader sees the old page or
    the new one, and a failure leaves the old one. Equal contents give equal bytes.
    """
    # A file name need not be text: what UTF-8 cannot hold is shown as an escape.
    page = render(contents).encode("utf-8", "backslashreplace")
    files.write(Path(path), page)


def render(contents: Report) -> str:
    """The page as text."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "percent": percent}
    script = environment.get_template("report.js").render()
    # Only this script may run, whatever a class name or a path contains.
    digest = hashlib.sha256(script.encode()).digest()
    return environment.get_template("report.html").render(
        report=contents,
        script=Markup(script),
        script_hash=base64.b64encode(digest).decode(),
        curves=report_figures.curves(contents.history),
        **_KINDS.get(contents.task, classes)(contents),
        mistakes=[mistake(m, contents) for m in contents.mistakes],
        gallery=gallery(contents),
        listed=LISTED,
        changed={key: text(value) for key, value in contents.changed.items()},
        config=text(contents.config, indent=2),
        result=text(contents.result, indent=2),
    )


def text(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, indent=indent, ensure_ascii=False, default=str)


def common_tiles(contents: Report) -> list[tuple[str, str, str]]:
    """(name, figure, remark) of the tiles of every task: loss, speed, time, size."""
    result, losses = contents.result, contents.evaluation.losses
    tiles = []
    if len(losses):
        remark = "the mean over test examples; lower is better"
        tiles.append(("Test loss", number(np.mean(losses, dtype=np.float64)), remark))
    if "train/images_per_second" in result:
        waits = report_figures.recorded(contents.history, "input_wait")[1]
        waits = waits[np.isfinite(waits)]
        remark = "while training"
        if len(waits):
            remark += f", {percent(waits.mean(), 1)} of the time waiting for data"
        speed = number(result["train/images_per_second"], 3)
        tiles.append(("Examples per second", speed, remark))
    if "train/seconds" in result:
        remark = "without compilation"
        if "compile/seconds" in result:
            remark = f"and {duration(result['compile/seconds'])} to compile"
        tiles.append(("Training time", duration(result["train/seconds"]), remark))
    if "params/count" in result:
        remark = f"{result['params/count']:,} numbers that were learned"
        tiles.append(("Parameters", size(result["params/count"]), remark))
    return tiles


def classes(contents: Report) -> dict:
    """What the template needs to show a classification, of two or more classes."""
    evaluation, binary = contents.evaluation, contents.task == "binary"
    probabilities = np.asarray(evaluation.probabilities, np.float64)
    labels = np.asarray(evaluation.labels).astype(np.int64)
    numbers = np.isfinite(probabilities if binary else probabilities.sum(-1))
    invalid = int((~numbers).sum())
    frequent = np.bincount(labels).max() / len(labels) if len(labels) else 0.0
    labels, probabilities = labels[numbers], probabilities[numbers]
    if binary:
        predicted = (probabilities > 0.5).astype(np.int64)
        confidences = np.maximum(probabilities, 1 - probabilities)
        k = 2
    else:
        predicted, confidences = probabilities.argmax(-1), probabilities.max(-1)
        k = probabilities.shape[-1]
    names = list(contents.classes) or [str(i) for i in range(k)]
    correct = predicted == labels
    n, hits = len(numbers), int(correct.sum())
    tiles, figures = [], []
    if n:
        low, high = (percent(bound) for bound in metrics.wilson(hits, n))
        remark = f"{hits:,} of {n:,} right; 95% interval {low} to {high}"
        tiles.append(("Test accuracy", percent(hits / n), remark))
    if len(labels):
        if binary:
            average = number(metrics.average_precision(labels, probabilities))
            remark = f"of finding “{names[1]}”; 1 is perfect"
            tiles.append(("Average precision", average, remark))
            figures += report_figures.binary(labels, probabilities, names)
        figures.append(report_figures.reliability(confidences, correct))
        if not binary:
            figures.append(report_figures.confidence_histogram(confidences, correct))
    counts = metrics.confusion(labels, predicted, k)
    rows = [
        {"name": name, **row}
        for name, row in zip(names, metrics.per_class(counts), strict=True)
        if row["count"]
    ]
    rows.sort(key=lambda row: row["recall"])
    return {
        "tiles": tiles + common_tiles(contents),
        "invalid": invalid,
        "majority": percent(frequent),
        "rows": rows,
        "worst": WORST if len(rows) > WORST else len(rows),
        "matrix": report_figures.matrix(counts, names) if rows and k <= MATRIX else [],
        "pairs": report_figures.pairs(counts, names) if k > MATRIX else [],
        "names": names,
        "figures": figures,
        "examples": [],
        "baselines": [],
        "outputs": [],
    }


def regression(contents: Report) -> dict:
    """What the template needs to show a regression."""
    evaluation = contents.evaluation
    labels = np.asarray(evaluation.labels, np.float64)
    predictions = np.asarray(evaluation.predictions, np.float64)
    finite = np.isfinite(predictions).reshape(len(predictions), -1).all(-1)
    tiles, figures, examples, baselines, outputs = [], [], [], [], []
    if finite.any():
        scores = metrics.regression(labels[finite], predictions[finite])
        remark = "the size of a typical error, in the target's own unit"
        tiles.append(("Test RMSE", number(scores["rmse"]), remark))
        remark = "share of the variance that is explained; 1 is perfect"
        tiles.append(("R²", number(scores["r2"]), remark))
        figures = report_regression.figures(labels, predictions)
        examples = report_regression.examples(
            [name for name, good in zip(evaluation.ids, finite, strict=True) if good],
            labels[finite],
            predictions[finite],
            np.asarray(evaluation.losses)[finite],
        )
        outputs = scores["outputs"]
        baselines = [("this model", scores["mse"]), *evaluation.baseline.items()]
    largest = max([mse for _, mse in baselines], default=0.0) or 1.0
    return {
        "tiles": tiles + common_tiles(contents),
        "invalid": int((~finite).sum()),
        "outputs": outputs,
        "rows": [],
        "matrix": [],
        "pairs": [],
        "figures": figures,
        "examples": examples,
        "baselines": [(name, mse, mse / largest) for name, mse in baselines],
    }


def style(contents: Report) -> dict:
    """What the template needs to show a style network."""
    nothing = ("outputs", "rows", "matrix", "pairs", "figures", "examples", "baselines")
    return {
        "tiles": report_style.tiles(contents.result) + common_tiles(contents),
        "invalid": int((~np.isfinite(contents.evaluation.losses)).sum()),
        **dict.fromkeys(nothing, ()),
    }


_KINDS = {"regression": regression, "style": style}


def mistake(example: Mistake, contents: Report) -> dict:
    """One card of the gallery of mistakes."""

    def named(value: Any) -> str:
        if isinstance(value, str):
            return value
        if contents.task == "style":
            return ""
        if contents.task != "regression":
            return contents.classes[int(value)] if contents.classes else str(int(value))
        values = np.asarray(value, np.float64).ravel()
        return ", ".join(number(v) for v in values) if values.size <= 4 else ""

    label, predicted = named(example.label), named(example.predicted)
    alt = f"{example.id}: truth {label}, predicted {predicted}"
    image, drawing = example.image, None
    if contents.task == "style":
        drawing = report_style.before_and_after(image, example.predicted)
        image = None
    elif example.series is not None:
        drawing = sparkline(example.series, alt)
    elif image is None and np.ndim(example.label) >= 2:
        drawing = report_regression.compare(example.label, example.predicted, alt)[0]
    return {
        "id": example.id,
        "label": label,
        "predicted": predicted,
        "probability": example.probability,
        "alt": alt,
        "image": None if image is None else report_figures.picture(image),
        "crisp": image is not None and max(image.shape[:2]) <= 64,
        "drawing": drawing,
    }


def gallery(contents: Report) -> dict | None:
    """The augmented batch; None where its inputs are no pictures."""
    images = contents.augmented
    if images is None or not len(images):
        return None
    labels = [*contents.augmented_labels, *[""] * len(images)]
    return {
        "pictures": [
            (report_figures.picture(image, limit=128), label)
            for image, label in zip(images[:GALLERY], labels, strict=False)
        ],
        "total": len(images),
        "crisp": max(images.shape[1:3]) <= 64,
    }

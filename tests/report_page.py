"""What the tests of the report share: runs to report on, and a reader of the page."""

import base64
import dataclasses
import io
from html.parser import HTMLParser

import numpy as np
from PIL import Image

from convnet import report
from convnet.metrics import Evaluation
from convnet.report import Report

VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """Elements in order, each (tag, attributes, [its whole text]); checks nesting."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements, self.open = [], []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        element = (tag, dict(attrs), [])
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs), []))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        for element in self.open:
            element[2].append(data)

    def find(self, tag: str, **wanted: str) -> list[tuple[dict, str]]:
        """(attributes, text) of elements; `cls` asks for one of the classes."""
        cls = wanted.pop("cls", None)
        return [
            (attrs, "".join(text).strip())
            for name, attrs, text in self.elements
            if name == tag
            and all(attrs.get(key) == value for key, value in wanted.items())
            and (cls is None or cls in (attrs.get("class") or "").split())
        ]

    def tiles(self) -> dict[str, tuple[str, str]]:
        names = [text for _, text in self.find("dt")]
        figures = [text for _, text in self.find("div", cls="figure")]
        remarks = [text for _, text in self.find("small")][: len(names)]
        return dict(zip(names, zip(figures, remarks, strict=True), strict=True))


def classification(k: int, n: int, **changes) -> Report:
    rng = np.random.default_rng(k)
    labels = rng.integers(0, k, n).astype(np.int32)
    logits = rng.normal(size=(n, k))
    logits[np.arange(n), labels] += 2
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    contents = Report(
        title="A run",
        task="classification",
        classes=tuple(f"name {i}" for i in range(k)),
        config={"optimizer": {"lr": 0.25}, "model": {"widths": (8, 16)}},
        changed={"optimizer.lr": 0.25},
        environment={"jax": "1.2.3"},
        command="python -m convnet.main --config='a b.py'",
        result={
            "params/count": 1234567,
            "train/images_per_second": 4567.8,
            "train/seconds": 192.4,
            "compile/seconds": 14.2,
        },
        history=[
            {"step": 10, "train/loss": 2.0, "learning_rate": 0.1, "input_wait": 0.02},
            {"step": 20, "train/loss": 1.0, "learning_rate": 0.0, "input_wait": 0.04},
            {"step": 20, "test/loss": 1.5, "test/accuracy": 0.625},
        ],
        evaluation=Evaluation(
            ids=[f"test/{i}" for i in range(n)],
            labels=labels,
            losses=-np.log(probabilities[np.arange(n), labels]),
            probabilities=probabilities.astype(np.float32),
        ),
    )
    return dataclasses.replace(contents, **changes)


def regression(labels: np.ndarray, guesses: np.ndarray, **changes) -> Report:
    n = len(labels)
    losses = np.square(labels - guesses).reshape(n, -1).mean(-1)
    evaluation = Evaluation(
        [f"test/{i}" for i in range(n)],
        labels,
        losses,
        predictions=guesses,
        baseline=changes.pop("baseline", {}),
    )
    return classification(
        2, 1, task="regression", classes=(), evaluation=evaluation, **changes
    )


def parse(contents: Report) -> Page:
    return Page(report.render(contents))


def pixels(uri: str) -> np.ndarray:
    head, data = uri.split(",", 1)
    assert head in ("data:image/png;base64", "data:image/jpeg;base64")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))

"""The report is parsed as a browser would and its numbers are computed again."""

import base64
import dataclasses
import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from report_page import Page, classification, parse, pixels

from convnet import report
from convnet.errors import ConvnetError
from convnet.metrics import Evaluation
from convnet.report import Mistake, Report

HOSTILE = ('<img src=x onerror="alert(1)">', "a\" onmouseover='alert(2)", "</script>&")


@pytest.fixture(scope="module")
def ten() -> Report:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (70, 32, 32, 3), np.uint8)
    mistakes = [Mistake(f"test/{i}", i, 9 - i, 0.987, images[i]) for i in range(10)]
    return classification(
        10,
        800,
        mistakes=mistakes,
        augmented=images,
        augmented_labels=[f"name {i % 10}" for i in range(70)],
        skipped=[("cats/1.jpg", "truncated"), ("cats/2.jpg", "not an image")],
        summary="conv1  (3, 3, 3, 8)",
    )


def test_headline_figures(ten):
    tiles = parse(ten).tiles()
    evaluation = ten.evaluation
    hits = sum(
        int(np.argmax(p) == label)
        for p, label in zip(evaluation.probabilities, evaluation.labels, strict=True)
    )
    share, z, n = hits / 800, 1.96, 800
    low, high = sorted(
        np.roots([1 + z * z / n, -2 * share - z * z / n, share * share]).real
    )
    assert tiles["Test accuracy"] == (
        f"{100 * share:.2f}%",
        f"{hits} of 800 right; 95% interval {100 * low:.2f}% to {100 * high:.2f}%",
    )
    loss = sum(evaluation.losses.tolist()) / n
    assert float(tiles["Test loss"][0]) == pytest.approx(loss, rel=1e-3)
    assert tiles["Examples per second"][0] == "4,568"
    assert "3.0% of the time waiting" in tiles["Examples per second"][1]
    assert tiles["Training time"] == ("3 min 12 s", "and 14.2 s to compile")
    assert tiles["Parameters"] == ("1.23 M", "1,234,567 numbers that were learned")


def test_confusion_matrix_and_classes(ten):
    page = parse(ten)
    counts = np.zeros((10, 10), int)
    guesses = ten.evaluation.probabilities.argmax(-1)
    for label, guess in zip(ten.evaluation.labels, guesses, strict=True):
        counts[label, guess] += 1
    cells = [
        0 if text == "·" else int(text)
        for attrs, text in page.find("td")
        if "--s" in attrs.get("style", "")
    ]
    np.testing.assert_array_equal(np.reshape(cells, (10, 10)), counts)
    hits = [int(text) for _, text in page.find("td", cls="hit")]
    assert hits == np.diag(counts).tolist()
    recall = np.diag(counts) / counts.sum(1)
    rows = [text for _, text in page.find("div", cls="class")][1:]
    for text, i in zip(rows, np.argsort(recall, kind="stable"), strict=True):
        assert text.startswith(f"name {i}{100 * recall[i]:.1f}%")
        assert text.endswith(str(counts[i].sum()))


def test_hundred_classes_fold():
    contents = classification(100, 3000)
    page = parse(contents)
    guesses = contents.evaluation.probabilities.argmax(-1)
    wrong: dict[tuple[int, int], int] = {}
    for pair in zip(contents.evaluation.labels.tolist(), guesses.tolist(), strict=True):
        wrong[pair] = wrong.get(pair, 0) + (pair[0] != pair[1])
    rows = [text for _, text in page.find("tr") if text.endswith("%")]
    cells = [text for _, text in page.find("td")][: 4 * len(rows)]
    found = [cells[i : i + 3] for i in range(0, len(cells), 4)]
    most = sorted(wrong.values(), reverse=True)[:30]
    assert [int(count) for _, _, count in found] == most
    for truth, guess, count in found:
        assert wrong[int(truth.split()[1]), int(guess.split()[1])] == int(count)
    assert not page.find("table", cls="matrix")
    folded = next(text for _, text in page.find("details") if "other 80" in text)
    assert len(page.find("div", cls="class")) == 101  # and the heading
    assert len(re.findall(r"name \d+", folded)) == 80


def test_expected_calibration_error(ten):
    confidences = ten.evaluation.probabilities.max(-1)
    correct = ten.evaluation.probabilities.argmax(-1) == ten.evaluation.labels
    gap = 0.0
    for i in range(15):
        inside = (confidences > i / 15) & (confidences <= (i + 1) / 15)
        gap += abs(correct[inside].sum() - confidences[inside].sum())
    texts = [text for _, text in parse(ten).find("span", cls="a")]
    assert f"ECE {100 * gap / 800:.2f}%" in texts


def test_page_needs_no_network(ten):
    text = report.render(ten)
    page = Page(text)
    assert not page.find("link") and not page.find("iframe")
    for _, attrs, _ in page.elements:
        for name, value in attrs.items():
            assert name not in ("srcset", "action") and not name.startswith("on")
            if name in ("src", "href", "xlink:href"):
                assert value.startswith(("data:image/", "#"))
    assert "url(" not in text and "@import" not in text
    assert text.count("http") == text.count("http-equiv")
    ids = {attrs["id"] for _, attrs, _ in page.elements if "id" in attrs}
    assert {attrs["href"][1:] for attrs, _ in page.find("a")} <= ids
    assert all(attrs["alt"] for attrs, _ in page.find("img"))
    assert all(attrs["aria-label"] for attrs, _ in page.find("svg"))


def test_only_our_script_may_run(ten):
    page = parse(ten)
    [(_, script)] = page.find("script")
    [policy] = [attrs for attrs, _ in page.find("meta") if "http-equiv" in attrs]
    # The browser hashes the element's exact text; ours is neither padded nor stripped.
    exact = re.search(r"<script>(.*?)</script>", report.render(ten), re.S).group(1)
    digest = base64.b64encode(hashlib.sha256(exact.encode()).digest()).decode()
    assert exact.strip() == script
    assert f"script-src 'sha256-{digest}'" in policy["content"]
    assert policy["content"].startswith("default-src 'none'")


def hostile() -> Report:
    return classification(
        3,
        60,
        title=HOSTILE[0],
        classes=HOSTILE,
        skipped=[(HOSTILE[0], HOSTILE[2])],
        mistakes=[Mistake(HOSTILE[2], 0, 1, 0.5, np.zeros((8, 8, 3), np.uint8))],
        augmented=np.zeros((1, 8, 8, 1), np.uint8),
        augmented_labels=[HOSTILE[0]],
        changed={HOSTILE[0]: HOSTILE[2]},
        config={HOSTILE[0]: HOSTILE[2]},
        environment={HOSTILE[0]: HOSTILE[2]},
        result={HOSTILE[0]: HOSTILE[2]},
        command=HOSTILE[2],
        summary=HOSTILE[2],
    )


@pytest.mark.parametrize("task", ["classification", "binary", "regression"])
def test_hostile_text_stays_text(task):
    contents = hostile()
    labels = np.random.default_rng(0).random((4, 6, 6, 1))
    if task == "binary":
        labels = np.arange(60) % 2
        evaluation = Evaluation(
            [""] * 60, labels, np.ones(60), np.linspace(0, 1, 60, dtype=np.float32)
        )
        contents = dataclasses.replace(
            contents, task=task, classes=HOSTILE[:2], evaluation=evaluation
        )
    elif task == "regression":
        evaluation = Evaluation(
            [HOSTILE[0]] * 4, labels, np.ones(4), predictions=labels + 1
        )
        contents = dataclasses.replace(contents, task=task, evaluation=evaluation)
    page = parse(contents)
    assert len(page.find("script")) == 1
    assert page.find("title")[0][1] == page.find("h1")[0][1] == HOSTILE[0]
    for _, attrs, _ in page.elements:
        assert not [name for name in attrs if name.startswith("on")]
        assert attrs.get("src", "data:").startswith("data:")
    assert page.find("pre", id="command")[0][1] == HOSTILE[2]
    if task == "classification":
        cells = [text for attrs, text in page.find("th", scope="row")]
        assert set(HOSTILE) <= set(cells)


def test_written_in_one_move(tmp_path, monkeypatch, ten):
    path = tmp_path / "report.html"
    report.write(path, ten)
    first = path.read_bytes()
    assert len(first) < 1_000_000
    report.write(path, ten)
    assert path.read_bytes() == first  # equal contents, equal bytes
    broken = dataclasses.replace(ten, classes=("too", "few"))
    with pytest.raises(ValueError):
        report.write(path, broken)
    assert path.read_bytes() == first

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(ConvnetError, match="report.html cannot be written: disk full"):
        report.write(path, dataclasses.replace(ten, title="Another run"))
    assert path.read_bytes() == first
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_names_that_are_no_text(tmp_path):
    name = b"caf\xe9.jpg".decode("utf-8", "surrogateescape")
    path = tmp_path / "report.html"
    report.write(path, classification(2, 9, skipped=[(name, "truncated")]))
    assert "caf\\udce9.jpg" in path.read_text("utf-8")


def test_galleries(ten):
    page = parse(ten)
    pictures = page.find("img", cls="crisp")
    assert len(pictures) == len(ten.mistakes) + report.GALLERY
    for (attrs, _), example in zip(pictures, ten.mistakes, strict=False):
        np.testing.assert_array_equal(pixels(attrs["src"]), example.image)
    np.testing.assert_array_equal(pixels(pictures[10][0]["src"]), ten.augmented[0])
    captions = [text for _, text in page.find("figcaption")]
    assert "name 3taken for name 6 (98.7%)test/3" in captions
    assert "name 4" in captions
    assert "64 of the 70 images" in " ".join(text for _, text in page.find("p"))


def test_answers_that_are_no_number():
    contents = classification(3, 40)
    probabilities = contents.evaluation.probabilities.copy()
    probabilities[:4] = np.nan
    evaluation = dataclasses.replace(contents.evaluation, probabilities=probabilities)
    page = parse(dataclasses.replace(contents, evaluation=evaluation))
    right = probabilities[4:].argmax(-1) == evaluation.labels[4:]
    assert page.tiles()["Test accuracy"][0] == f"{100 * right.sum() / 40:.2f}%"
    assert page.find("p", role="alert")[0][1].startswith("4 answers of the model")


def test_without_test_examples_there_is_still_a_page():
    evaluation = Evaluation([], np.zeros(0, int), np.zeros(0), np.zeros((0, 3)))
    page = parse(classification(3, 5, evaluation=evaluation, history=[], result={}))
    assert page.tiles() == {} and not page.find("table", cls="matrix")
    assert any("no test example" in text for _, text in page.find("p"))


def test_import_is_light():
    code = (
        "import sys, convnet.report, convnet.metrics;"
        "print({'jax', 'sklearn', 'matplotlib', 'jinja2', 'PIL'} & set(sys.modules))"
    )
    root = Path(report.__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=root,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "set()"


def test_in_a_browser(tmp_path):
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if not browser:
        pytest.skip("chromium is not installed")
    page = tmp_path / "report.html"
    report.write(page, hostile())
    flags = "headless no-sandbox disable-gpu disable-quic no-first-run"
    flags += " disable-background-networking disable-component-update disable-sync"
    done = subprocess.run(
        [
            browser,
            *(f"--{flag}" for flag in flags.split()),
            f"--user-data-dir={tmp_path / 'profile'}",
            "--window-size=400,900",
            "--dump-dom",
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=90,
        check=True,
    )
    # Our script ran, the policy let it: the button is no longer hidden.
    assert '<button id="copy">Copy</button>' in done.stdout
    assert len(Page(done.stdout).find("script")) == 1

"""The report's figures: what is drawn and written is computed again from the data."""

import math
import re

import numpy as np
import pytest
from report_page import Page, classification, parse, pixels, regression

from convnet import report_figures, report_regression, report_svg
from convnet.metrics import Evaluation
from convnet.report import Mistake


def test_large_pictures_are_shrunk_and_grey_ones_stay_grey():
    ramp = np.linspace(0, 255, 300).astype(np.uint8)
    photo = np.broadcast_to(ramp[None, :, None], (200, 300, 3))
    shown = pixels(report_figures.picture(photo))
    assert shown.shape == (128, 192, 3)
    expected = np.interp(np.linspace(0, 299, 192), np.arange(300), ramp)
    assert np.abs(shown[64, :, 0] - expected).max() < 6
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8, 1)
    np.testing.assert_array_equal(pixels(report_figures.picture(grey)), grey[..., 0])


def test_series_are_drawn():
    series = np.zeros((1000, 1), np.float32)
    series[500] = 5.0  # a peak of one sample must survive
    contents = classification(2, 9, mistakes=[Mistake("t/1", 0, 1, 0.75, None, series)])
    [path] = [attrs["d"] for attrs, _ in parse(contents).find("path", cls="c0")]
    points = np.array(re.findall(r"([\d.]+) ([\d.]+)", path), float)
    assert len(points) <= 240 and points[:, 0].max() == 200
    assert points[points[:, 1].argmin()] == pytest.approx([500 / 999 * 200, 4], abs=0.1)
    assert np.median(points[:, 1]) == 96


def test_curves_put_values_where_the_axes_say():
    history = [{"step": s, "train/loss": v} for s, v in ((0, 4.0), (50, 1.0), (100, 2))]
    [figure] = report_figures.curves(history)
    assert list(figure.legend) == [("a", "training 2")]
    drawn = Page(str(figure.body))
    ticks = [
        (float(attrs["y"]) - 4, float(text))
        for attrs, text in drawn.find("text", cls="end")
    ]
    slope, offset = np.polyfit(*zip(*ticks, strict=True), 1)
    [(attrs, _)] = drawn.find("path", cls="line")
    points = np.array(re.findall(r"[ML]([\d.]+) ([\d.]+)", attrs["d"]), float)
    assert points[:, 1] * slope + offset == pytest.approx([4, 1, 2], abs=0.02)
    assert np.diff(points[:, 0])[0] == pytest.approx(np.diff(points[:, 0])[1], abs=0.2)


def test_curves_that_break_or_span_decades():
    values = [1000.0, 10.0, math.nan, 0.1, 0.01]
    history = [{"step": s, "train/loss": v} for s, v in enumerate(values)]
    [figure] = report_figures.curves(history)
    assert "no number" in figure.note and "log scale" in str(figure.body)
    [(attrs, _)] = Page(str(figure.body)).find("path", cls="line")
    assert attrs["d"].count("M") == 2 and attrs["d"].count("L") == 2
    points = np.array(re.findall(r"[ML]([\d.]+) ([\d.]+)", attrs["d"]), float)
    assert points[1, 1] - points[0, 1] == pytest.approx(
        points[2, 1] - points[1, 1], abs=0.2
    )
    assert report_figures.curves([{"step": 1}]) == []


def test_long_curves_are_averaged():
    steps, values = np.arange(1000.0), np.random.default_rng(0).normal(size=1000)
    values[7] = math.nan
    xs, ys = report_figures.thin(steps, values)
    np.testing.assert_allclose(xs, steps.reshape(200, 5).mean(-1))
    np.testing.assert_allclose(ys, np.nanmean(values.reshape(200, 5), -1))


@pytest.mark.parametrize("span", [(0, 1), (-3.7, 12), (0.912, 0.934), (0, 4.2e6)])
def test_ticks_are_round_and_few(span):
    scale = report_svg.Scale.around(span)
    ticks = scale.ticks()
    assert 3 <= len(ticks) <= 8
    assert scale.low <= span[0] and span[1] <= scale.high
    assert scale.place([scale.low, scale.high]) == pytest.approx([0, 1])
    assert all(len(report_svg.short(tick)) <= 6 for tick in ticks)


def test_binary():
    rng = np.random.default_rng(5)
    labels = (rng.random(300) < 0.3).astype(np.int32)
    probabilities = 1 / (1 + np.exp(-rng.normal(size=300) - np.where(labels, 1, -2)))
    page = parse(
        classification(
            2,
            1,
            task="binary",
            classes=("dog", "cat"),
            evaluation=Evaluation([""] * 300, labels, np.ones(300), probabilities),
        )
    )
    tiles = page.tiles()
    said = probabilities > 0.5
    right = said == (labels == 1)
    assert tiles["Test accuracy"][0] == f"{100 * right.mean():.2f}%"
    ranked = labels[np.argsort(-probabilities)]
    average = (np.cumsum(ranked) / np.arange(1, 301))[ranked == 1].mean()
    assert float(tiles["Average precision"][0]) == pytest.approx(average, abs=1e-4)
    notes = " ".join(text for _, text in page.find("figcaption"))
    recall, precision = said[labels == 1].mean(), labels[said].mean()
    assert f"recall is {100 * recall:.1f}%, precision {100 * precision:.1f}%" in notes
    thresholds = np.sort(probabilities)
    f1 = [
        2
        * labels[probabilities >= t].sum()
        / ((probabilities >= t).sum() + labels.sum())
        for t in thresholds
    ]
    best = thresholds[int(np.argmax(f1))]
    assert f"highest at a threshold of {100 * best:.1f}%" in notes
    legends = [text for _, text in page.find("span")]
    assert f"cat ({labels.sum()})" in legends
    assert f"dog ({300 - labels.sum()})" in legends


def test_regression_with_maps():
    rng = np.random.default_rng(6)
    labels = rng.random((12, 20, 16, 2)).astype(np.float32)
    size = np.arange(1, 13).reshape(12, 1, 1, 1) / 50
    guesses = labels + size * rng.normal(size=labels.shape)
    page = parse(regression(labels, guesses, baseline={"persistence": 0.5}))
    tiles = page.tiles()
    errors = np.float64(guesses) - labels
    mse = np.square(errors).mean()
    assert float(tiles["Test RMSE"][0]) == pytest.approx(math.sqrt(mse), rel=1e-3)
    spread = np.float64(labels) - labels.mean((0, 1, 2), dtype=np.float64)
    r2 = 1 - np.square(errors).sum() / np.square(spread).sum()
    assert float(tiles["R²"][0].replace("−", "-")) == pytest.approx(r2, abs=1e-4)
    rows = [text for _, text in page.find("div", cls="class")]
    ratio = float(re.search(r"0\.5([\d.]+) × this model", rows[1]).group(1))
    assert ratio == pytest.approx(0.5 / mse, rel=0.01)
    titles = [text for _, text in page.find("h3")]
    by_loss = np.argsort(np.square(errors).mean((1, 2, 3)))
    assert titles[-3:] == [
        f"Best example: test/{by_loss[0]}",
        f"Median example: test/{by_loss[6]}",
        f"Worst example: test/{by_loss[-1]}",
    ]


def test_maps_share_a_scale():
    truth = np.array([[0.0, 1.0], [2.0, 3.0]])
    html = Page(str(report_regression.maps(truth, truth + 1, "example")))
    images = [pixels(attrs["src"]) for attrs, _ in html.find("img")]
    # On the shared scale 0 to 4 the truth's 1, 2, 3 are the prediction's 1, 2, 3.
    np.testing.assert_array_equal(
        images[0].reshape(4, 3)[1:], images[1].reshape(4, 3)[:3]
    )
    difference = images[2].reshape(4, 3)
    assert (difference == difference[0]).all()
    assert difference[0, 0] > difference[0, 2]  # red: too high
    spans = [text for _, text in html.find("small")]
    assert spans == ["0 to 4", "0 to 4", "−1 to 1"]


def test_regression_with_lines_and_plain_numbers():
    rng = np.random.default_rng(7)
    lines = rng.normal(size=(5, 30, 1))
    page = parse(regression(lines, lines + 0.1))
    assert sum("example:" in text for _, text in page.find("h3")) == 3
    labels = rng.normal(size=50).astype(np.float32)
    labels[3] = 1.25
    mistake = Mistake("test/3", labels[3], np.float32(2.5))
    guesses = labels + 0.5
    guesses[9] = math.nan
    page = parse(regression(labels, guesses, mistakes=[mistake]))
    assert page.tiles()["Test RMSE"][0] == "0.5"
    assert page.find("p", role="alert")[0][1].startswith("1 answer of the model is")
    assert "1.25predicted 2.5test/3" in [t for _, t in page.find("figcaption")]
    assert not any("example:" in text for _, text in page.find("h3"))


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (1234.567, "1,235"), (0.00012345, "0.0001234"), (3.2e-7, "3.200e−07")]
    + [(-0.5, "−0.5"), (math.nan, "NaN"), (math.inf, "∞"), (100, "100")],
)
def test_numbers_for_people(value, text):
    assert report_svg.number(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(4.25, "4.25 s"), (59.99, "60 s"), (125, "2 min 5 s"), (7260, "2 h 1 min")],
)
def test_durations(seconds, text):
    assert report_svg.duration(seconds) == text

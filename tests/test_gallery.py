"""The page of pictures: self-contained, safe, sorted, and usable in a browser."""

import base64
import hashlib
import html.parser
import io
import json
import os
import re
import shutil
from urllib.parse import unquote

import browser
import numpy as np
import pytest
from PIL import Image

from convnet import gallery as gallery_lib
from convnet.data.resize import Resize
from convnet.gallery import Gallery

CLASSES = ("cat", "</script><script>alert(1)</script>")
NAMES = ("a b#1.png", "<img src=x onerror=alert(2)>.png", os.fsdecode(b"\xff.png"))
COLOURS = ((200, 30, 30), (30, 200, 30), (30, 30, 200))


class Page(html.parser.HTMLParser):
    """What a page holds: its tags with their attributes, and its scripts."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.scripts = [], []
        self.feed(text)
        self.data = json.loads(self.scripts[0])

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, text):
        if self.tags and self.tags[-1][0] == "script" and text.strip():
            self.scripts.append(text)


def written(gallery, path):
    gallery.write(str(path))
    return Page(path.read_text("utf-8"))


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name, colour in zip(NAMES, COLOURS, strict=True):
        Image.new("RGB", (48, 32), colour).save(folder / name)
    return [str(folder / name) for name in NAMES]


def make(classes=CLASSES, threshold=0.0, searched=""):
    return Gallery("Predictions of <M>", classes, Resize(), threshold, searched)


def test_the_page_holds_everything_and_runs_nothing_else(pictures, tmp_path):
    gallery = make()
    for path, label, probability in zip(
        pictures, (0, 1, 0), (0.2, 0.9, 0.55), strict=True
    ):
        gallery.add(path, label, probability, None)
    path = tmp_path / "page.html"
    page = written(gallery, path)
    rows = page.data["rows"]
    assert [row[1:3] for row in rows] == [[1, 0.9], [0, 0.55], [0, 0.2]]
    assert rows[0][0] == pictures[1]
    for row, colour in zip(rows, (COLOURS[1], COLOURS[2], COLOURS[0]), strict=True):
        image = Image.open(io.BytesIO(base64.b64decode(row[3])))
        assert (image.format, image.size) == ("WEBP", (32, 32))
        np.testing.assert_allclose(image.getpixel((16, 16)), colour, atol=12)
    # Links lead from the page's folder to the pictures, whatever these are called.
    links = [unquote(row[4], errors="surrogateescape") for row in rows]
    assert [str(tmp_path / link) for link in links] == [
        pictures[1], pictures[2], pictures[0],
    ]  # fmt: skip
    text = path.read_text("utf-8")
    assert set(re.findall(r"https?:[^\s\"']*", text)) == {"http://www.w3.org/2000/svg"}
    assert all("href" not in about and "src" not in about for _, about in page.tags)
    assert "<img src=x" not in text
    tags = [tag for tag, _ in page.tags]
    assert tags.count("script") == 2
    (policy,) = (a["content"] for t, a in page.tags if t == "meta" and "content" in a
                 and "default-src" in a["content"])  # fmt: skip
    digest = hashlib.sha256(page.scripts[1].encode()).digest()
    assert f"script-src 'sha256-{base64.b64encode(digest).decode()}'" in policy
    assert "default-src 'none'" in policy


def test_the_most_probable_stay_when_there_are_too_many(monkeypatch, tmp_path):
    monkeypatch.setattr(gallery_lib, "LIMIT", 20)
    gallery = make()
    rng = np.random.default_rng(0)
    chances = rng.uniform(size=300).round(2) * 0.99 + 0.005
    for index, chance in enumerate(chances):
        gallery.add(str(index), 0, float(chance), np.zeros((8, 8, 3), np.uint8))
        assert len(gallery._heap) <= 20
    page = written(gallery, tmp_path / "page.html")
    want = np.argsort(-chances, kind="stable")[:20]  # of equals the earlier ones
    assert [int(row[0]) for row in page.data["rows"]] == list(want)
    counts, _ = np.histogram(chances, 50, (0, 1))
    np.testing.assert_array_equal(page.data["histogram"], counts)
    assert "The 20 most probable of 300" in (tmp_path / "page.html").read_text()


def test_a_search_shows_what_it_found_and_some_around(monkeypatch, tmp_path):
    monkeypatch.setattr(gallery_lib, "_AROUND", 4)
    for threshold, shown in ((0.5, 6), (0.85, 4)):
        gallery = make(threshold=threshold, searched="cat")
        for index in range(10):
            gallery.add(str(index), 0, 1 - index / 10 + 0.001, None)
        page = written(gallery, tmp_path / "page.html")
        assert [row[0] for row in page.data["rows"]] == list("0123456789")[:shown]
        assert page.data["threshold"] == threshold
        assert "select" not in [tag for tag, _ in page.tags]


def test_what_has_no_picture_has_no_thumbnail(pictures, tmp_path):
    os.unlink(pictures[0])  # between the prediction and the page
    gallery = make()
    gallery.add(pictures[0], 0, 0.9, None)
    gallery.add("a.npy#3", 0, 0.8, np.zeros((16, 1), np.float32))
    gray = np.full((6, 6, 1), 77, np.uint8)
    gallery.add("b.npy#4", 0, 0.7, gray)
    rows = written(gallery, tmp_path / "page.html").data["rows"]
    assert [bool(row[3]) for row in rows] == [False, False, True]
    assert [bool(row[4]) for row in rows] == [True, False, False]
    image = Image.open(io.BytesIO(base64.b64decode(rows[2][3])))
    np.testing.assert_allclose(image.getpixel((3, 3)), (77, 77, 77), atol=4)


@pytest.mark.skipif(not shutil.which(browser.CHROMIUM), reason="needs Chromium")
def test_a_browser_filters_ten_thousand_by_slider_class_and_keys(tmp_path):
    gallery = make()
    chances = np.random.default_rng(1).uniform(size=10_000).round(4)
    thumbnail = gallery_lib._array_thumbnail(np.zeros((8, 8, 3), np.uint8))
    for index, chance in enumerate(chances):
        gallery.add(f"{index}.png", index % 2, float(chance), None)
    for picture in gallery._heap:  # drawing them is not what this test is about
        picture.thumbnail = thumbnail
    gallery.write(str(tmp_path / "page.html"))
    with browser.Browser(tmp_path) as page:
        page.open(f"file://{tmp_path / 'page.html'}")
        count = "document.getElementById('count').textContent"
        cards = "document.querySelectorAll('.card').length"
        assert page.evaluate(count) == "10,000 of 10,000"
        assert 200 < page.evaluate(cards) < 1500  # the rest are made when needed
        assert page.evaluate("document.querySelector('img').naturalWidth") == 8
        move = (
            "slider.value = 0.7;"
            " slider.dispatchEvent(new Event('input'));"
            "document.getElementById('class').value = '1';"
            "document.getElementById('class').dispatchEvent(new Event('change'));"
        )
        page.evaluate(move)
        both = int((chances >= 0.7).sum())
        ones = int((chances[1::2] >= 0.7).sum())
        assert page.evaluate(count) == f"{ones:,} of 10,000"
        options = "[...document.getElementById('class').options].map(o => o.text)"
        assert page.evaluate(options) == [
            f"all ({both:,})", f"cat ({both - ones:,})", f"{CLASSES[1]} ({ones:,})",
        ]  # fmt: skip
        focus = "document.activeElement.getAttribute('aria-label')"
        press = (
            "document.activeElement.dispatchEvent(new KeyboardEvent('keydown',"
            " {key: '%s', bubbles: true, cancelable: true}))"
        )
        order = [i for i in np.argsort(-chances, kind="stable") if i % 2]
        page.evaluate("document.querySelector('.card').focus()")
        for key, place in (("ArrowRight", 1), ("End", ones - 1), ("Home", 0)):
            page.evaluate(press % key)
            assert page.evaluate(focus).startswith(f"{order[place]}.png: ")
        page.evaluate(move.replace("0.7", "1"))
        assert page.evaluate("getComputedStyle(nothing).display") != "none"
        assert page.console == []

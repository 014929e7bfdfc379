"""The server as programs and people use it: answers, limits, batches, draining."""

import contextlib
import http.client
import json
import re
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import uvicorn
from report_page import Page
from serve_client import CLASSES, ask, form, make_bundle, metric, picture, wait_until

from convnet import bundle as bundle_lib
from convnet.data.decode import DecodeError
from convnet.errors import ConvnetError
from convnet.server.app import Limits, Service
from convnet.server.classifier import Classifier


@contextlib.contextmanager
def serving(classifier: Classifier, sizes=(1, 8), wait: bool = True, **limits):
    """Runs the app in a thread; gives the port."""
    service = Service(classifier, "<pets>", sizes, Limits(**limits))
    config = uvicorn.Config(
        service.app, lifespan="on", ws="none", log_level="critical", loop="asyncio"
    )
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            while wait and ask(port, "/healthz", method="GET")[0] != 200:
                time.sleep(0.01)
            yield port
        finally:
            server.should_exit = True
            thread.join(60)
            assert not thread.is_alive()


@pytest.fixture(scope="module")
def bundle() -> bundle_lib.Bundle:
    return make_bundle()


@pytest.fixture(scope="module")
def port(bundle):
    limits = {"megabytes": 0.02, "megapixels": 0.001, "files": 8}
    with serving(Classifier(bundle, "pets"), **limits) as port:
        yield port


class Fake(Classifier):
    """A picture is one byte, its probability of class 0 that byte / 200.

    `gate` holds the device up while it is not set; the byte 255 is unreadable, and 250
    makes the device fail. `batches` are the bytes of each batch after the warm-up.
    """

    def __init__(self, warm_up: bool = True) -> None:
        self.classes, self.shape = ("zero", "one"), (1, 1, 1)
        self.gate = threading.Event()
        self.warm = threading.Event()
        self.batches: list[list[int]] = []
        if warm_up:
            self.warm.set()

    def decode(self, data: bytes, name: str, max_pixels: int) -> np.ndarray:
        if data[0] == 255:
            raise DecodeError(name, "no picture")
        return np.full(self.shape, data[0], np.uint8)

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        values = pixels[:, 0, 0, 0]
        if not values.any():
            assert self.warm.wait(60)
        else:
            assert self.gate.wait(60)
            self.batches.append(values.tolist())
        if 250 in values:
            raise RuntimeError("out of\nmemory")
        p = values.astype(np.float32) / 200
        return np.stack([p, 1 - p], axis=1)


def test_an_answer_is_what_the_network_says_of_the_decoded_picture(port, bundle):
    pixels, png = picture(1)
    normal = jnp.asarray((pixels / 255 - 0.5) / 0.25, jnp.float32)[None]
    logits = bundle.model().apply(bundle.variables, normal)
    want = scipy.special.softmax(np.asarray(logits, np.float64)[0])
    status, row, _ = ask(port, "/predict?name=a/b.png&top=9", png)
    assert status == 200
    assert row["path"] == "a/b.png"
    assert dict(row["top"]) == pytest.approx(
        dict(zip(CLASSES, want, strict=True)), rel=1e-4
    )
    probabilities = [p for _, p in row["top"]]
    assert probabilities == sorted(probabilities, reverse=True)
    assert row["label"] == CLASSES[want.argmax()]
    assert row["probability"] == probabilities[0]
    assert len(ask(port, "/predict?top=1", png)[1]["top"]) == 1


def test_several_files_are_answered_in_their_order(port):
    pngs = [picture(seed)[1] for seed in range(4)]
    alone = [ask(port, "/predict", png)[1] for png in pngs]
    names = ["x.png", "broken.jpg", "ü/<i>.png", "x.png", "empty", "last"]
    contents = [pngs[0], b"no picture", pngs[1], pngs[2], b"", pngs[3]]
    files = list(zip(names, contents, strict=True))
    status, rows, _ = ask(port, "/predict", *form(files))
    assert status == 200
    assert [row["path"] for row in rows] == names
    assert set(rows[1]) == {"path", "error"}
    assert "not an image" in rows[1]["error"]
    assert rows[4]["error"] == "the file is empty"
    for row, want in zip([rows[i] for i in (0, 2, 3, 5)], alone, strict=True):
        assert row["label"] == want["label"]
        assert row["probability"] == pytest.approx(want["probability"], rel=1e-4)
    status, row, _ = ask(port, "/predict", *form([("one.png", pngs[0])]))
    assert (status, row["path"]) == (200, "one.png")


def test_what_cannot_be_answered_is_refused_with_a_reason(port):
    png = picture(1)[1]
    broken = ask(port, "/predict?name=b", b"GIF89a")
    assert broken[0] == 422
    assert broken[1]["path"] == "b"
    large = ask(port, "/predict", picture(1, 40)[1])
    assert large[0] == 422
    assert large[1]["error"] == "40x40 pixels, the limit is 1,000"
    nine = form([(str(i), png) for i in range(9)])
    twenty = form([(str(i), b"") for i in range(20)])
    cut = form([("a", png)])
    for status, reason, body, headers in (
        (413, "larger than 0.02 MB", bytes(20_001), {}),
        (413, "larger than 0.02 MB", iter([bytes(15_000)] * 3), {}),
        (413, "more than 8 files", *nine),
        (400, "Too many files", *twenty),
        (400, "not a multipart form", b"x", {"Content-Type": "multipart/form-data"}),
        (400, "not a multipart form", b"x" * 50, cut[1]),
        (400, "has no file", *form([])),
        (400, "body is empty", b"", {}),
    ):
        got, answer, _ = ask(port, "/predict", body, headers)
        assert got == status
        assert reason in answer["error"]
    for top in ("0", "-1", "x", "9" * 99, "1.5"):
        assert ask(port, f"/predict?top={top}", png)[0] == 400
    assert ask(port, "/predict", method="GET")[0] == 405
    for path in ("/templates/", "/../pyproject.toml", "/serve.py", "//serve.js"):
        assert ask(port, path, method="GET")[0] == 404
    assert ask(port, "/predict", png)[0] == 200


def test_a_connection_lives_on_after_a_refusal(port):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    for body, status in ((bytes(2_000_000), 413), (picture(1)[1], 200)) * 2:
        connection.request("POST", "/predict", body)
        response = connection.getresponse()
        response.read()
        assert response.status == status
    connection.close()


def test_pages_of_other_sites_get_nothing(port):
    png = picture(1)[1]
    for host in ("localhost", "LOCALHOST:8", "127.0.0.1", "[::1]:80", "192.168.0.7"):
        assert ask(port, "/predict", png, {"Host": host})[0] == 200
    for host in ("evil.example", "localhost.evil.example", "127.0.0.1.evil", "", "[x"):
        status, answer, _ = ask(port, "/", headers={"Host": host}, method="GET")
        assert status == 421
        assert "--names" in answer["error"]
    for site, status in (("cross-site", 403), ("same-site", 403), ("same-origin", 200)):
        assert ask(port, "/predict", png, {"Sec-Fetch-Site": site})[0] == status


def test_the_page_runs_only_its_own_script(port):
    status, html, headers = ask(port, "/", method="GET")
    assert status == 200
    policy = dict(
        part.strip().split(" ", 1)
        for part in headers["Content-Security-Policy"].split(";")
    )
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == "'self'"
    # The reader knows the report's empty elements only.
    page = Page(re.sub("<(input|link)", "<meta", html.decode()))
    assert page.find("h1")[0][1] == "<pets>"
    assert [text for _, text in page.find("option")][1:] == list(CLASSES)
    scripts = page.find("script")
    assert json.loads(scripts[0][1])["classes"] == list(CLASSES)
    assert scripts[1] == ({"src": "serve.js"}, "")
    assert len(scripts) == 2
    assert not page.find("style")
    assert not any("style" in attrs for _, attrs, _ in page.elements)
    assert b"//" not in html.replace(b"</script>", b"")  # no other host
    for path, kind in (("/serve.js", "javascript"), ("/serve.css", "css")):
        status, content, headers = ask(port, path, method="GET")
        assert status == 200
        assert kind in headers["Content-Type"]
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert content


def test_pictures_that_come_together_share_batches():
    fake = Fake()
    with (
        serving(fake, sizes=(1, 4, 16)) as port,
        ThreadPoolExecutor(41) as clients,
    ):
        first = clients.submit(ask, port, "/predict", bytes([1]))
        wait_until(lambda: metric(port, "convnet_queue_pictures") == 1)
        rest = [clients.submit(ask, port, "/predict", bytes([n])) for n in range(2, 42)]
        wait_until(lambda: metric(port, "convnet_queue_pictures") == 41)
        fake.gate.set()
        answers = [future.result() for future in (first, *rest)]
        batches = metric(port, "convnet_batches_total")
        assert metric(port, "convnet_batched_pictures_total") == 41
    for n, (status, row, _) in enumerate(answers, 1):
        assert status == 200
        assert dict(row["top"])["zero"] == pytest.approx(n / 200)
    assert {len(batch) for batch in fake.batches} <= {1, 4, 16}
    assert batches == len(fake.batches) < 20
    seen = [value for batch in fake.batches for value in batch if value]
    assert sorted(seen) == list(range(1, 42))


def test_a_full_queue_says_when_to_come_again_and_loses_nothing():
    fake = Fake()
    with (
        serving(fake, queue=3, files=8) as port,
        ThreadPoolExecutor(3) as clients,
    ):
        held = [clients.submit(ask, port, "/predict", bytes([n])) for n in (1, 2, 3)]
        wait_until(lambda: metric(port, "convnet_queue_pictures") == 3)
        status, answer, headers = ask(port, "/predict", bytes([4]))
        assert status == 503
        assert "queue is full" in answer["error"]
        assert int(headers["Retry-After"]) >= 1
        fake.gate.set()
        assert [future.result()[0] for future in held] == [200] * 3
        assert ask(port, "/predict", bytes([4]))[0] == 200
        three = form([("a", b"\1"), ("b", b"\xff"), ("c", b"\3")])
        status, rows, _ = ask(port, "/predict", *three)
        assert [row.get("error") for row in rows] == [None, "no picture", None]
        # More than the queue holds could never be answered.
        four = form([(str(n), bytes([n])) for n in range(1, 5)])
        assert ask(port, "/predict", *four)[0] == 413
        assert metric(port, "convnet_queue_pictures") == 0
        assert metric(port, "convnet_upload_bytes") == 0


def test_a_batch_that_fails_is_not_the_end():
    fake = Fake()
    fake.gate.set()
    with serving(fake) as port:
        status, row, _ = ask(port, "/predict?name=x", bytes([250]))
        assert status == 500
        assert row["path"] == "x"
        assert row["error"] == "the model failed: RuntimeError: out of memory"
        status, row, _ = ask(port, "/predict", bytes([100]))
        assert (status, row["probability"]) == (200, 0.5)
        assert metric(port, "convnet_pictures_total", result="failed") == 1


def test_a_client_that_leaves_takes_no_answer_with_it():
    fake = Fake()
    with serving(fake) as port, ThreadPoolExecutor(4) as clients:
        head = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: "
        gone = [socket.create_connection(("127.0.0.1", port)) for _ in range(2)]
        gone[0].sendall(head + b"1\r\n\r\n\7")
        gone[1].sendall(head + b"900\r\n\r\n\7")  # It leaves in the middle.
        stay = [clients.submit(ask, port, "/predict", bytes([n])) for n in (1, 2, 3, 4)]
        wait_until(lambda: metric(port, "convnet_queue_pictures") == 5)
        for connection in gone:
            connection.close()
        wait_until(lambda: metric(port, "convnet_requests_total", status="499") == 1)
        fake.gate.set()
        for n, future in enumerate(stay, 1):
            status, row, _ = future.result()
            assert status == 200
            assert dict(row["top"])["zero"] == pytest.approx(n / 200)
        wait_until(lambda: metric(port, "convnet_queue_pictures") == 0)
        assert metric(port, "convnet_upload_bytes") == 0


def test_it_is_ready_only_when_all_is_compiled():
    fake = Fake(warm_up=False)
    fake.gate.set()
    with serving(fake, wait=False) as port:
        wait_until(lambda: ask(port, "/", method="GET")[0] == 200)
        status, answer, headers = ask(port, "/healthz", method="GET")
        assert (status, answer["status"]) == (503, "compiling")
        status, _, headers = ask(port, "/predict", bytes([1]))
        assert status == 503
        assert headers["Retry-After"] == "1"
        assert metric(port, "convnet_ready") == 0
        fake.warm.set()
        wait_until(lambda: ask(port, "/healthz", method="GET")[0] == 200)
        assert ask(port, "/predict", bytes([1]))[0] == 200
        assert metric(port, "convnet_ready") == 1


def test_metrics_count_what_was_asked():
    fake = Fake()
    fake.gate.set()
    with serving(fake) as port:
        for body in (b"\1", b"\2", b"\xff"):
            ask(port, "/predict", body)
        assert metric(port, "convnet_requests_total", status="200") == 2
        assert metric(port, "convnet_requests_total", status="422") == 1
        assert metric(port, "convnet_pictures_total", result="classified") == 2
        assert metric(port, "convnet_pictures_total", result="unreadable") == 1
        assert metric(port, "convnet_request_seconds_count") == 3
        assert metric(port, "convnet_request_seconds_bucket", le="+Inf") == 3
        assert metric(port, "convnet_queue_capacity") == 256


def test_a_binary_model_answers_with_both_names():
    binary = {"task": {"name": "binary", "positive": 2}, "outputs": 1}
    bundle = make_bundle(**binary)
    classifier = Classifier(bundle, "m")
    assert classifier.classes == ("not fish", "fish")
    pixels, png = picture(1)
    decoded = classifier.decode(png, "a", 100)
    np.testing.assert_array_equal(decoded, pixels)
    found = classifier(decoded[None])
    normal = jnp.asarray((pixels / 255 - 0.5) / 0.25, jnp.float32)[None]
    logit = bundle.model().apply(bundle.variables, normal)[0, 0]
    want = scipy.special.expit(np.float64(logit))
    row = classifier.row("p", found[0], 2)
    assert dict(row["top"]) == pytest.approx(
        {"fish": want, "not fish": 1 - want}, abs=1e-6
    )
    row = classifier.row("p", np.float32(np.nan), 2)
    assert set(row) == {"path", "error"}


def test_models_that_take_no_pictures_are_refused():
    about = make_bundle().preprocessing
    for changes in (
        {"preprocessing": about | {"input_shape": (8, 9, 3)}},
        {"preprocessing": about | {"input_shape": (8, 8, 2)}},
        {"preprocessing": about | {"input_dtype": "float32"}},
        {"classes": (), "task": {"name": "regression", "positive": None}},
    ):
        with pytest.raises(ConvnetError, match="--model=m: it takes .* want a model"):
            Classifier(make_bundle(**changes), "m")

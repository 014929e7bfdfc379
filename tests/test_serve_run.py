"""`python -m convnet.serve` as a process, and its page in a browser."""

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from browser import CHROMIUM, Browser
from PIL import Image
from serve_client import (
    CLASSES,
    SIDE,
    ask,
    form,
    make_bundle,
    metric,
    picture,
    wait_until,
)

from convnet import bundle as bundle_lib
from convnet import cli, serve
from convnet.errors import ConvnetError, UsageError

PROJECT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model") / "pets.safetensors"
    bundle_lib.save(path, make_bundle())
    return path


def start(model: Path, *flags: str) -> tuple[subprocess.Popen, int]:
    """Starts the server and waits until it is ready; returns it and its port."""
    process = subprocess.Popen(
        [sys.executable, "-m", "convnet.serve", f"--model={model}", *flags],
        cwd=PROJECT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    match = re.fullmatch(
        r"serving on http://127\.0\.0\.1:(\d+)/ \(Ctrl-C stops\)\n",
        process.stdout.readline(),
    )
    assert match, process.communicate()
    line = process.stdout.readline()
    assert line.startswith("ready after"), (line, process.communicate())
    return process, int(match[1])


@pytest.fixture(scope="module")
def running(model):
    process, port = start(model, "--port=0", "--batch=16")
    yield port
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (0, "", "")


def test_sigterm_lets_what_has_begun_be_answered(model):
    process, port = start(model, "--port=0", "--batch=8")
    pngs = [picture(seed)[1] for seed in range(20)]
    body, headers = form([(f"{place}.png", png) for place, png in enumerate(pngs)])
    head = "POST /predict HTTP/1.1\r\nHost: localhost\r\n" + "".join(
        f"{name}: {value}\r\n"
        for name, value in (headers | {"Content-Length": str(len(body))}).items()
    )
    idle = http.client.HTTPConnection("127.0.0.1", port)
    idle.request("GET", "/healthz")
    idle.getresponse().read()
    with socket.create_connection(("127.0.0.1", port), 30) as begun:
        begun.sendall(head.encode() + b"\r\n" + body[:100])
        wait_until(lambda: metric(port, "convnet_upload_bytes") > 0)
        process.send_signal(signal.SIGTERM)
        wait_until(lambda: refused(port))
        begun.sendall(body[100:])
        response = http.client.HTTPResponse(begun)
        response.begin()
        rows = json.loads(response.read())
    out, err = process.communicate(timeout=60)
    idle.close()
    assert (process.returncode, out, err) == (0, "", "")
    assert response.status == 200
    assert [row["path"] for row in rows] == [f"{place}.png" for place in range(20)]
    assert all(row["label"] in CLASSES for row in rows)


def refused(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 30).close()
    except ConnectionRefusedError:
        return True
    return False


def flags_of(*arguments: str):
    return cli.parse(["serve", *arguments], serve.define, "")


def test_a_port_in_use_is_one_line(running, model):
    before = os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else []
    with pytest.raises(ConvnetError, match=f"--port={running}: .*in use.*--port=0"):
        serve.main(flags_of(f"--model={model}", f"--port={running}"))
    after = os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else []
    assert len(after) <= len(before)
    with pytest.raises(UsageError, match="--host=no such host"):
        serve.main(flags_of(f"--model={model}", "--host=no such host"))
    with pytest.raises(UsageError, match="--model is missing"):
        serve.main(flags_of())


@pytest.mark.parametrize("name", ["starlette", "uvicorn", "python_multipart"])
def test_a_missing_extra_says_how_to_get_it(model, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConvnetError, match=r"launch/setup\.sh serve.*convnet\[serve\]"):
        serve.main(flags_of(f"--model={model}"))


# --- the page

IN_GALLERY = """
Array.from(document.querySelectorAll("#gallery li"), (item) => ({
  name: item.querySelector("code").textContent,
  chance: item.querySelector(".chance").textContent,
  label: item.querySelector("figcaption > span:last-of-type").textContent,
  width: item.querySelector("img").naturalWidth,
}))
"""
DONE = "document.getElementById('waiting').textContent === 'all done'"
HOSTILE = '<img src=x onerror="document.title=1">.png'


def text(browser: Browser, name: str) -> str:
    return browser.evaluate(f"document.getElementById('{name}').textContent")


def put(browser: Browser, name: str, value: str, event: str) -> None:
    browser.evaluate(
        f"(() => {{ const it = document.getElementById('{name}'); it.value = '{value}';"
        f" it.dispatchEvent(new Event('{event}', {{bubbles: true}})); }})()"
    )


@pytest.fixture
def browser(tmp_path, running):
    if not os.path.exists(CHROMIUM):
        pytest.skip(f"needs a browser: no {CHROMIUM}")
    with Browser(tmp_path) as browser:
        browser.open(f"http://127.0.0.1:{running}/")
        yield browser
        assert browser.console == []  # no error, nothing that the policy has blocked


def test_a_folder_becomes_a_gallery_ranked_by_the_chosen_class(
    browser, running, tmp_path
):
    folder = tmp_path / "pets"
    (folder / "more").mkdir(parents=True)
    want: dict[str, dict[str, float]] = {}
    for seed in range(60):
        name = ("more/" if seed % 3 else "") + (f"{seed}.png" if seed else HOSTILE)
        png = picture(seed)[1]
        (folder / name).write_bytes(png)
        row = ask(running, "/predict?top=3", png)[1]
        want[f"pets/{name}"] = {label: p for label, p in row["top"]}
    (folder / "broken.jpg").write_bytes(b"no picture")
    (folder / ".DS_Store").write_bytes(b"junk")
    browser.choose("#folder", [folder])
    browser.wait(DONE)
    assert text(browser, "done") == "60"
    assert text(browser, "bad") == "1"
    (row,) = browser.evaluate(
        "Array.from(document.querySelectorAll('#reasons tr'), (r) => r.innerText)"
    )
    assert row.split("\t")[0] == "pets/broken.jpg"
    assert "not an image" in row
    assert float(text(browser, "speed")) > 0

    put(browser, "class", "1", "change")
    chosen = {name: p[CLASSES[1]] for name, p in want.items()}
    for least in (0, round(100 * np.mean(list(chosen.values())))):
        put(browser, "threshold", str(least), "input")
        found = {name: p for name, p in chosen.items() if p >= least / 100}
        browser.wait(f"document.getElementById('found').textContent === '{len(found)}'")
        shown = browser.evaluate(IN_GALLERY)
        assert {item["name"] for item in shown} == set(found)
        ranked = [found[item["name"]] for item in shown]
        # Batches of other sizes round otherwise.
        assert np.all(np.diff(ranked) < 1e-5)
        for item, p in zip(shown, ranked, strict=True):
            assert float(item["chance"].rstrip(" %")) == pytest.approx(
                100 * p, abs=0.06
            )
            best = want[item["name"]]
            assert item["label"] == max(best, key=best.get)
    assert len(found) not in (0, 60)  # The threshold tells pictures apart.
    assert browser.evaluate("document.title") == "pets.safetensors – classify pictures"
    browser.wait("document.querySelector('#gallery img').naturalWidth > 0")

    screenshot = tmp_path / "page.png"
    browser.screenshot(screenshot)
    with Image.open(screenshot) as image:
        # Of random pictures: thumbnails were painted, not only text on a plain page.
        assert len(image.convert("RGB").getcolors(1 << 20)) > 500
    browser.evaluate("document.getElementById('clear').click()")
    assert browser.evaluate(IN_GALLERY) == []


def test_pictures_can_be_dropped_and_pasted(browser):
    make = """
    const canvas = new OffscreenCanvas(SIDE, SIDE);
    canvas.getContext("2d").fillRect(0, 0, 3, 5);
    const blob = await canvas.convertToBlob();
    const transfer = new DataTransfer();
    for (const name of ["a.png", "b.png"]) transfer.items.add(new File([blob], name));
    """.replace("SIDE", str(SIDE))
    for count, event in (
        (2, "new DragEvent('drop', {dataTransfer: transfer, cancelable: true})"),
        (4, "new ClipboardEvent('paste', {clipboardData: transfer})"),
    ):
        browser.evaluate(f"(async () => {{ {make} window.dispatchEvent({event}); }})()")
        browser.wait(
            f"{DONE} && document.getElementById('done').textContent == {count}"
        )
    names = {item["name"] for item in browser.evaluate(IN_GALLERY)}
    assert names == {"a.png", "b.png"}


def test_a_busy_server_is_asked_again_until_it_answers(browser):
    # Every other request is refused, as a full queue would.
    browser.evaluate(
        """
        window.refused = 0;
        const real = window.fetch;
        let turn = 0;
        window.fetch = (...request) => {
          if (turn++ % 2) return real(...request);
          window.refused += 1;
          const body = JSON.stringify({error: "the queue is full"});
          const headers = {"Retry-After": "0.1"};
          return Promise.resolve(new Response(body, {status: 503, headers}));
        };
        """
    )
    browser.evaluate(
        """(async () => {
          const canvas = new OffscreenCanvas(8, 8);
          canvas.getContext("2d");
          const blob = await canvas.convertToBlob();
          const transfer = new DataTransfer();
          for (let i = 0; i < 100; i++)
            transfer.items.add(new File([blob], `${i}.png`));
          const paste = new ClipboardEvent("paste", {clipboardData: transfer});
          window.dispatchEvent(paste);
        })()"""
    )
    browser.wait(f"{DONE} && document.getElementById('done').textContent == 100")
    assert browser.evaluate("window.refused") >= 7
    assert text(browser, "bad") == "0"

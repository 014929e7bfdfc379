"""What the tests of the server share: a model, pictures, and a client."""

import http.client
import io
import json
import time

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from convnet import bundle as bundle_lib
from convnet import models

CLASSES = ("cat", "</script><b>dog", "fish")
OPTIONS = {"widths": (4,), "depth": 1, "norm": "none", "gather": "global"}
SIDE = 8


def make_bundle(**changes) -> bundle_lib.Bundle:
    outputs = changes.pop("outputs", 3)
    model = models.create("cnn", num_outputs=outputs, **OPTIONS)
    variables = model.init(jax.random.key(3), jnp.zeros((1, SIDE, SIDE, 3)))
    fields = {
        "architecture": {"name": "cnn", "num_outputs": outputs, "options": OPTIONS},
        "task": {"name": "classification", "positive": None},
        "classes": CLASSES,
        "preprocessing": {
            "input_shape": (SIDE, SIDE, 3),
            "input_dtype": "uint8",
            "resize": "crop",
            "mean": (0.5,),
            "std": (0.25,),
        },
        "provenance": {"data": "none"},
        # Far from equal probabilities.
        "variables": {
            "params": jax.tree.map(lambda x: 3 * x, variables["params"]),
            "batch_stats": {},
        },
    }
    return bundle_lib.Bundle(**{**fields, **changes})


def picture(seed: int, side: int = SIDE) -> tuple[np.ndarray, bytes]:
    """Noise around a random colour: the pixels, and the PNG of them."""
    rng = np.random.default_rng(seed)
    colour = rng.integers(0, 256, 3)
    noise = rng.integers(-40, 40, (side, side, 3))
    pixels = np.clip(colour + noise, 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return pixels, file.getvalue()


def form(files: list[tuple[str, bytes]]) -> tuple[bytes, dict[str, str]]:
    parts = b""
    for name, data in files:
        head = f'Content-Disposition: form-data; name="file"; filename="{name}"'
        parts += b"--edge\r\n" + head.encode() + b"\r\n\r\n" + data + b"\r\n"
    return parts + b"--edge--\r\n", {
        "Content-Type": "multipart/form-data; boundary=edge"
    }


def ask(port: int, path: str, body=None, headers=None, method: str = "POST"):
    """Returns the status, the answer (parsed where it is JSON) and its headers."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request(method, path, body, headers or {})
        response = connection.getresponse()
        content = response.read()
    finally:
        connection.close()
    if response.headers.get_content_type() == "application/json":
        content = json.loads(content)
    return response.status, content, response.headers


def metric(port: int, name: str, **labels: str) -> float:
    """The sum of the samples, as Prometheus's own parser reads them."""
    _, text, headers = ask(port, "/metrics", method="GET")
    assert headers["Content-Type"].startswith("text/plain; version=0.0.4")
    return sum(
        sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    )


def wait_until(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)

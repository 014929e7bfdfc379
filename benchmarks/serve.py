"""Requests per second of the server, and how long they take, over the loopback.

usage: python -m benchmarks.serve [--model=M] [--clients=1,16,64] [--seconds=5]
           [--output=FILE.json]

Starts `python -m convnet.serve` as a process of its own. So many clients post a JPEG,
wait for the answer and post the next one, each over a connection that it keeps. Every
answer is compared with what a lone client was told of that picture: a request is lost
if it gets no answer, or another one. The clients share the machine with the server.
"""

import asyncio
import contextlib
import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from absl import flags
from PIL import Image

from benchmarks import table as table_lib
from benchmarks.peer import PROJECT
from benchmarks.table import Row, Table
from convnet import cli
from convnet.errors import ConvnetError, UsageError

_PICTURES = 64
# What another batch size may change in a probability, and no more.
_TOLERANCE = 1e-3
_PATIENCE = 60.0  # Seconds that a client waits for one answer.


def define(values: flags.FlagValues, argv: list[str]) -> None:
    """Defines the flags of this benchmark."""
    del argv
    table_lib.define(values, repeats=None, peer_python=False)
    flags.DEFINE_string(
        "model",
        None,
        "a model file or workdir; by default a small CNN on 32x32 pixels",
        flag_values=values,
    )
    flags.DEFINE_list("clients", ["1", "16", "64"], "at a time", flag_values=values)
    flags.DEFINE_float(
        "seconds", 5.0, "of load, for each", lower_bound=0.1, flag_values=values
    )
    flags.DEFINE_integer(
        "side", 128, "of the JPEGs in pixels", lower_bound=1, flag_values=values
    )


@dataclasses.dataclass
class Load:
    """What the clients saw: seconds of each answered request, how many were lost."""

    times: list[float] = dataclasses.field(default_factory=list)
    lost: int = 0
    seconds: float = 0.0


def main(values: flags.FlagValues) -> None:
    """Measures one number of clients after the other.

    Raises:
      ConvnetError: the server does not start, does not stop, or lost a request.
    """
    levels = [int(n) if n.isdecimal() else 0 for n in values.clients]
    if not levels or min(levels) < 1:
        raise UsageError(
            f"--clients={','.join(values.clients)}: want numbers from 1 on"
        )
    bodies = pictures(_PICTURES, values.side)
    with contextlib.ExitStack() as stack:
        model = values.model
        if model is None:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            model = str(Path(folder) / "small.safetensors")
            write_model(Path(model))
        port = stack.enter_context(server(model, values.device))
        table = Table(values.output, f"server, {values.device}")
        expected = asyncio.run(answers(port, bodies))
        lost = 0
        for clients in levels:
            load = asyncio.run(run(port, clients, values.seconds, bodies, expected))
            lost += load.lost
            name = f"{clients} client{'s' if clients > 1 else ''}"
            rate = len(load.times) / load.seconds
            table.add(Row(name, "requests/s", rate))
            for q in (50, 99):
                found = (
                    1e3 * float(np.percentile(load.times, q)) if load.times else None
                )
                table.add(Row(f"{name}, p{q}", "ms", found))
            table.add(Row(f"{name}, lost", "requests", load.lost))
    if lost:
        raise ConvnetError(f"{lost} requests were lost")


def pictures(count: int, side: int) -> list[bytes]:
    """Returns JPEGs of smooth noise, all different."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8))
        file = io.BytesIO()
        coarse.resize((side, side), Image.Resampling.BICUBIC).save(file, "JPEG")
        found.append(file.getvalue())
    return found


def write_model(path: Path) -> None:
    """Writes a small CNN, not trained: 32x32 pixels, 10 classes."""
    import jax

    # An accelerator is the server's.
    jax.config.update("jax_platforms", "cpu")
    from convnet import bundle, models

    options = {"widths": (16, 32), "depth": 1, "norm": "none", "gather": "global"}
    model = models.create("cnn", num_outputs=10, **options)
    variables = model.init(jax.random.key(0), np.zeros((1, 32, 32, 3), np.float32))
    # Far apart, so that an answer tells its picture.
    variables = jax.tree.map(lambda leaf: 4 * leaf, variables)
    bundle.save(
        path,
        bundle.Bundle(
            architecture={"name": "cnn", "num_outputs": 10, "options": options},
            task={"name": "classification", "positive": None},
            classes=tuple(f"class {i}" for i in range(10)),
            preprocessing={
                "input_shape": (32, 32, 3),
                "input_dtype": "uint8",
                "resize": "crop",
                "mean": (0.5,),
                "std": (0.25,),
            },
            provenance={"data": "none"},
            variables={"params": variables["params"], "batch_stats": {}},
        ),
    )


@contextlib.contextmanager
def server(model: str, device: str) -> Iterator[int]:
    """Runs the server; gives its port once it is ready, and drains it at the end.

    Raises:
      ConvnetError: it does not start, or its exit status is not 0.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "convnet.serve", f"--model={model}", "--port=0"],
        stdout=subprocess.PIPE,
        text=True,
        cwd=PROJECT,
        env={**os.environ, "JAX_PLATFORMS": {"cpu": "cpu", "gpu": "cuda"}[device]},
    )
    try:
        port = 0
        for line in process.stdout:
            if line.startswith("serving on "):
                port = int(line.split("/")[2].rpartition(":")[2])
            if line.startswith("ready"):
                break
        else:
            raise ConvnetError("the server did not start; see above")
        yield port
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            status = process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            status = process.wait()
        process.stdout.close()
    if status:
        raise ConvnetError(f"the server ended with status {status}")


async def answers(port: int, bodies: list[bytes]) -> list[dict]:
    """Returns the answer to each picture, asked one after the other."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        found = [await post(reader, writer, body) for body in bodies]
    finally:
        writer.close()
    if None in found:
        raise ConvnetError("the server refuses the benchmark's pictures")
    return found


async def run(
    port: int, clients: int, seconds: float, bodies: list[bytes], expected: list[dict]
) -> Load:
    """Has so many clients ask for so long."""
    load = Load()
    start = time.perf_counter()

    async def client(number: int) -> None:
        reader = writer = None
        place = number
        while time.perf_counter() < start + seconds:
            place = (place + 1) % len(bodies)
            asked = time.perf_counter()
            try:
                if writer is None:
                    reader, writer = await asyncio.open_connection("127.0.0.1", port)
                async with asyncio.timeout(_PATIENCE):
                    found = await post(reader, writer, bodies[place])
            except (OSError, EOFError, TimeoutError):
                found, writer = None, None
            if found is None or not _same(found, expected[place]):
                load.lost += 1
            else:
                load.times.append(time.perf_counter() - asked)
        if writer is not None:
            writer.close()

    await asyncio.gather(*map(client, range(clients)))
    load.seconds = time.perf_counter() - start
    return load


async def post(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, body: bytes
) -> dict | None:
    """Posts a picture; returns the row of the answer, None for another status."""
    head = f"POST /predict HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}"
    writer.write(f"{head}\r\n\r\n".encode() + body)
    status, *lines = (await reader.readuntil(b"\r\n\r\n")).split(b"\r\n")
    headers = dict(line.lower().split(b": ", 1) for line in lines if line)
    answer = await reader.readexactly(int(headers[b"content-length"]))
    return json.loads(answer) if status.split()[1] == b"200" else None


def _same(found: dict, expected: dict) -> bool:
    one, other = dict(found["top"]), dict(expected["top"])
    # Only the last of the top classes may differ, where two are equally probable.
    return found["label"] in other and all(
        abs(one[label] - other[label]) < _TOLERANCE for label in one.keys() & other
    )


if __name__ == "__main__":
    cli.run(main, define, __doc__)

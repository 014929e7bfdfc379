"""Loads an exported file as somebody without convnet does, and predicts.

usage: python -P export_reader.py stablehlo|onnx FILE BATCHES.npz ANSWERS.npz

`convnet.export_check` starts it in a process of its own. It imports nothing of convnet:
for StableHLO only JAX, for ONNX only ONNX Runtime. BATCHES holds arrays of inputs;
ANSWERS gets the outputs under the same names, and what the file says of itself as
`about`.
"""

import json
import sys
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np

Loaded = tuple[Callable[[np.ndarray], Any], dict[str, Any]]


def load_stablehlo(path: str) -> Loaded:
    """Returns the function in a file of `--format=stablehlo`, and its about.json."""
    import jax
    from jax import export

    with zipfile.ZipFile(path) as file:
        about = json.loads(file.read("about.json"))
        exported = export.deserialize(bytearray(file.read("function")))
    return jax.jit(exported.call), about


def load_onnx(path: str) -> Loaded:
    """Returns the function in a file of `--format=onnx`, and its metadata."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    metadata = session.get_modelmeta().custom_metadata_map
    about = {name: json.loads(text) for name, text in metadata.items()}
    name = session.get_inputs()[0].name
    return lambda inputs: session.run(None, {name: inputs})[0], about


LOADERS = {"stablehlo": load_stablehlo, "onnx": load_onnx}


def main(kind: str, path: str, batches: str, answers: str) -> None:
    """Predicts each of the batches."""
    call, about = LOADERS[kind](path)
    with np.load(batches) as file:
        found = {name: np.asarray(call(file[name])) for name in file.files}
    if any(name.partition(".")[0] == "convnet" for name in sys.modules):
        raise SystemExit("convnet was imported: this would prove nothing")
    np.savez(answers, about=json.dumps(about), **found)


if __name__ == "__main__":
    main(*sys.argv[1:])

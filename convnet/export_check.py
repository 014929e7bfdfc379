"""Whether an exported file predicts what the model does, loaded without convnet."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np

from convnet.bundle import Bundle
from convnet.errors import ConvnetError

# Of a probability (of the largest output, in regression): float32 rounds by 6e-8, and
# other orders of summation make about ten times that of it, in the deepest networks.
TOLERANCE = 1e-5

_READER = Path(__file__).parent / "export_reader.py"


def examples(bundle: Bundle) -> tuple[np.ndarray, str]:
    """Returns inputs to compare on, and what they are in words.

    For images they are scikit-learn's two photographs, each squashed whole and cut out
    of the middle, and noise; for anything else, noise.
    """
    from PIL import Image
    from sklearn.datasets import load_sample_images

    about = bundle.preprocessing
    shape, dtype = tuple(about["input_shape"]), about["input_dtype"]
    rng = np.random.default_rng(0)
    if dtype == "float32":
        noise = rng.normal(about["mean"], about["std"], (7, *shape))
        return noise.astype(np.float32), "noise of the data's mean and spread"
    if len(shape) != 3 or shape[-1] not in (1, 3):
        return rng.integers(0, 256, (7, *shape), np.uint8), "noise"
    h, w, c = shape
    images = []
    for pixels in load_sample_images().images:
        photo = Image.fromarray(pixels).convert("RGB" if c == 3 else "L")
        left, top = max(photo.width - w, 0) // 2, max(photo.height - h, 0) // 2
        middle = (left, top, min(left + w, photo.width), min(top + h, photo.height))
        for box in (None, middle):
            image = np.asarray(photo.resize((w, h), box=box), np.uint8)
            images.append(image.reshape(shape))
    noise = rng.integers(0, 256, (3, *shape), np.uint8)
    return np.stack([*images, *noise]), "4 cuts of 2 photographs and 3 of noise"


def check(
    bundle: Bundle, kind: str, path: Path, about: dict[str, Any]
) -> tuple[float, str]:
    """Compares an exported file, loaded by a fresh process, with the model.

    Args:
      bundle: the model.
      kind: "stablehlo" or "onnx".
      path: the exported file.
      about: what it should say of itself.

    Returns:
      The largest difference, and in words what it was found with.

    Raises:
      ConvnetError: the file cannot be loaded, says something else of itself, or the
        difference is above `TOLERANCE`.
    """
    inputs, tried = examples(bundle)
    batches = {"one": inputs[:1], "rest": inputs[1:]}
    predict = bundle.predict_fn()
    with jax.default_matmul_precision("highest"):
        wanted = {name: np.asarray(predict(batch)) for name, batch in batches.items()}
    with tempfile.TemporaryDirectory() as folder:
        given, answers = Path(folder) / "batches.npz", Path(folder) / "answers.npz"
        np.savez(given, **batches)
        # Without our folder on its path (-P).
        command = [sys.executable, "-P", str(_READER), kind, *map(str, (path, given))]
        done = subprocess.run([*command, str(answers)], capture_output=True, text=True)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise ConvnetError(
                f"a process without convnet cannot run this {kind}: {last[:500]}"
            )
        with np.load(answers) as file:
            found = dict(file)
    if json.loads(str(found["about"])) != about:
        raise ConvnetError(f"the exported {kind} lost its labels or preprocessing")
    scale = 1.0
    if bundle.task["name"] == "regression":
        scale = max(1.0, *(float(np.abs(value).max()) for value in wanted.values()))
    difference = 0.0
    for name, value in wanted.items():
        if found[name].shape != value.shape:
            raise ConvnetError(
                f"the exported {kind} puts out {found[name].shape} for"
                f" {batches[name].shape}, the model {value.shape}"
            )
        off = np.abs(found[name].astype(np.float64) - value).max() / scale
        difference = max(difference, float(np.nan_to_num(off, nan=np.inf)))
    if difference > TOLERANCE:
        raise ConvnetError(
            f"the exported {kind} predicts something else: it differs by"
            f" {difference:.2g}, and {TOLERANCE:g} is allowed ({tried}); nothing was"
            " written"
        )
    return difference, tried

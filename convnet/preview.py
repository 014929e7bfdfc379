"""Pictures of what training sees: the augmented batch, as a contact sheet."""

from pathlib import Path

import jax
import numpy as np
from PIL import Image

from convnet import step as step_lib
from convnet.data import pipeline
from convnet.errors import UsageError
from convnet.prepare import Run
from convnet.task import Binary, Regression


def examples(it: Run, count: int) -> tuple[np.ndarray | None, list[str]]:
    """Returns the first augmented examples of step 0 as pictures, and their captions.

    Returns:
      uint8 (n, h, w, 1 or 3) and n captions; None and [] if the inputs are no images.
    """
    shape = it.example_shape
    if len(shape) != 3 or shape[-1] not in (1, 3):
        return None, []
    host, _ = pipeline.read_batch(it.dataset.train, it.train_order(0))
    augmented = it.compile(step_lib.augmented, 0, {}, host)
    seen = jax.device_get(augmented(0, {}, host))
    images = np.clip(np.rint(seen["input"][:count] * 255), 0, 255).astype(np.uint8)
    return images, [_caption(it, target) for target in seen["target"][:count]]


def _caption(it: Run, target: np.ndarray) -> str:
    """Names the classes of a target, with their shares where they are mixed."""
    task, classes = it.recipe.task, it.dataset.classes
    if isinstance(task, Regression) or task.of_inputs:
        return f"{float(target):.3g}" if target.ndim == 0 else ""
    if isinstance(task, Binary):
        return f"{classes[task.positive]} {float(target):.0%}"
    shares = [(float(target[k]), classes[k]) for k in np.argsort(-target)[:2]]
    if shares[0][0] > 0.995:
        return shares[0][1]
    return " + ".join(f"{share:.0%} {name}" for share, name in shares if share > 0.005)


def write_contact_sheet(it: Run, path: Path, count: int = 64) -> int:
    """Writes the augmented pictures, eight in a row, as a PNG; returns how many.

    Raises:
      UsageError: the inputs are no images.
    """
    images, _ = examples(it, count)
    if images is None:
        raise UsageError(
            f"--preview shows images, and {it.config.data.name} holds"
            f" {it.example_shape}"
        )
    n, h, w, c = images.shape
    columns, rows = min(8, n), -(-n // 8)
    sheet = np.zeros((rows * columns, h, w, c), np.uint8)
    sheet[:n] = images
    sheet = sheet.reshape(rows, columns, h, w, c).swapaxes(1, 2)
    sheet = sheet.reshape(rows * h, columns * w, c)
    picture = Image.fromarray(sheet if c == 3 else sheet[..., 0])
    scale = max(1, 96 // h)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}")
    size = (picture.width * scale, picture.height * scale)
    picture.resize(size, Image.Resampling.NEAREST).save(beside, "PNG")
    beside.replace(path)
    return n

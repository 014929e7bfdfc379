"""The feature cache: what a frozen base makes of each example, computed once.

Where the base is frozen for the whole run and the augmentation gives each example one
view, or two that take turns, its features are a part of the data. The head trains on
them in the same steps: `step` sees by the data that they are features.
"""

import functools
import math
import time
from typing import TYPE_CHECKING, Any

import jax
import ml_collections
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from convnet import mesh as mesh_lib
from convnet import resolve
from convnet import step as step_lib
from convnet.data import pipeline
from convnet.data.order import EvalOrder
from convnet.errors import UsageError
from convnet.step import Recipe

if TYPE_CHECKING:
    from convnet.prepare import Run


class Cached(pipeline.Resident):
    """A split whose examples have passed the base.

    Attributes:
      data: `features` (views, n, ...), `label` (n, ...), `weight` (n,) on the devices.
    """

    def __init__(self, split: pipeline.Split, data: Any, mesh: Mesh) -> None:
        self.examples = split.examples
        self.bad = split.bad
        self._mesh = mesh
        self.data = mesh_lib.put_whole(mesh, data)


def views(config: ml_collections.ConfigDict) -> int:
    """Returns how many views of an example training sees; 0: no end of them."""
    settings = dict(config.augment.items())
    flip = settings.pop("flip")
    if flip == "random" or any(settings.values()):
        return 0
    return 2 if flip == "alternating" else 1


def wanted(
    config: ml_collections.ConfigDict,
    recipe: Recipe,
    mesh: Mesh,
    thaws: bool,
    shape: tuple[int, ...],
    examples: int,
) -> bool:
    """Whether the features are computed once, as config.transfer.cache_features says.

    "auto": where it is possible, spares work, and they fit into device memory.

    Args:
      config, recipe, mesh: of the run.
      thaws: whether what is frozen trains later on.
      shape: of an input, (1, *spatial, c).
      examples: of the training split.

    Raises:
      UsageError: "on", but it is not possible.
    """
    how = config.transfer.cache_features
    if how == "off" or recipe.task.of_inputs:
        return False
    count = views(config)
    why = ""
    if thaws or ("base",) not in recipe.frozen.layers:
        why = "the base trains: see transfer.freeze and transfer.thaw_epoch"
    elif not count:
        why = "the augmentation never repeats itself: only augment.flip = 'alternating'"
        why += " goes with it"
    elif config.reproducible:
        why = "with reproducible = True the features, which are computed in whole"
        why += " batches, would depend on the number of devices"
    if why:
        if how == "on":
            raise UsageError(f"transfer.cache_features is 'on', but {why}")
        return False
    features = shape_of(recipe, jax.ShapeDtypeStruct(shape, np.float32))
    size = count * examples * math.prod(features.shape) * features.dtype.itemsize
    seen = resolve.total_steps(config, examples) * config.data.batch_size
    spares = seen > count * examples
    return how == "on" or (spares and size <= pipeline.resident_bytes(mesh))


def shape_of(recipe: Recipe, example: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """Returns the features of one example (1, *spatial, c), which are (1, ...)."""

    def run(inputs: jax.Array) -> jax.Array:
        variables = recipe.model.init(recipe.key(0, 0), inputs, train=False)
        return recipe.model.apply(variables, inputs, False, method=step_lib.base)

    return jax.eval_shape(run, example)


def compute(it: "Run", split: pipeline.Split, name: str) -> Cached:
    """Passes a split through the base of `it.state`.

    Of the split "train" all views are computed, on the run's clock of training.
    """
    trains = name == "train"
    start, compiling = time.perf_counter(), it.compile_seconds
    order = EvalOrder(split.examples, it.config.data.batch_size)
    variables = {"params": it.state.params, "batch_stats": it.state.batch_stats}
    sides = []
    for flipped in (False, True)[: views(it.config) if trains else 1]:
        step = functools.partial(step_lib.extract_step, flipped=flipped)
        compiled, rows = None, []
        batches = split.batches(order, 0, len(order))
        for batch in tqdm(
            batches, "features", len(order), unit=" batches", delay=2, disable=None
        ):
            compiled = compiled or it.compile(
                step,
                variables,
                split.data,
                batch,
                out_shardings=mesh_lib.replicated(it.mesh),
            )
            rows.append(compiled(variables, split.data, batch))
            if len(rows) > 8:  # Batches under way take memory.
                jax.block_until_ready(rows[-8])
        host = jax.device_get(rows)
        sides.append(
            {k: np.concatenate([r[k] for r in host])[: split.examples] for k in host[0]}
        )
    if trains:
        compiling = it.compile_seconds - compiling
        it.train_seconds += time.perf_counter() - start - compiling
    features = np.stack([side["features"] for side in sides])
    return Cached(split, {**sides[0], "features": features}, it.mesh)

"""The train and predict steps: pure functions of state and batch."""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from convnet import gradient, optim, tta
from convnet import mesh as mesh_lib
from convnet.data import augment
from convnet.freezing import Frozen, merge
from convnet.task import Task

Batch = dict[str, jax.Array]


class TrainState(flax.struct.PyTreeNode):
    """All that changes from step to step.

    `ema` is None, or the moving average of params and batch_stats:
    {"params": ..., "batch_stats": ...}.
    """

    step: jax.Array
    params: Any
    batch_stats: Any
    opt_state: Any
    ema: Any

    def variables(self) -> dict[str, Any]:
        """Returns the variables to predict with: the averaged ones where there are."""
        if self.ema is not None:
            return self.ema
        return {"params": self.params, "batch_stats": self.batch_stats}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What stays the same from step to step.

    `mean` and `std` are in units of `to_unit`; `augment` has config.augment's keys. The
    optimizer is given the gradients of what is not frozen; those of what is `settled`,
    whose rate is 0 by now, are zeros that cost nothing. With `shards` the gradient is
    the sum over so many virtual shards of the batch, which lies on `mesh`.
    """

    model: nn.Module
    task: Task
    optimizer: optax.GradientTransformation
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augment: Any
    seed: int
    accumulate: int
    ema: float
    frozen: Frozen = Frozen()
    settled: Frozen = Frozen()
    shards: int = 0
    mesh: Mesh | None = None

    def key(self, stream: int, step: jax.Array | int) -> jax.Array:
        """Returns the key of one use of randomness (0 init, 1 augment, 2 dropout)."""
        return jax.random.fold_in(
            jax.random.fold_in(jax.random.key(self.seed), stream), step
        )


def create_state(
    recipe: Recipe, inputs: jax.Array, loaded: dict[str, Any] | None = None
) -> TrainState:
    """Initialises the state.

    Args:
      recipe: what stays the same.
      inputs: (n, *spatial, c), as many as `init_examples` says; most networks look at
        the shape alone.
      loaded: variables that are given, any part of {"params", "batch_stats"}.
    """
    normal = normalize(to_unit(inputs), recipe.mean, recipe.std)
    variables = recipe.model.init(recipe.key(0, 0), normal, train=False)
    variables = merge(variables, loaded or {})
    params = variables["params"]
    batch_stats = variables.get("batch_stats", {})
    ema = {"params": params, "batch_stats": batch_stats} if recipe.ema else None
    return TrainState(
        jnp.zeros((), jnp.int32),
        params,
        batch_stats,
        recipe.optimizer.init(params),
        # A copy: the state is donated, and a buffer can be donated only once.
        jax.tree.map(jnp.copy, ema),
    )


def to_unit(inputs: jax.Array) -> jax.Array:
    """uint8 0..255 -> float32 0..1; floats stay as they are, in float32."""
    if inputs.dtype == jnp.uint8:
        return inputs.astype(jnp.float32) / 255.0
    return inputs.astype(jnp.float32)


def normalize(
    inputs: jax.Array, mean: tuple[float, ...], std: tuple[float, ...]
) -> jax.Array:
    """(inputs - mean) / std, one number or one a channel (the last axis)."""
    scale = 1.0 / jnp.asarray(std, jnp.float32)
    return (inputs - jnp.asarray(mean, jnp.float32)) * scale


def materialize(data: Batch, batch: Batch) -> Batch:
    """Gathers a batch's examples from the resident split `data`, if they lie there.

    Of cached features, (views, n, ...), `batch` may say which view is meant.
    """
    if not data:
        return batch
    index = place = batch["index"]
    inputs = data.get("input")
    if is_cached(data):
        inputs = data["features"].reshape(-1, *data["features"].shape[2:])
        place = index + data["features"].shape[1] * batch.get("view", 0)
    return {
        **batch,
        "input": jnp.take(inputs, place, axis=0),
        "label": jnp.take(data["label"], index, axis=0),
        "weight": batch["weight"] * jnp.take(data["weight"], index, axis=0),
    }


def is_cached(data: Batch) -> bool:
    """Whether a split holds the features of its examples in place of the examples."""
    return "features" in data


def base(model: nn.Module, inputs: jax.Array, train: bool) -> jax.Array:
    """The part of a network that a method of `apply` runs alone: inputs to features."""
    return model.base(inputs, train)


def augmented(
    step: jax.Array | int, data: Batch, batch: Batch, *, recipe: Recipe
) -> Batch:
    """Returns the step's batch as training sees it, before normalisation.

    Returns:
      `input` float32 (b, *spatial, c) in units of `to_unit`, `target` float32 (b, ...),
      `weight` float32 (b,).
    """
    batch = materialize(data, batch)
    batch = {
        "input": to_unit(batch["input"]),
        "target": recipe.task.target(batch["label"]),
        "weight": batch["weight"],
        "index": batch["index"],
        "epoch": batch["epoch"],
    }
    batch = augment.apply(recipe.key(1, step), batch, recipe.augment)
    return {**batch, "target": batch["input"]} if recipe.task.of_inputs else batch


def network_batch(
    step: jax.Array | int, data: Batch, batch: Batch, *, recipe: Recipe
) -> Batch:
    """Returns the step's batch as the network sees it in training.

    `augmented`, with normalised inputs; of cached features, which are those of the one
    or of both mirror images, what `augmented` would have led to.
    """
    if not is_cached(data):
        batch = augmented(step, data, batch, recipe=recipe)
        return {**batch, "input": normalize(batch["input"], recipe.mean, recipe.std)}
    if len(data["features"]) == 2:
        flipped = augment.alternating_flips(batch["index"], batch["epoch"])
        batch = {**batch, "view": flipped.astype(jnp.int32)}
    batch = materialize(data, batch)
    return {**batch, "target": recipe.task.target(batch["label"])}


def train_step(
    state: TrainState, data: Batch, batch: Batch, *, recipe: Recipe
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update.

    Args:
      state: donated by the caller.
      data: the resident split, or {}.
      batch: `index`, `epoch`, `weight` (b,), and the examples if `data` is empty.
      recipe: what stays the same.

    Returns:
      The next state, and scalars: `count` (the sum of weights), sums of the task's
      metrics over the batch, `objective` (the minimised loss) and `grad_norm` (of what
      is neither frozen nor settled).
    """
    batch = network_batch(state.step, data, batch, recipe=recipe)
    trained, rest = recipe.frozen.split(state.params)
    moving, settled = recipe.settled.split(trained)
    grads, batch_stats, metrics = gradient.of_batch(
        recipe,
        mesh_lib.gathered(recipe.mesh, (moving, merge(rest, settled))),
        state.batch_stats,
        batch,
        recipe.key(2, state.step),
        cached=is_cached(data),
    )
    grads = mesh_lib.scattered(recipe.mesh, grads)
    grads = merge(grads, jax.tree.map(jnp.zeros_like, settled))
    updates, opt_state = recipe.optimizer.update(grads, state.opt_state, state.params)
    trained = optax.apply_updates(trained, updates)
    params, ema = merge(trained, rest), state.ema
    if ema is not None:
        averaged, still = recipe.frozen.split(ema["params"])
        ema = optim.ema_update(
            {"params": averaged, "batch_stats": ema["batch_stats"]},
            {"params": trained, "batch_stats": batch_stats},
            recipe.ema,
            state.step,
        )
        ema["params"] = merge(ema["params"], still)
    metrics |= {"count": batch["weight"].sum(), "grad_norm": optim.global_norm(grads)}
    return TrainState(state.step + 1, params, batch_stats, opt_state, ema), metrics


def init_examples(recipe: Recipe) -> int:
    """Returns how many training inputs the network measures its first layer on."""
    return getattr(recipe.model.base, "init_examples", 1)


def train_steps(
    state: TrainState, data: Batch, batches: Batch, *, recipe: Recipe
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Several updates in one program: one dispatch keeps an accelerator busy for long.

    Args:
      state: as in `train_step`.
      data: likewise.
      batches: of `train_step`, stacked: (steps, b).
      recipe: as in `train_step`.

    Returns:
      The last state, and the metrics of each step, (steps,).
    """

    def one(state: TrainState, batch: Batch) -> Any:
        return train_step(state, data, batch, recipe=recipe)

    return jax.lax.scan(one, state, batches)


def predict_step(
    variables: dict[str, Any],
    data: Batch,
    batch: Batch,
    *,
    recipe: Recipe,
    views: str = "none",
) -> dict[str, jax.Array]:
    """Predicts a batch, from the mean of the logits for `tta.VIEWS` of it.

    Returns:
      `index` (b,), `prediction` (b, ...), `label` (b, ...), `weight` (b,), and the
      task's metrics, each (b,).
    """
    batch = materialize(data, batch)
    variables = mesh_lib.gathered(recipe.mesh, variables)
    apply = functools.partial(recipe.model.apply, variables, train=False)
    if is_cached(data):
        logits = apply(batch["input"], method=gradient.head)
    else:
        inputs = normalize(to_unit(batch["input"]), recipe.mean, recipe.std)
        logits = tta.logits(apply, inputs, views)
    target = recipe.task.target(batch["label"])
    if recipe.task.of_inputs:
        target = to_unit(batch["input"])
    return {
        "index": batch["index"],
        "prediction": recipe.task.predict(logits),
        "label": batch["label"],
        "weight": batch["weight"],
        **recipe.task.metrics(logits, target),
    }


def extract_step(
    variables: dict[str, Any],
    data: Batch,
    batch: Batch,
    *,
    recipe: Recipe,
    flipped: bool,
) -> Batch:
    """Passes a batch, or its mirror images, through the base alone.

    Returns:
      `features` (b, ...), `label` (b, ...) and `weight` (b,).
    """
    batch = materialize(data, batch)
    inputs = to_unit(batch["input"])
    if flipped:
        inputs = augment.flip(inputs, jnp.ones(len(inputs), bool))
    inputs = normalize(inputs, recipe.mean, recipe.std)
    features = recipe.model.apply(variables, inputs, train=False, method=base)
    return {
        "features": features,
        "label": batch["label"],
        "weight": batch["weight"],
    }

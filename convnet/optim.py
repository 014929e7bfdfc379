"""Optimizers, learning-rate schedules, weight-decay mask, EMA of the parameters.

Whatever depends on time is computed from the step count inside the optimizer's own
state, so that a checkpoint of that state is all that is needed to go on.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from convnet import muon

OPTIMIZERS = ("sgd", "adamw", "lamb", "muon")
SCHEDULES = ("constant", "cosine", "linear", "one_cycle", "step")

Schedule = Callable[[ArrayLike], jax.Array]


def create(
    optimizer: Any, schedule: Any, total_steps: int, start: int = 0
) -> tuple[optax.GradientTransformation, Schedule]:
    """Build the optimizer and its learning-rate schedule.

    In every optimizer gradients are first clipped to the global norm `clip_norm` (0:
    not at all), and in all but muon `weight_decay` acts on the leaves of
    `weight_decay_mask` only.

    - `sgd`: PyTorch's: decay is added to the gradient (coupled), then
      buffer = momentum * buffer + gradient, and the update is lr * buffer, or with
      `nesterov` lr * (gradient + momentum * buffer).
    - `adamw`: Loshchilov and Hutter 2019, arXiv:1711.05101; decoupled decay, multiplied
      by the current lr as in PyTorch; epsilon 1e-8.
    - `lamb`: You et al. 2020, arXiv:1904.00962; epsilon 1e-6. As in the authors' code,
      leaves without decay (biases, norm scales) have a trust ratio of 1.
    - `muon`: see `convnet.muon`; the head, the biases and all other vectors go through
      `sgd` with rates and a momentum of their own.

    `momentum` is beta1 of Adam's moments; `beta2` their second decay; `nesterov` counts
    for sgd and muon.

    Args:
        optimizer: the section of the config.
        schedule: has name, warmup, steps, factor, final; see `create_schedule`. Or the
            schedule itself: index of an update -> learning rate.
        total_steps: number of updates of the whole run.
        start: how many of them came before this optimizer's first.

    Returns:
        The transformation, whose updates are to be added to the parameters, and the
        schedule: index of an update, from 0, -> learning rate, a float32 scalar.

    Raises:
        ValueError: an unknown name or a number outside its range.
    """
    schedule_fn = schedule
    if not callable(schedule):
        schedule_fn = create_schedule(schedule, optimizer.lr, total_steps)

    def rate(count: ArrayLike) -> jax.Array:
        return schedule_fn(count + start)

    clipped = [clip(optimizer.clip_norm)] if optimizer.clip_norm else []
    if optimizer.name == "muon":
        rule = muon.create(optimizer, rate, total_steps, start)
        return optax.chain(*clipped, rule) if clipped else rule, schedule_fn
    adam = {"b1": optimizer.momentum, "b2": optimizer.beta2}
    trace = optax.trace(optimizer.momentum, nesterov=optimizer.nesterov)
    decay = optax.identity()
    if optimizer.weight_decay:
        decay = optax.add_decayed_weights(optimizer.weight_decay, weight_decay_mask)
    if optimizer.name == "sgd":
        rule = [decay, trace]
    elif optimizer.name == "adamw":
        rule = [optax.scale_by_adam(**adam), decay]
    elif optimizer.name == "lamb":
        trust = optax.masked(optax.scale_by_trust_ratio(), weight_decay_mask)
        rule = [optax.scale_by_adam(**adam, eps=1e-6), decay, trust]
    else:
        raise ValueError(
            f"optimizer.name is {optimizer.name!r}: known are {', '.join(OPTIMIZERS)}"
        )
    rule = [*clipped, *rule, optax.scale_by_learning_rate(rate)]
    return optax.chain(*rule), schedule_fn


def settled(
    optimizer: Any, total_steps: int, paths: Iterable[str]
) -> tuple[int, frozenset[str]]:
    """Returns the step from which on some parameters no longer move, and which.

    Their rate is 0 then, so that nobody needs their gradients: those of a first layer
    are dear. They no longer count in the norm that `clip_norm` clips. (0, none) where
    all move to the end.

    Args:
        optimizer: the section of the config.
        total_steps: number of updates of the whole run.
        paths: of all parameters, such as "base/stem/whiten/bias".
    """
    if optimizer.name != "muon":
        return 0, frozenset()
    return muon.settled(optimizer, total_steps, paths)


def global_norm(tree: Any) -> jax.Array:
    """Returns the root of the sum of all squares, float32 ()."""
    # Without the barriers XLA puts the sums of some leaves into one loop, those that
    # happen to be near, and adds in another order there.
    sums = [
        jax.lax.optimization_barrier(jnp.sum(jnp.square(leaf)))
        for leaf in jax.tree.leaves(tree)
    ]
    return jnp.sqrt(jnp.sum(jnp.stack(sums)))


def clip(most: float) -> optax.GradientTransformation:
    """Scales updates down to a global norm of `most` (Pascanu et al. 2013)."""

    def update(updates: Any, params: Any) -> Any:
        del params
        scale = jnp.minimum(1.0, most / jnp.maximum(global_norm(updates), 1e-30))
        return jax.tree.map(lambda leaf: scale * leaf, updates)

    return optax.stateless(update)


def scaled(
    optimizer: optax.GradientTransformation, factors: Mapping[str, float]
) -> optax.GradientTransformation:
    """Multiplies the updates of some leaves: layer-wise learning rates.

    Args:
        optimizer: any.
        factors: by the paths of leaves, "base/stem/conv/kernel"; others have 1.
    """
    if not factors:
        return optimizer

    def scale(path: tuple, update: jax.Array) -> jax.Array:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return factors.get(name, 1.0) * update

    return optax.chain(
        optimizer,
        optax.stateless(lambda updates, _: jax.tree.map_with_path(scale, updates)),
    )


def create_schedule(schedule: Any, lr: float, total_steps: int) -> Schedule:
    """Build the map from the index of an update to its learning rate.

    The first w = round(warmup * total_steps) updates rise linearly,
    lr * (s + 1) / (w + 1) for update s, so that the first is above 0 and update w is
    the first at the full lr. After them, with p = (s - w) / (total_steps - w):

    - `constant`: lr.
    - `cosine`: lr * (final + (1 - final) * (1 + cos(pi * p)) / 2), Loshchilov and
      Hutter 2017, arXiv:1608.03983, without restarts.
    - `linear`: lr * (1 - (1 - final) * p).
    - `one_cycle`: the same, a line up and a line down, Smith 2018, arXiv:1803.09820;
      `warmup` 0 means 0.3. Momentum is not cycled.
    - `step`: lr * factor ** (number of `steps` passed); the drop at fraction f counts
      from update round(f * total_steps) on.

    The value `final` * lr belongs to s = total_steps, one after the last update, so
    that no update is lost when `final` is 0; it is kept from there on.

    Args:
        schedule: has name, warmup, steps, factor, final.
        lr: the highest learning rate.
        total_steps: number of updates of the whole run.

    Returns:
        A function of an integer (or an int32 scalar under jit), float32 scalar out.

    Raises:
        ValueError: an unknown name or a number outside its range.
    """
    name, final = schedule.name, schedule.final
    if name not in SCHEDULES:
        raise ValueError(f"schedule.name is {name!r}: known are {', '.join(SCHEDULES)}")
    if total_steps < 1:
        raise ValueError(f"total_steps is {total_steps}: it must be at least 1")
    if not 0 <= schedule.warmup < 1:
        raise ValueError(
            f"schedule.warmup is {schedule.warmup}: it is a fraction of all steps, "
            "0 or more and below 1"
        )
    if not all(0 < fraction < 1 for fraction in schedule.steps):
        raise ValueError(
            f"schedule.steps is {tuple(schedule.steps)}: they are fractions of all "
            "steps, each between 0 and 1"
        )
    warmup = schedule.warmup or (0.3 if name == "one_cycle" else 0.0)
    warmup_steps = round(warmup * total_steps)
    decay_steps = max(total_steps - warmup_steps, 1)
    drops = [round(fraction * total_steps) for fraction in schedule.steps]

    def learning_rate(step: ArrayLike) -> jax.Array:
        step = jnp.asarray(step).astype(jnp.float32)
        value = lr * jnp.minimum((step + 1) / (warmup_steps + 1), 1.0)
        progress = jnp.clip((step - warmup_steps) / decay_steps, 0.0, 1.0)
        if name == "cosine":
            value *= final + (1 - final) * (1 + jnp.cos(jnp.pi * progress)) / 2
        elif name in ("linear", "one_cycle"):
            value *= 1 - (1 - final) * progress
        elif name == "step":
            for drop in drops:
                value *= jnp.where(step >= drop, schedule.factor, 1.0)
        return value

    return learning_rate


def weight_decay_mask(params: Any) -> Any:
    """True for each leaf with more than one axis: kernels, not biases or norm scales.

    Args:
        params: a tree of arrays (or their ShapeDtypeStruct).

    Returns:
        A tree of bool of the same structure.
    """
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


def ema_update(ema: Any, params: Any, decay: float, step: ArrayLike) -> Any:
    """One step of the exponential moving average of the parameters.

    ema = d * ema + (1 - d) * params with d = min(decay, (1 + step) / (10 + step)): the
    average starts short and grows, so that the initial parameters are soon forgotten
    (a fixed decay of 0.999 would hold on to them for thousands of steps).

    Args:
        ema: the average so far; a copy of the initial params at the start.
        params: the parameters after the update, the same tree, float32.
        decay: the final decay, 0 to 1.
        step: index of the update, from 0; an integer or an int32 scalar.

    Returns:
        The new average, the same tree.
    """
    step = jnp.asarray(step).astype(jnp.float32)
    share = 1 - jnp.minimum(decay, (1 + step) / (10 + step))
    return jax.tree.map(lambda old, new: old + share * (new - old), ema, params)

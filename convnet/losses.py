"""Per-example losses: pure functions of logits and targets, float32 out.

Each returns one number per example and leaves the reduction to the caller, who knows
which examples of a padded batch count. Logits may be bfloat16; the arithmetic is
float32.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike


def cross_entropy(
    logits: ArrayLike,
    targets: ArrayLike,
    label_smoothing: float = 0.0,
    class_weights: ArrayLike | None = None,
) -> jax.Array:
    """Softmax cross-entropy with soft targets, in nats.

    Args:
        logits: (b, k).
        targets: (b, k) probabilities: one-hot, or mixed by mixup or CutMix.
        label_smoothing: share of the target spread evenly over all k classes, the true
            one included (Szegedy et al. 2015, arXiv:1512.00567, section 7).
        class_weights: (k,) or None. An example weighs sum_k targets_k * weights_k,
            with the targets before smoothing. Nothing is normalised here: a weighted
            mean that divides by the number of examples is the caller's choice.

    Returns:
        (b,) float32.

    Raises:
        ValueError: logits and targets, or class_weights, differ in shape.
    """
    logits, targets = _same_shape(logits, targets, "logits")
    k = logits.shape[-1]
    smoothed = (1.0 - label_smoothing) * targets + label_smoothing / k
    losses = -jnp.sum(smoothed * jax.nn.log_softmax(logits), axis=-1)
    if class_weights is None:
        return losses
    return losses * _example_weights(targets, class_weights)


def binary_cross_entropy(
    logits: ArrayLike,
    targets: ArrayLike,
    label_smoothing: float = 0.0,
    class_weights: ArrayLike | None = None,
) -> jax.Array:
    """Sigmoid cross-entropy of one logit per example, in nats.

    Equal to `cross_entropy` on the two logits (0, x) and targets (1 - t, t), in its
    label smoothing (a target t becomes (1 - s) t + s / 2) and class weights as well.

    Args:
        logits: (b,), the log-odds of the positive class.
        targets: (b,) probabilities of the positive class.
        label_smoothing: see `cross_entropy`; k is 2.
        class_weights: (2,) for the negative and the positive class, or None.

    Returns:
        (b,) float32.

    Raises:
        ValueError: logits and targets, or class_weights, differ in shape.
    """
    logits, targets = _same_shape(logits, targets, "logits")
    smoothed = (1.0 - label_smoothing) * targets + label_smoothing / 2
    # Both terms through log_sigmoid: neither cancels nor overflows for large logits.
    losses = -smoothed * jax.nn.log_sigmoid(logits)
    losses -= (1.0 - smoothed) * jax.nn.log_sigmoid(-logits)
    if class_weights is None:
        return losses
    pair = jnp.stack([1.0 - targets, targets], axis=-1)
    return losses * _example_weights(pair, class_weights)


def squared_error(predictions: ArrayLike, targets: ArrayLike) -> jax.Array:
    """Squared error, the mean over all axes but the first.

    Args:
        predictions: (b, ...).
        targets: the same shape. (b, 1) against (b,) is an error, not a broadcast.

    Returns:
        (b,) float32, in the target's unit squared.

    Raises:
        ValueError: predictions and targets differ in shape.
    """
    predictions, targets = _same_shape(predictions, targets, "predictions")
    errors = jnp.square(predictions - targets)
    return jnp.mean(errors, axis=tuple(range(1, errors.ndim)))


def _same_shape(
    outputs: ArrayLike, targets: ArrayLike, name: str
) -> tuple[jax.Array, jax.Array]:
    outputs = jnp.asarray(outputs).astype(jnp.float32)
    targets = jnp.asarray(targets).astype(jnp.float32)
    if outputs.shape != targets.shape:
        raise ValueError(
            f"{name} have shape {outputs.shape} and targets {targets.shape}: "
            "they must be the same"
        )
    return outputs, targets


def _example_weights(targets: jax.Array, class_weights: ArrayLike) -> jax.Array:
    """(b, k) targets and (k,) weights -> (b,)."""
    class_weights = jnp.asarray(class_weights).astype(jnp.float32)
    k = targets.shape[-1]
    if class_weights.shape != (k,):
        raise ValueError(
            f"class_weights have shape {class_weights.shape}: "
            f"give one weight for each of the {k} classes"
        )
    # Not a matmul: accelerators would round the weights to bfloat16 or TF32.
    return jnp.sum(targets * class_weights[None, :], axis=-1)

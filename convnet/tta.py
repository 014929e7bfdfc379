"""Test-time augmentation: a prediction averaged over views of the input.

- `none`: the input alone.
- `flip`: the mean over the input and its mirror image.
- `flip_translate`: six views, in which the input and its mirror image count half, and
  the other half goes to both of them moved by one pixel up and left, and by one down
  and right (Jordan 2024, arXiv:2404.00498, section 3.5).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

VIEWS = ("none", "flip", "flip_translate")


def logits(
    apply: Callable[[jax.Array], jax.Array], inputs: jax.Array, views: str
) -> jax.Array:
    """Returns the averaged logits, of the shape of `apply(inputs)`.

    Args:
      apply: normalised inputs (b, *spatial, c) -> logits (b, ...).
      inputs: normalised; the last spatial axis is the one that is mirrored.
      views: one of `VIEWS`.

    Raises:
      ValueError: unknown views; a side of one pixel, which cannot be moved by one; or
        `apply` predicts maps, which would have to be moved back.
    """
    if views not in VIEWS:
        raise ValueError(f"views {views!r}: want one of {', '.join(VIEWS)}")
    if views == "none":
        return apply(inputs)
    both = [inputs, jnp.flip(inputs, -2)]
    if views == "flip":
        return _mean(apply, both, [0.5, 0.5])
    if min(inputs.shape[1:-1]) < 2:
        raise ValueError(
            f"flip_translate moves inputs by a pixel, but theirs is {inputs.shape[1:]}"
        )
    border = [(0, 0), *[(1, 1)] * (inputs.ndim - 2), (0, 0)]
    padded = jnp.pad(inputs, border, mode="reflect")
    for start in (0, 2):
        within = [slice(start, start + side) for side in inputs.shape[1:-1]]
        moved = padded[(slice(None), *within)]
        both += [moved, jnp.flip(moved, -2)]
    return _mean(apply, both, [0.25] * 2 + [0.125] * 4)


def _mean(
    apply: Callable[[jax.Array], jax.Array],
    views: list[jax.Array],
    shares: list[float],
) -> jax.Array:
    # One after the other: together they would need their number times the memory.
    found = [apply(view) for view in views]
    if found[0].ndim > 2:
        raise ValueError(
            "the views would move the input but not what is predicted, a map of shape"
            f" {found[0].shape[1:]}: average over none"
        )
    return sum(share * one for one, share in zip(found, shares, strict=True))

"""What is minimised: content, style and smoothness of a picture.

Gatys, Ecker and Bethge 2016, "Image style transfer using convolutional neural
networks". The content of a picture is its maps at a few taps, the style is the Gram
matrices of others: which features occur together, wherever that is.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from convnet import mesh
from convnet.style.features import Features

Terms = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Weights:
    """What content, style and total variation count in the loss."""

    content: float
    style: float
    tv: float


class Targets(NamedTuple):
    """What a picture is compared with.

    Attributes:
      content: {tap: (h, w, c)}.
      style: {tap: (c, c)}, Gram matrices.
      scales: {"content" or "style": {tap: number}}, what a layer's mean square counts.
    """

    content: dict[str, jax.Array]
    style: dict[str, jax.Array]
    scales: dict[str, dict[str, jax.Array]]


class Evaluation(NamedTuple):
    """The loss, its weighted terms (they add up to it), and its gradient (h, w, c)."""

    loss: jax.Array
    terms: Terms
    gradient: jax.Array


def correlations(features: jax.Array) -> jax.Array:
    """(h, w, c) -> (c, c): sums of products of two features over all places."""
    flat = features.reshape(-1, features.shape[-1])
    return jnp.dot(flat.T, flat, precision="highest")


def gram(features: jax.Array) -> jax.Array:
    """(h, w, c) -> (c, c): the Gram matrix, divided by the number of values h w c."""
    return correlations(features) / features.size


def total_variation(picture: jax.Array) -> jax.Array:
    """(h, w, c) -> the mean squared difference between neighbours, both directions.

    Mahendran and Vedaldi 2015, equation 4 with beta = 2.
    """
    down = jnp.diff(picture, axis=0)
    right = jnp.diff(picture, axis=1)
    return jnp.mean(jnp.square(down)) + jnp.mean(jnp.square(right))


def content_loss(maps: Mapping[str, jax.Array], targets: Targets) -> jax.Array:
    """The sum over taps of the scaled mean squared difference of maps."""
    return sum(
        targets.scales["content"][name] * jnp.mean(jnp.square(maps[name] - wanted))
        for name, wanted in targets.content.items()
    )


def style_loss(grams: Mapping[str, jax.Array], targets: Targets) -> jax.Array:
    """The sum over taps of the scaled mean squared difference of Gram matrices."""
    return sum(
        targets.scales["style"][name] * jnp.mean(jnp.square(grams[name] - wanted))
        for name, wanted in targets.style.items()
    )


def scales(
    content: Mapping[str, jax.Array], style: Mapping[str, jax.Array], relative: bool
) -> dict[str, dict[str, jax.Array]]:
    """Returns `Targets.scales`.

    Relative: the mean over the layers of the error relative to the target's mean
    square, so that weights mean the same whatever a network's activations are like.
    Otherwise 1: plain mean squares, summed over layers.
    """
    one = jnp.float32(1)

    def scale(arrays: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        if not relative:
            return {name: one for name in arrays}
        return {
            name: 1 / (len(arrays) * jnp.maximum(jnp.mean(jnp.square(array)), 1e-12))
            for name, array in arrays.items()
        }

    return {"content": scale(content), "style": scale(style)}


def weighted(
    maps: Mapping[str, jax.Array],
    picture: jax.Array,
    targets: Targets,
    weights: Weights,
) -> Terms:
    """The terms of the loss of a picture (h, w, c), given its maps at the taps."""
    grams = {name: gram(maps[name]) for name in targets.style}
    return {
        "content": weights.content * content_loss(maps, targets),
        "style": weights.style * style_loss(grams, targets),
        "tv": weights.tv * total_variation(picture),
    }


class Objective:
    """The loss of a picture and its gradient, compiled once.

    Args:
      features: with the taps of content and style among its names.
      content: (h, w, 3 or 1) floats, 0 to 1: the picture whose content is kept.
      style: the picture whose style is taken, of any size.
      taps: names for content, names for style.
      weights: of the terms.
      relative: see `scales`.

    Attributes:
      targets: what pictures are compared with.
      run: the compiled function of (variables, picture, targets) that gives ((loss,
        terms), gradient).
    """

    def __init__(
        self,
        features: Features,
        content: jax.Array,
        style: jax.Array,
        taps: tuple[tuple[str, ...], tuple[str, ...]],
        weights: Weights,
        relative: bool = True,
    ) -> None:
        self._variables, self._weights = features.variables, weights
        maps = compiled(features.only(taps[0]))(self._variables, content)
        styles = compiled(features.only(taps[1]))(self._variables, style)
        grams = {name: gram(array) for name, array in styles.items()}
        self.targets = Targets(maps, grams, scales(maps, grams, relative))
        self._features = features.only(*taps)
        self.run = compiled(jax.value_and_grad(self._loss, 1, has_aux=True))

    def _loss(
        self, variables: Any, picture: jax.Array, targets: Targets
    ) -> tuple[jax.Array, Terms]:
        maps = self._features(variables, picture)
        terms = weighted(maps, picture, targets, self._weights)
        return sum(terms.values()), terms

    def __call__(self, picture: jax.Array) -> Evaluation:
        """Evaluates a picture (h, w, c) of the content's shape, floats."""
        (loss, terms), gradient = self.run(self._variables, picture, self.targets)
        return Evaluation(loss, terms, gradient)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`jit` with the options that pay on this platform."""
    return jax.jit(
        function, compiler_options=mesh.compiler_options(jax.default_backend())
    )

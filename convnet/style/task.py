"""The task of a network that paints: every picture is compared with itself.

Johnson, Alahi and Fei-Fei 2016, "Perceptual losses for real-time style transfer and
super-resolution", arXiv:1603.08155. The loss of what the network made of a picture is
that of `objective`, with the picture as content and one style for all of them.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from convnet import checkpoint, transfer
from convnet.errors import ConvnetError, UsageError
from convnet.style import features as features_lib
from convnet.style import objective, pictures
from convnet.style.features import Features
from convnet.style.objective import Terms, Weights
from convnet.task import Task


@dataclasses.dataclass(frozen=True, eq=False)
class Style(Task):
    """Content, style and smoothness of painted pictures.

    Attributes:
      features: of the frozen network, with both kinds of taps among its names.
      content: names of the taps for the content.
      weights: of the terms.
      digest: of the network and the style's picture.
      held: {"variables": the network's, "grams": {tap: (c, c)} of the style's picture}.
    """

    features: Features
    content: tuple[str, ...]
    weights: Weights
    digest: str
    held: Any = dataclasses.field(repr=False)
    name = "style"
    num_outputs = 3
    of_inputs = True

    def holding(self, held: Any) -> "Style":
        """Returns the task with these arrays in the place of its own."""
        return dataclasses.replace(self, held=held)

    def fingerprint(self) -> dict[str, Any]:
        """Returns the hash of the network and of the style's picture."""
        return {"style": {"sha256": self.digest}}

    def target(self, labels: jax.Array) -> jax.Array:
        """Nothing: labels are ignored."""
        return jnp.zeros(len(labels))

    def loss(self, logits: jax.Array, target: jax.Array) -> jax.Array:
        """The weighted sum of `terms`, (b,)."""
        return sum(self.terms(logits, target).values())

    def metrics(self, logits: jax.Array, target: jax.Array) -> dict[str, jax.Array]:
        """Returns the loss and its terms, each (b,)."""
        terms = self.terms(logits, target)
        return {"loss": sum(terms.values()), **terms}

    def predict(self, logits: jax.Array) -> jax.Array:
        """(b, h, w, 3), 0 to 1 -> uint8: a test split of pictures is kept."""
        return jnp.rint(255 * jnp.clip(logits, 0, 1)).astype(jnp.uint8)

    def terms(self, painted: jax.Array, wanted: jax.Array) -> Terms:
        """The weighted terms of the loss, each (b,).

        Args:
          painted: (b, h, w, 3), what the network made.
          wanted: of what, (b, h, w, 3 or 1), 0 to 1.
        """
        variables, grams = self.held["variables"], self.held["grams"]
        maps = self.features.of_batch(variables, painted.astype(jnp.float32))
        kept = self.features.only(self.content).of_batch(variables, wanted)

        def of_one(maps: Any, picture: jax.Array, kept: Any) -> Terms:
            scales = objective.scales(kept, grams, relative=True)
            targets = objective.Targets(kept, grams, scales)
            return objective.weighted(maps, picture, targets, self.weights)

        return jax.vmap(of_one)(maps, painted, kept)


def create(config: ml_collections.ConfigDict, example: np.ndarray) -> Style:
    """Reads the network of config.task.features, and config.task.style_image.

    Args:
      config: of the run.
      example: an input.

    Raises:
      UsageError: a key is empty, or names what is not there.
      ConvnetError: a file cannot be used, or the data are no pictures.
    """
    settings = config.task
    for name in ("style_image", "features"):
        if not settings[name]:
            raise UsageError(f"task.{name} is '', but task.name = 'style' needs it")
    if example.ndim != 3 or example.shape[-1] != 3 or example.dtype != np.uint8:
        raise ConvnetError(
            f"task.name is 'style', but the data of data.name = {config.data.name!r}"
            f" are {example.dtype} {list(example.shape)}: want RGB pictures, uint8"
        )
    bundle = transfer.load("task.features", settings.features)
    features = features_lib.create(bundle, origin="task.features")
    taps = features_lib.choose(
        features, settings.content_layers, settings.style_layers, "task."
    )
    features = features.only(*taps)
    features.shapes(*example.shape[:2])
    pixels = pictures.read("config.task.style_image", settings.style_image)
    digest = checkpoint.sha256({"variables": bundle.variables, "style": pixels})
    size = settings.style_size or max(example.shape[:2])
    style = pictures.resize(pixels, pictures.sides(pixels.shape, size))
    features.only(taps[1]).shapes(*style.shape[:2])
    maps = objective.compiled(features.only(taps[1]))(features.variables, style)
    grams = {name: objective.gram(array) for name, array in maps.items()}
    weights = Weights(
        settings.content_weight, settings.style_weight, settings.tv_weight
    )
    held = {"variables": features.variables, "grams": grams}
    return Style(features, taps[0], weights, digest, held)

"""A small network and pictures for the tests of style transfer."""

import jax
import jax.numpy as jnp
import numpy as np
from numpy_layers import draw_variables

from convnet import bundle as bundle_lib
from convnet import models

YIQ = np.linalg.inv(
    [[1, 0.956, 0.619], [1, -0.272, -0.647], [1, -1.106, 1.703]]
)  # another source's constants, of three digits


def make_bundle(name, channels=3, **options):
    model = models.create(name, num_outputs=2, **options)
    rng = np.random.default_rng(0)
    shape = (32, 32, channels)
    variables = draw_variables(model, np.zeros((1, *shape), np.float32), rng)
    return bundle_lib.Bundle(
        architecture={"name": name, "num_outputs": 2, "options": options},
        task={"name": "classification", "positive": None},
        classes=("a", "b"),
        preprocessing={
            "input_shape": shape,
            "input_dtype": "uint8",
            "resize": "crop",
            "mean": (0.4,) * channels,
            "std": (0.3,) * channels,
        },
        provenance={},
        variables=variables,
    )


def small_vgg():
    return make_bundle("vgg11", width=2, dense=(), gather="global", pool="average")


def smooth(shape, seed):
    """A picture, float32, whose values lie well within 0 and 1."""
    coarse = np.random.default_rng(seed).uniform(0.2, 0.8, (5, 7, 3))
    image = jax.image.resize(jnp.asarray(coarse, jnp.float32), (*shape, 3), "linear")
    return jnp.asarray(image)

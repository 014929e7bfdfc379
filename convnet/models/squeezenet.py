"""SqueezeNet 1.1 (Iandola et al. 2016, "SqueezeNet", arXiv:1602.07360).

Version 1.1, the authors' own revision, in torchvision's layout. There is no dense
layer: the head is a 1x1 convolution, a ReLU and the mean over all places.
"""

import jax.numpy as jnp
from flax import linen as nn

from convnet.models import layers, pooling
from convnet.models.intermediates import tap, tapped
from convnet.models.layers import Array, Dtype

# Stages, each of which ends in a pool but the last: the features of a fire module's
# squeeze and of each of its two expansions, in units of a sixteenth of the whole.
_STAGES = (
    ((1, 4), (1, 4)),
    ((2, 8), (2, 8)),
    ((3, 12), (3, 12), (4, 16), (4, 16)),
)


class SqueezeNetBase(nn.Module):
    """The stem and stages of fire modules; the features are a map.

    `width` is the number of features of the stem, four times that of the first squeeze.
    """

    width: int = 64
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        del train
        x = Stem(self.width, self.dtype, name="stem")(x.astype(self.dtype))
        for i, fires in enumerate(_STAGES, 1):
            fires = tuple(
                (max(1, squeeze * self.width // 4), max(1, expand * self.width // 4))
                for squeeze, expand in fires
            )
            pool = i < len(_STAGES)
            x = Stage(fires, pool, self.dtype, name=f"stage{i}")(x)
        return tap(self, "features", x)


class Stem(nn.Module):
    """A convolution and a pool to a quarter of the sides."""

    width: int
    dtype: Dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        conv = layers.Conv(
            self.width, stride=2, padding="VALID", dtype=self.dtype, name="conv"
        )
        x = tap(self, "relu", nn.relu(tapped(self, conv, x)))
        return tap(self, "pool", pooling.max_pool(x, 3, 2, ceil=True))


class Stage(nn.Module):
    """Fire modules, and a pool where there is one."""

    fires: tuple[tuple[int, int], ...]
    pool: bool
    dtype: Dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        for i, (squeeze, expand) in enumerate(self.fires, 1):
            x = Fire(squeeze, expand, self.dtype, name=f"fire{i}")(x)
        if self.pool:
            x = tap(self, "pool", pooling.max_pool(x, 3, 2, ceil=True))
        return x


class Fire(nn.Module):
    """A 1x1 convolution to few features; then 1x1 and 3x3 side by side."""

    squeeze: int
    expand: int
    dtype: Dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        def convolve(x: Array, features: int, kernel: int, i: int) -> Array:
            conv = layers.Conv(features, kernel, dtype=self.dtype, name=f"conv{i}")
            return tap(self, f"relu{i}", nn.relu(tapped(self, conv, x)))

        x = convolve(x, self.squeeze, 1, 1)
        sides = [convolve(x, self.expand, 1, 2), convolve(x, self.expand, 3, 3)]
        return tap(self, "concat", jnp.concatenate(sides, -1))


class SqueezeHead(nn.Module):
    """Float32 logits `(b, num_outputs)`, none below zero, from a map of features."""

    num_outputs: int
    dropout: float = 0.5
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        x = nn.Dropout(self.dropout, deterministic=not train, name="dropout")(x)
        start = nn.initializers.normal(0.01)
        conv = layers.Conv(
            self.num_outputs, 1, dtype=self.dtype, kernel_init=start, name="conv"
        )
        x = tap(self, "relu", nn.relu(tapped(self, conv, x)))
        return tap(self, "logits", pooling.global_average(x.astype(jnp.float32)))


def squeezenet(
    num_outputs: int,
    dtype: Dtype,
    *,
    width: int = 64,
    dropout: float = 0.5,
) -> layers.Classifier:
    """SqueezeNet 1.1, whose stem has `width` features."""
    base = SqueezeNetBase(width, dtype)
    return layers.Classifier(base, SqueezeHead(num_outputs, dropout, dtype))

"""A network that paints: a picture in, a picture of the same size out.

Johnson, Alahi and Fei-Fei 2016, "Perceptual losses for real-time style transfer and
super-resolution", arXiv:1603.08155, as their supplement describes it, with the changes
that became usual: instance normalisation, mirrored edges, and in the place of strided
transposed convolutions, whose checkerboards show, enlarging and then convolving (Odena,
Dumoulin and Olah 2016, "Deconvolution and checkerboard artifacts").
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from convnet.models import layers
from convnet.models.intermediates import tap, tapped
from convnet.models.layers import Array, Dtype

_EDGE, _KERNEL, _BLOCKS = 9, 3, 5
# Small, so that the first pictures are grey: where tanh is flat nothing is learnt.
_last_init = nn.initializers.variance_scaling(0.05, "fan_in", "truncated_normal")


class StyleBase(nn.Module):
    """To a quarter of the sides, residual blocks, and back; the features are a map.

    `(b, *spatial, c) -> (b, *spatial, width)`, for sides of five pixels and more.
    """

    width: int = 32
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        w, dtype, sizes = self.width, self.dtype, []
        x = Stage(w, _EDGE, dtype=dtype, name="stem")(x.astype(dtype), train)
        for i, features in enumerate((2 * w, 4 * w), 1):
            sizes.append(x.shape[1:-1])
            x = Stage(features, stride=2, dtype=dtype, name=f"stage{i}")(x, train)
        x = Residuals(dtype, name="stage3")(x, train)
        for i, features in enumerate((2 * w, w), 4):
            x = enlarge(x, sizes.pop())
            x = Stage(features, dtype=dtype, name=f"stage{i}")(x, train)
        return tap(self, "features", x)


class Stage(nn.Module):
    """A convolution, instance normalisation and ReLU."""

    features: int
    kernel: int = _KERNEL
    stride: int = 1
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        conv = convolution(self.features, self.kernel, self.stride, self.dtype, "conv")
        norm = layers.InstanceNorm(dtype=self.dtype, name="norm")
        x = tapped(self, conv, x)
        return layers.normalize_and_activate(self, norm, x, train, "relu", "relu")


class Residuals(nn.Module):
    """Five blocks, each of which adds to its input what two convolutions make of it."""

    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        for i in range(1, _BLOCKS + 1):
            x = Residual(self.dtype, name=f"block{i}")(x, train)
        return x


class Residual(nn.Module):
    """A block without a ReLU after the sum, as Johnson et al. have them."""

    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        convs = [
            convolution(x.shape[-1], _KERNEL, 1, self.dtype, f"conv{i}") for i in (1, 2)
        ]
        norms = [layers.InstanceNorm(dtype=self.dtype, name=f"norm{i}") for i in (1, 2)]
        y = tapped(self, convs[0], x)
        y = layers.normalize_and_activate(self, norms[0], y, train, "relu", "relu1")
        y = tapped(self, norms[1], tapped(self, convs[1], y), train)
        return tap(self, "add", x + y)


def convolution(
    features: int, kernel: int, stride: int, dtype: Dtype, name: str
) -> layers.Conv:
    """A convolution over mirrored edges; without a bias, for a norm follows."""
    return layers.Conv(
        features, kernel, stride, "REFLECT", use_bias=False, dtype=dtype, name=name
    )


def enlarge(x: Array, size: tuple[int, ...]) -> Array:
    """Doubles each side by repeating what is there, and cuts off the odd row."""
    for axis, side in enumerate(size, 1):
        x = jax.lax.slice_in_dim(jnp.repeat(x, 2, axis), 0, side, axis=axis)
    return x


class StyleHead(nn.Module):
    """From features to a picture: float32 `(b, *spatial, num_outputs)`, 0 to 1."""

    num_outputs: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        del train
        conv = layers.Conv(
            self.num_outputs,
            _EDGE,
            padding="REFLECT",
            dtype=self.dtype,
            kernel_init=_last_init,
            name="conv",
        )
        x = tapped(self, conv, x).astype(jnp.float32)
        return tap(self, "picture", 0.5 * (1 + jnp.tanh(x)))


def stylenet(num_outputs: int, dtype: Dtype, *, width: int = 32) -> layers.Classifier:
    """The network, whose first layer has `width` features, and its middle four times
    as many."""
    return layers.Classifier(StyleBase(width, dtype), StyleHead(num_outputs, dtype))

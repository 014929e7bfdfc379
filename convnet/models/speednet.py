"""A network for 32x32 images that learns in few steps: airbench's.

Jordan 2024, "94% on CIFAR-10 in 3.29 seconds on a single GPU", arXiv:2404.00498, in the
form that Muon trains (github.com/KellerJordan/cifar10-airbench).
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn

from convnet.models import layers, pooling
from convnet.models.intermediates import tap, tapped
from convnet.models.layers import Array, Dtype

_WHITEN_KERNEL = 2
_WHITEN_EPSILON = 5e-4
# Of the running statistics: a run has too few steps for 0.9.
_BN_MOMENTUM = 0.6
_BN_EPSILON = 1e-12


class SpeedNetBase(nn.Module):
    """Whitening, groups of two convolutions, a pool over 3x3 places.

    Images of 32x32 leave a map of 3x3 for the last pool, and so one place.
    """

    # How many training inputs `init` wants to see: the whitening is measured on them.
    init_examples = 5000

    widths: Sequence[int]
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        x = Stem(self.dtype, name="stem")(x)
        for i, width in enumerate(self.widths, 1):
            x = Group(width, self.dtype, name=f"group{i}")(x, train)
        try:
            x = tap(self, "pool", pooling.max_pool(x, 3))
        except ValueError as error:
            raise ValueError(f"the last pool: {error}") from None
        return tap(self, "features", pooling.gather(x, "flatten"))


class Stem(nn.Module):
    """Whitening and GELU."""

    dtype: Dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = tapped(self, Whiten(self.dtype, name="whiten"), x)
        return tap(self, "gelu", layers.gelu(x))


class Whiten(nn.Module):
    """2x2 patches of the input, decorrelated and scaled to unit variance.

    The kernel holds the eigenvectors of the patches' second moments, each divided by
    the root of its eigenvalue, and the negatives of all of them: `(2, 2, c, 8 c)`. It
    is computed from the inputs that `init` sees, lies among the batch statistics, and
    is not trained; the bias `(8 c,)` is.
    """

    dtype: Dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        if x.ndim != 4 or min(x.shape[1:3]) < _WHITEN_KERNEL:
            raise ValueError(
                "speednet takes images (b, h, w, c) of at least 2x2, not inputs of"
                f" shape {x.shape}"
            )
        kernel = self.variable("batch_stats", "kernel", whitening_kernel, x)
        features = kernel.value.shape[-1]
        bias = self.param("bias", nn.initializers.zeros, (features,), jnp.float32)
        x = x.astype(self.dtype)
        y = layers.convolve(x, kernel.value.astype(self.dtype), padding="VALID")
        return layers.add_bias(y, bias)


def whitening_kernel(inputs: Array) -> Array:
    """The kernel of `Whiten` for inputs (b, h, w, c), float32 (2, 2, c, 8 c)."""
    k, c = _WHITEN_KERNEL, inputs.shape[-1]
    rows, columns = (side - k + 1 for side in inputs.shape[1:3])
    patches = [
        inputs[:, i : i + rows, j : j + columns] for i in range(k) for j in range(k)
    ]
    patches = jnp.stack(patches, -2).reshape(-1, k * k * c).astype(jnp.float32)
    moments = jnp.dot(patches.T, patches, precision="highest") / len(patches)
    values, vectors = jnp.linalg.eigh(moments)
    # Rounding leaves an eigenvalue of zero on either side of it.
    scaled = vectors / jnp.sqrt(jnp.maximum(values, 0.0) + _WHITEN_EPSILON)
    return jnp.concatenate([scaled, -scaled], 1).reshape(k, k, c, -1)


class Group(nn.Module):
    """Convolution, pool, norm, GELU, convolution, norm, GELU; halves the sides."""

    width: int
    dtype: Dtype

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        conv = partial(
            layers.Conv,
            self.width,
            padding=1,
            use_bias=False,
            dtype=self.dtype,
            kernel_init=dirac_init,
        )
        norm = partial(
            layers.BatchNorm,
            _BN_MOMENTUM,
            _BN_EPSILON,
            use_scale=False,
            dtype=self.dtype,
        )
        x = tapped(self, conv(name="conv1"), x)
        try:
            x = tap(self, "conv_pool1", pooling.max_pool(x, 2))
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from None
        normalize = layers.normalize_and_activate
        x = normalize(self, norm(name="norm1"), x, train, "gelu", "gelu1")
        x = tapped(self, conv(name="conv2"), x)
        return normalize(self, norm(name="norm2"), x, train, "gelu", "gelu2")


def dirac_init(key: Array, shape: Sequence[int], dtype: Dtype) -> Array:
    """Kernels whose first `c` features pass the input on; the others are random.

    Uniform within 1 / sqrt(fan-in), as PyTorch's convolutions start. A convolution with
    fewer features than channels passes on as many as it has.
    """
    *window, c, features = shape
    fan_in = c * jnp.prod(jnp.array(window))
    kernel = jax.random.uniform(key, shape, dtype, -1.0, 1.0) / jnp.sqrt(fan_in)
    passed = min(c, features)
    centre = tuple(side // 2 for side in window)
    kernel = kernel.at[..., :passed].set(0.0)
    return kernel.at[(*centre, jnp.arange(passed), jnp.arange(passed))].set(1.0)


class SpeedHead(nn.Module):
    """Float32 logits `(b, num_outputs)`, divided by the number of features.

    The kernel starts with a standard deviation of one; there is no bias.
    """

    num_outputs: int

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        del train
        logits = nn.Dense(
            self.num_outputs,
            use_bias=False,
            dtype=jnp.float32,
            kernel_init=nn.initializers.normal(1.0),
            name="logits",
        )
        return tap(self, "logits", logits(x) / x.shape[-1])


def speednet(
    num_outputs: int,
    dtype: Dtype,
    *,
    widths: Sequence[int] = (64, 256, 256),
) -> layers.Classifier:
    """airbench94's network; `widths` are the features of its groups."""
    base = SpeedNetBase(widths, dtype)
    return layers.Classifier(base, SpeedHead(num_outputs))

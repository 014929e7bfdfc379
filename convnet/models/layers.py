"""Convolution, normalisation and the dense head: the one place where each lives.

All take arrays `(b, *spatial, c)` with one to four spatial axes. Parameters and
statistics are float32 whatever dtype a layer computes in.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from convnet.models import depthwise, fused, lowering
from convnet.models.intermediates import observed, tap, tapped

Array = jax.Array
Dtype = Any

# He, Zhang, Ren and Sun 2015, "Delving deep into rectifiers", equation 10: the variance
# of the activations is kept from layer to layer when each layer is followed by a ReLU.
he_init = nn.initializers.variance_scaling(2.0, "fan_in", "truncated_normal")


# Paddings that are not zeros, and what NumPy calls them.
_AROUND = {"CIRCULAR": "wrap", "REFLECT": "reflect"}


def convolve(
    x: Array,
    kernel: Array,
    stride: int | Sequence[int] = 1,
    padding: str | int = "SAME",
    groups: int = 1,
) -> Array:
    """Cross-correlates `x` `(b, *spatial, c)` with `kernel` `(*k, c, features)`.

    Of `groups` of channels each has its own features: the kernel is `(*k, c / groups,
    features)`. With as many groups as channels the convolution is depthwise.

    `padding` is "SAME", "VALID", "CIRCULAR" (the axes are periodic), "REFLECT" (they
    are mirrored at their ends; both: an even kernel looks one further ahead than back,
    as in SAME), or the number of zeros at either end of each axis. The last is how
    PyTorch pads: at stride 2 it differs from SAME, which puts the odd zero at the end.
    """
    rank = x.ndim - 2
    size, stride = kernel.shape[:-2], _per_axis(stride, rank)
    if padding in _AROUND:
        around = [((k - 1) // 2, k // 2) for k in size]
        x = jnp.pad(x, [(0, 0), *around, (0, 0)], mode=_AROUND[padding])
        padding = "VALID"
    if isinstance(padding, int):
        pads = [(padding, padding)] * rank
    else:
        pads = lax.padtype_to_pads(x.shape[1:-1], size, stride, padding)
    if groups == x.shape[-1] == kernel.shape[-1] and depthwise.pays(size):
        return depthwise.convolve(x, kernel, stride, tuple(map(tuple, pads)))
    if rank == 2 and groups == 1:
        return lowering.convolve2d(x, kernel, stride, pads)
    if rank <= 3:
        axes = "DHW"[-rank:]
        layout = (f"N{axes}C", f"{axes}IO", f"N{axes}C")
        return lax.conv_general_dilated(
            x,
            kernel,
            stride,
            pads,
            dimension_numbers=layout,
            feature_group_count=groups,
        )
    # cuDNN stops at three spatial axes. The window of the first axis becomes channels
    # (of the same group), and each of its places an example of its own.
    x = jnp.pad(x, [(0, 0), pads[0]] + [(0, 0)] * rank)
    places = (x.shape[1] - size[0]) // stride[0] + 1
    stop = (places - 1) * stride[0] + 1
    x = jnp.stack([x[:, i : i + stop : stride[0]] for i in range(size[0])], axis=-1)
    kernel = jnp.moveaxis(kernel, 0, -2)  # (*k[1:], c / groups, k[0], features)
    kernel = kernel.reshape(*size[1:], -1, kernel.shape[-1])
    b, t = x.shape[:2]
    x = jnp.pad(x.reshape(*x.shape[:-2], -1), [(0, 0), (0, 0), *pads[1:], (0, 0)])
    y = convolve(x.reshape(b * t, *x.shape[2:]), kernel, stride[1:], "VALID", groups)
    return y.reshape(b, t, *y.shape[1:])


def _per_axis(value: int | Sequence[int], rank: int) -> tuple[int, ...]:
    result = (value,) * rank if isinstance(value, int) else tuple(value)
    if len(result) != rank:
        raise ValueError(f"{result} has {len(result)} numbers for {rank} spatial axes")
    return result


class Conv(nn.Module):
    """A convolution `(b, *spatial, c) -> (b, *spatial', features)` in `dtype`.

    Parameters, float32: `kernel` `(*k, c / groups, features)`, He's initialisation, and
    with `use_bias` a `bias` `(features,)` of zeros. See `convolve` for `padding`.
    """

    features: int
    kernel: int | Sequence[int] = 3
    stride: int | Sequence[int] = 1
    padding: str | int = "SAME"
    use_bias: bool = True
    dtype: Dtype = jnp.float32
    kernel_init: Callable[..., Array] = he_init
    groups: int = 1

    @nn.compact
    def __call__(self, x: Array, scale: Array | float = 1.0) -> Array:
        """Convolves; `scale` (features,) is taken into the kernel."""
        size = _per_axis(self.kernel, x.ndim - 2)
        shape = (*size, x.shape[-1] // self.groups, self.features)
        kernel = scale * self.param("kernel", self.kernel_init, shape, jnp.float32)
        x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
        y = convolve(x, kernel, self.stride, self.padding, self.groups)
        if self.use_bias:
            zeros, shape = nn.initializers.zeros, (self.features,)
            bias = self.param("bias", zeros, shape, jnp.float32)
            y = add_bias(y, scale * bias)
        return y


def add_bias(y: Array, bias: Array) -> Array:
    """Adds float32 `bias` (c,) to `y` (..., c), in the dtype of `y`."""
    if lowering.on("cpu"):
        return fused.add_bias(y, bias)
    return y + bias.astype(y.dtype)


class BatchNorm(nn.Module):
    """Batch normalisation over all axes but the last (Ioffe and Szegedy 2015).

    Computed in float32, returned in `dtype`. The collection `batch_stats` keeps `mean`
    and the biased variance `var`: `new = momentum * old + (1 - momentum) * batch`.
    PyTorch's momentum is one minus ours, and the variance it keeps is the unbiased one.
    """

    momentum: float = 0.9
    epsilon: float = 1e-5
    dtype: Dtype = jnp.float32
    scale_init: Callable[..., Array] = nn.initializers.ones
    use_scale: bool = True

    @nn.compact
    def __call__(self, x: Array, train: bool, activation: str = "none") -> Array:
        c = x.shape[-1:]
        scale = jnp.ones(c, jnp.float32)
        if self.use_scale:
            scale = self.param("scale", self.scale_init, c, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, c, jnp.float32)
        mean = self.variable("batch_stats", "mean", jnp.zeros, c, jnp.float32)
        var = self.variable("batch_stats", "var", jnp.ones, c, jnp.float32)
        if train and lowering.on("cpu", "gpu"):
            y, mu, sigma2 = fused.batch_norm(x, scale, bias, self.epsilon, activation)
        else:
            wide = x.astype(jnp.float32)
            mu, sigma2 = mean.value, var.value
            if train:
                axes = tuple(range(x.ndim - 1))
                mu = jnp.mean(wide, axes)
                # Not mean(x^2) - mean(x)^2, which saves a pass over the array and loses
                # all digits where the mean is large against the spread.
                sigma2 = jnp.mean(jnp.square(wide - mu), axes)
            y = (wide - mu) * (scale * lax.rsqrt(sigma2 + self.epsilon)) + bias
            y = fused.activate(y, activation)
        if train and not self.is_initializing():
            m = self.momentum
            mean.value = m * mean.value + (1 - m) * mu
            var.value = m * var.value + (1 - m) * sigma2
        return y.astype(self.dtype)

    def affine(self) -> tuple[Array, Array]:
        """Returns scale and shift, float32 (c,): all that it is outside training."""
        stats = self.get_variable("batch_stats", "var")
        scale = lax.rsqrt(stats + self.epsilon)
        if self.use_scale:
            scale *= self.get_variable("params", "scale")
        mean = self.get_variable("batch_stats", "mean")
        return scale, self.get_variable("params", "bias") - mean * scale


class InstanceNorm(nn.Module):
    """Normalisation of each channel of each example over its places, then `activation`.

    Ulyanov, Vedaldi and Lempitsky 2016, arXiv:1607.08022. It is the same in training
    and after. Computed in float32, returned in `dtype`; params `scale` and `bias` (c,).
    """

    epsilon: float = 1e-5
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, train: bool, activation: str = "none") -> Array:
        del train
        c = x.shape[-1:]
        scale = self.param("scale", nn.initializers.ones, c, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, c, jnp.float32)
        if lowering.on("cpu", "gpu"):

            def alone(x: Array) -> Array:
                return fused.batch_norm(x, scale, bias, self.epsilon, activation)[0]

            return jax.vmap(alone)(x).astype(self.dtype)
        wide, axes = x.astype(jnp.float32), tuple(range(1, x.ndim - 1))
        mean = jnp.mean(wide, axes, keepdims=True)
        variance = jnp.mean(jnp.square(wide - mean), axes, keepdims=True)
        y = (wide - mean) * (scale * lax.rsqrt(variance + self.epsilon)) + bias
        return fused.activate(y, activation).astype(self.dtype)


def convolve_and_normalize(
    parent: nn.Module,
    conv: Conv,
    norm: BatchNorm,
    x: Array,
    train: bool,
    activation: str = "none",
    name: str = "",
) -> Array:
    """Calls `conv`, `norm` and the activation, which `parent` taps under `name`.

    Outside training the norm is a scale, which goes into the kernel, and a shift:
    ResNet-50 in float32 infers 1.17 times as fast on a CPU. Unless somebody looks at
    what lies between, or asks for the plain form.
    """
    if train or lowering.is_plain() or observed(parent, conv.name, norm.name):
        x = tapped(parent, conv, x)
        if not name:
            return tapped(parent, norm, x, train)
        return normalize_and_activate(parent, norm, x, train, activation, name)
    scale, shift = norm.affine()
    y = conv(x, scale).astype(jnp.float32) + shift
    y = fused.activate(y, activation).astype(norm.dtype)
    return tap(parent, name, y) if name else y


def normalize_and_activate(
    parent: nn.Module,
    norm: BatchNorm | InstanceNorm,
    x: Array,
    train: bool,
    activation: str,
    name: str,
) -> Array:
    """Calls `norm` and the activation, which `parent` taps under `name`.

    In one pass, unless somebody looks at what lies between the two.
    """
    if observed(parent, norm.name):
        y = tapped(parent, norm, x, train)
        y = fused.activate(y.astype(jnp.float32), activation).astype(y.dtype)
    else:
        y = norm(x, train, activation)
    return tap(parent, name, y)


def gelu(x: Array) -> Array:
    """GELU in its tanh form (Hendrycks and Gimpel 2016, arXiv:1606.08415)."""
    if lowering.on("cpu", "gpu"):
        return fused.gelu(x)
    return fused.activate(x.astype(jnp.float32), "gelu").astype(x.dtype)


class Head(nn.Module):
    """Dense layers with ReLU and dropout, then float32 logits `(..., num_outputs)`.

    Dropout (Srivastava et al. 2014) follows each hidden layer, as in VGG; without
    hidden layers it acts on the features.
    """

    num_outputs: int
    dense: Sequence[int] = ()
    dropout: float = 0.0
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        def drop(x: Array, name: str) -> Array:
            return nn.Dropout(self.dropout, deterministic=not train, name=name)(x)

        if not self.dense:
            x = drop(x, "dropout")
        for i, width in enumerate(self.dense, 1):
            dense = nn.Dense(
                width, dtype=self.dtype, kernel_init=he_init, name=f"dense{i}"
            )
            x = tap(self, f"relu{i}", nn.relu(tapped(self, dense, x)))
            x = drop(x, f"dropout{i}")
        logits = nn.Dense(self.num_outputs, dtype=jnp.float32, name="logits")
        return tapped(self, logits, x)


class Classifier(nn.Module):
    """A convolutional base, which ends in features, and a dense head on top of it.

    Variables, float32: params `{"base", "head"}`, and with batch norm batch_stats
    `{"base"}`. Inputs are normalised floats `(b, *spatial, c)`. Logits are float32,
    `(b, num_outputs)`, or a map of them where the base gathers "time".
    """

    base: nn.Module
    head: nn.Module

    def __call__(self, inputs: Array, train: bool = False) -> Array:
        if not 3 <= inputs.ndim <= 6:
            raise ValueError(
                f"inputs of shape {inputs.shape} are not (b, *spatial, c) with one to"
                " four spatial axes"
            )
        return self.head(self.base(inputs, train), train)

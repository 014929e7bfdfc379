"""Residual networks (He, Zhang, Ren and Sun 2015, "Deep residual learning").

The variant is torchvision's, known as v1.5: a bottleneck strides in its 3x3
convolution. In that of Keras it strides in its first 1x1 convolution, as in the paper;
the convolutions have biases, and batch norm another epsilon. Padding is symmetric. The
last scale of each branch starts at zero, so that every block starts as its shortcut
(Goyal et al. 2017, section 5.1).
"""

from collections.abc import Sequence
from functools import partial

import jax.numpy as jnp
from flax import linen as nn

from convnet.models import layers, pooling
from convnet.models.intermediates import tap, tapped
from convnet.models.layers import Array, Dtype

# name: (residual blocks in each stage, whether they are bottlenecks)
STAGES = {
    "resnet18": ((2, 2, 2, 2), False),
    "resnet34": ((3, 4, 6, 3), False),
    "resnet50": ((3, 4, 6, 3), True),
    "resnet101": ((3, 4, 23, 3), True),
}
_KERAS_EPSILON = 1.001e-5


class ResNetBase(nn.Module):
    """The stem, stages of residual blocks, and the mean over all places.

    Each stage after the first halves the sides and doubles the width.
    """

    stages: Sequence[int]
    bottleneck: bool
    width: int = 64
    stem: str = "cifar"
    bn_momentum: float = 0.9
    dtype: Dtype = jnp.float32
    variant: str = "torchvision"

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        keras = self.variant == "keras"
        epsilon = _KERAS_EPSILON if keras else 1e-5
        norm = partial(layers.BatchNorm, self.bn_momentum, epsilon, dtype=self.dtype)
        conv = partial(_conv, use_bias=keras, dtype=self.dtype)
        x = Stem(self.width, self.stem, conv, norm, name="stem")(x, train)
        block = partial(ResidualBlock, conv=conv, norm=norm, stride_first=keras)
        for i, blocks in enumerate(self.stages):
            width, stride = self.width * 2**i, 1 if i == 0 else 2
            block = partial(block, width=width, bottleneck=self.bottleneck)
            x = Stage(blocks, stride, block, name=f"stage{i + 1}")(x, train)
        return tap(self, "features", pooling.global_average(x))


class Stem(nn.Module):
    """3x3 for small images ("cifar"), or 7x7 and a pool to a quarter ("imagenet")."""

    width: int
    kind: str
    conv: partial
    norm: partial

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        kernel, stride = (7, 2) if self.kind == "imagenet" else (3, 1)
        conv = self.conv(self.width, kernel, stride, name="conv")
        norm = self.norm(name="norm")
        x = layers.convolve_and_normalize(self, conv, norm, x, train, "relu", "relu")
        if self.kind == "imagenet":
            x = tap(self, "pool", pooling.max_pool(x, 3, stride=2, padding=1))
        return x


class Stage(nn.Module):
    """Residual blocks, of which the first strides."""

    blocks: int
    stride: int
    block: partial

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        for i in range(self.blocks):
            stride = self.stride if i == 0 else 1
            block = self.block(stride=stride, name=f"block{i + 1}")
            x = block(x, train)
        return x


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions, or 1x1, 3x3, 1x1 to four times the width; plus the input.

    The input passes a 1x1 convolution where its shape differs from the branch's.
    """

    width: int
    bottleneck: bool
    conv: partial
    norm: partial
    stride: int
    stride_first: bool = False  # of a bottleneck: in its 1x1 convolution

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        w, s = self.width, self.stride
        plan = [(w, 3, s), (w, 3, 1)]  # features, kernel, stride
        if self.bottleneck:
            first, second = (s, 1) if self.stride_first else (1, s)
            plan = [(w, 1, first), (w, 3, second), (4 * w, 1, 1)]
        y, both = x, layers.convolve_and_normalize
        for i, (features, kernel, stride) in enumerate(plan, 1):
            conv = self.conv(features, kernel, stride, name=f"conv{i}")
            if i < len(plan):
                norm = self.norm(name=f"norm{i}")
                y = both(self, conv, norm, y, train, "relu", f"relu{i}")
            else:
                zero = nn.initializers.zeros
                norm = self.norm(scale_init=zero, name=f"norm{i}")
                y = both(self, conv, norm, y, train)
        if x.shape != y.shape:
            conv = self.conv(y.shape[-1], 1, s, name="shortcut_conv")
            x = both(self, conv, self.norm(name="shortcut_norm"), x, train)
        return tap(self, "relu", nn.relu(tap(self, "add", x + y)))


class ResNet9Base(nn.Module):
    """A small network for 32x32 images: pools instead of strides, two residual blocks.

    After D. Page 2018, "How to train your ResNet". The pool comes before the norm,
    which then has a quarter of the work. `width` is the stem's; the stages have two,
    four and eight times as much.
    """

    width: int = 64
    bn_momentum: float = 0.9
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        norm = partial(layers.BatchNorm, self.bn_momentum, dtype=self.dtype)
        conv = partial(_conv, use_bias=False, dtype=self.dtype)
        x = Stem(self.width, "cifar", conv, norm, name="stem")(x, train)
        for i, residual in enumerate((True, False, True), 1):
            width = self.width * 2**i
            x = PoolStage(width, residual, conv, norm, name=f"stage{i}")(x, train)
        return tap(self, "features", pooling.global_average(x))


class PoolStage(nn.Module):
    """A 3x3 convolution and a pool to half the sides; then a residual block or none."""

    width: int
    residual: bool
    conv: partial
    norm: partial

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        x = tapped(self, self.conv(self.width, 3, 1, name="conv"), x)
        x = tap(self, "conv_pool", pooling.max_pool(x, 2))
        norm = self.norm(name="norm")
        x = layers.normalize_and_activate(self, norm, x, train, "relu", "relu")
        if not self.residual:
            return x
        block = ResidualBlock(self.width, False, self.conv, self.norm, 1, name="block")
        return block(x, train)


def _conv(
    features: int, kernel: int, stride: int, *, use_bias: bool, dtype: Dtype, name: str
) -> layers.Conv:
    return layers.Conv(
        features,
        kernel,
        stride,
        padding=kernel // 2,
        use_bias=use_bias,
        dtype=dtype,
        name=name,
    )


def resnet(
    name: str,
    num_outputs: int,
    dtype: Dtype,
    *,
    width: int = 64,
    stem: str = "cifar",
    dense: Sequence[int] = (),
    dropout: float = 0.0,
    bn_momentum: float = 0.9,
    variant: str = "torchvision",
) -> layers.Classifier:
    """One of `STAGES`; `width` is the number of features of stem and first stage."""
    stages, bottleneck = STAGES[name]
    base = ResNetBase(stages, bottleneck, width, stem, bn_momentum, dtype, variant)
    return layers.Classifier(base, layers.Head(num_outputs, dense, dropout, dtype))


def resnet9(
    num_outputs: int,
    dtype: Dtype,
    *,
    width: int = 64,
    dense: Sequence[int] = (),
    dropout: float = 0.0,
    bn_momentum: float = 0.9,
) -> layers.Classifier:
    """A small residual network for small images; see `ResNet9Base`."""
    base = ResNet9Base(width, bn_momentum, dtype)
    return layers.Classifier(base, layers.Head(num_outputs, dense, dropout, dtype))

"""MobileNetV2 (Sandler et al. 2018, "Inverted residuals and linear bottlenecks").

The variant is torchvision's; that of Keras pads a convolution with a stride at the end
of an axis first (SAME), and its batch norm has another epsilon.
"""

from collections.abc import Sequence
from functools import partial

import jax.numpy as jnp
from flax import linen as nn

from convnet.models import layers, pooling
from convnet.models.intermediates import tap
from convnet.models.layers import Array, Dtype

# Table 2 of the paper: expansion, features, blocks, stride of the first.
_STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
_STEM, _LAST = 32, 1280


class MobileNetV2Base(nn.Module):
    """The stem, seven stages of inverted residuals, a 1x1 convolution, and the mean.

    `width` is the number of features of the stem; the others are in proportion, rounded
    to multiples of 8, and the last has never less than 1,280.
    """

    width: int = _STEM
    variant: str = "torchvision"
    bn_momentum: float = 0.9
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        keras = self.variant == "keras"
        norm = partial(
            layers.BatchNorm,
            self.bn_momentum,
            1e-3 if keras else 1e-5,
            dtype=self.dtype,
        )
        conv = partial(
            layers.Conv,
            padding="SAME" if keras else 1,
            use_bias=False,
            dtype=self.dtype,
        )
        scale = self.width / _STEM
        unit = partial(Unit, conv=conv, norm=norm)
        x = unit(_round(_STEM * scale), kernel=3, stride=2, name="stem")(x, train)
        for i, (expansion, features, blocks, stride) in enumerate(_STAGES, 1):
            block = partial(
                InvertedResidual, _round(features * scale), expansion, conv, norm
            )
            x = Stage(blocks, stride, block, name=f"stage{i}")(x, train)
        last = unit(_round(_LAST * max(1.0, scale)), name=f"stage{len(_STAGES) + 1}")
        return tap(self, "features", pooling.global_average(last(x, train)))


class Unit(nn.Module):
    """Convolution, batch norm, ReLU6."""

    features: int
    conv: partial
    norm: partial
    kernel: int = 1
    stride: int = 1

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        pad = {} if self.kernel > 1 else {"padding": 0}
        conv = self.conv(self.features, self.kernel, self.stride, name="conv", **pad)
        norm = self.norm(name="norm")
        return layers.convolve_and_normalize(
            self, conv, norm, x, train, "relu6", "relu"
        )


class Stage(nn.Module):
    """Inverted residuals, of which the first strides."""

    blocks: int
    stride: int
    block: partial

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        for i in range(self.blocks):
            block = self.block(self.stride if i == 0 else 1, name=f"block{i + 1}")
            x = block(x, train)
        return x


class InvertedResidual(nn.Module):
    """1x1 to more features, depthwise 3x3, 1x1 to few; plus the input where it fits.

    With an expansion of 1 the first convolution is left out.
    """

    features: int
    expansion: int
    conv: partial
    norm: partial
    stride: int

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        wide = x.shape[-1] * self.expansion
        plan = [
            {"features": wide, "kernel": 1, "padding": 0},
            {"features": wide, "kernel": 3, "stride": self.stride, "groups": wide},
            {"features": self.features, "kernel": 1, "padding": 0},
        ]
        if self.expansion == 1:
            del plan[0]
        y = x
        for i, about in enumerate(plan, 1):
            conv = self.conv(**about, name=f"conv{i}")
            norm = self.norm(name=f"norm{i}")
            activated = ("relu6", f"relu{i}") if i < len(plan) else ()
            y = layers.convolve_and_normalize(self, conv, norm, y, train, *activated)
        return tap(self, "add", x + y) if x.shape == y.shape else y


def _round(features: float) -> int:
    """The nearest multiple of 8, but not less than nine tenths of `features`."""
    nearest = max(8, int(features + 4) // 8 * 8)
    return nearest + 8 if nearest < 0.9 * features else nearest


def mobilenet_v2(
    num_outputs: int,
    dtype: Dtype,
    *,
    width: int = _STEM,
    dense: Sequence[int] = (),
    dropout: float = 0.2,
    bn_momentum: float = 0.9,
    variant: str = "torchvision",
) -> layers.Classifier:
    """MobileNetV2; `width` is 32 times the multiplier of the paper."""
    base = MobileNetV2Base(width, variant, bn_momentum, dtype)
    return layers.Classifier(base, layers.Head(num_outputs, dense, dropout, dtype))

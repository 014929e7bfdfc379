"""ConvNeXt-Tiny (Liu et al. 2022, "A ConvNet for the 2020s", arXiv:2201.03545)."""

from collections.abc import Sequence
from functools import partial

import jax.numpy as jnp
from flax import linen as nn

from convnet.models import layers, pooling
from convnet.models.intermediates import tap, tapped
from convnet.models.layers import Array, Dtype

_BLOCKS = (3, 3, 9, 3)
# The factor of each feature of a branch starts at this.
_LAYER_SCALE = 1e-6

_kernel_init = nn.initializers.truncated_normal(0.02)


class ConvNeXtBase(nn.Module):
    """A stem of 4x4 patches, four stages, the mean over all places, and its norm.

    Each stage after the first begins with a convolution to half the sides and twice the
    width.
    """

    width: int = 96
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        del train
        x = x.astype(self.dtype)
        norm = partial(
            nn.LayerNorm, epsilon=1e-6, dtype=self.dtype, use_fast_variance=False
        )
        patches = partial(
            layers.Conv, padding="VALID", dtype=self.dtype, kernel_init=_kernel_init
        )
        x = Stem(partial(patches, self.width, 4, 4), norm, name="stem")(x)
        for i, blocks in enumerate(_BLOCKS, 1):
            if i > 1:
                conv = partial(patches, 2 * x.shape[-1], 2, 2)
                x = Downsample(conv, norm, name=f"downsample{i}")(x)
            x = Stage(blocks, norm, self.dtype, name=f"stage{i}")(x)
        x = tapped(self, norm(name="norm"), pooling.global_average(x))
        return tap(self, "features", x)


class Stem(nn.Module):
    """A convolution of patches, then its norm."""

    conv: partial
    norm: partial

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = tapped(self, self.conv(name="conv"), x)
        return tapped(self, self.norm(name="norm"), x)


class Downsample(nn.Module):
    """A norm, then a convolution of patches."""

    conv: partial
    norm: partial

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = tapped(self, self.norm(name="pre_norm"), x)
        return tapped(self, self.conv(name="conv"), x)


class Stage(nn.Module):
    """Blocks of one width."""

    blocks: int
    norm: partial
    dtype: Dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        for i in range(1, self.blocks + 1):
            x = Block(self.norm, self.dtype, name=f"block{i}")(x)
        return x


class Block(nn.Module):
    """Depthwise 7x7, norm, dense layers to four times the width and back; plus x."""

    norm: partial
    dtype: Dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        c = x.shape[-1]
        init = {"dtype": self.dtype, "kernel_init": _kernel_init}
        y = tapped(self, layers.Conv(c, 7, padding=3, groups=c, name="conv", **init), x)
        y = tapped(self, self.norm(name="norm"), y)
        y = tapped(self, nn.Dense(4 * c, name="expand", **init), y)
        y = tap(self, "gelu", nn.gelu(y, approximate=False))
        y = tapped(self, nn.Dense(c, name="project", **init), y)
        y = tapped(self, LayerScale(self.dtype, name="layer_scale"), y)
        return tap(self, "add", x + y)


class LayerScale(nn.Module):
    """A learnt factor for each feature (Touvron et al. 2021, arXiv:2103.17239)."""

    dtype: Dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        start = nn.initializers.constant(_LAYER_SCALE)
        scale = self.param("scale", start, x.shape[-1:], jnp.float32)
        return x * scale.astype(self.dtype)


def convnext_tiny(
    num_outputs: int,
    dtype: Dtype,
    *,
    width: int = 96,
    dense: Sequence[int] = (),
    dropout: float = 0.0,
) -> layers.Classifier:
    """ConvNeXt with 3, 3, 9 and 3 blocks, the first of which are `width` wide."""
    base = ConvNeXtBase(width, dtype)
    return layers.Classifier(base, layers.Head(num_outputs, dense, dropout, dtype))

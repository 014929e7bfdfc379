"""Plain convolutional networks of any width and depth, for one to four spatial axes."""

from collections.abc import Sequence

import jax.numpy as jnp
from flax import linen as nn

from convnet.models import layers, pooling
from convnet.models.intermediates import tap, tapped
from convnet.models.layers import Array, Dtype


class ConvBase(nn.Module):
    """Blocks of convolutions, each with its pool; then the features for the head.

    A block is `depths[i]` times convolution of `widths[i]` features, batch norm where
    wanted, ReLU; and a pool over windows of two.
    """

    widths: Sequence[int]
    depths: Sequence[int]
    kernel: int = 3
    pool: str = "max"
    gather: str = "flatten"
    norm: str = "none"
    padding: str = "SAME"
    use_bias: bool = True
    bn_momentum: float = 0.9
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        x = x.astype(self.dtype)
        plan = zip(self.widths, self.depths, strict=True)
        for i, (width, depth) in enumerate(plan, 1):
            x = ConvBlock(
                width=width,
                depth=depth,
                kernel=self.kernel,
                pool=self.pool,
                norm=self.norm,
                padding=self.padding,
                use_bias=self.use_bias,
                bn_momentum=self.bn_momentum,
                dtype=self.dtype,
                name=f"block{i}",
            )(x, train)
        return tap(self, "features", pooling.gather(x, self.gather))


class ConvBlock(nn.Module):
    """One block of a `ConvBase`."""

    width: int
    depth: int
    kernel: int
    pool: str
    norm: str
    padding: str
    use_bias: bool
    bn_momentum: float
    dtype: Dtype

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        for i in range(1, self.depth + 1):
            conv = layers.Conv(
                self.width,
                self.kernel,
                padding=self.padding,
                use_bias=self.use_bias,
                dtype=self.dtype,
                name=f"conv{i}",
            )
            if self.norm == "batch":
                norm = layers.BatchNorm(
                    self.bn_momentum, dtype=self.dtype, name=f"norm{i}"
                )
                x = layers.convolve_and_normalize(
                    self, conv, norm, x, train, "relu", f"relu{i}"
                )
            else:
                x = tap(self, f"relu{i}", nn.relu(tapped(self, conv, x)))
        if self.pool == "none":
            return x
        try:
            x = pooling.POOLS[self.pool](x, 2)
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from None
        return tap(self, "pool", x)


def cnn(
    num_outputs: int,
    dtype: Dtype,
    *,
    widths: Sequence[int] = (32, 64),
    depth: int = 2,
    kernel: int = 3,
    pool: str = "max",
    gather: str = "flatten",
    dense: Sequence[int] = (),
    dropout: float = 0.0,
    norm: str = "none",
    padding: str = "SAME",
    bn_momentum: float = 0.9,
) -> layers.Classifier:
    """A block of `depth` convolutions for each of `widths`, then a dense head."""
    base = ConvBase(
        widths=widths,
        depths=(depth,) * len(widths),
        kernel=kernel,
        pool=pool,
        gather=gather,
        norm=norm,
        padding=padding,
        use_bias=norm == "none",  # batch norm takes a bias away again
        bn_momentum=bn_momentum,
        dtype=dtype,
    )
    return layers.Classifier(base, layers.Head(num_outputs, dense, dropout, dtype))

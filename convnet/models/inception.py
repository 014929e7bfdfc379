"""Inception V3 (Szegedy et al. 2015, "Rethinking the Inception architecture").

The variant is torchvision's. In that of Keras batch norm has no scale, and the average
pools do not count their padding.
"""

from collections.abc import Sequence
from functools import partial

import jax.numpy as jnp
from flax import linen as nn

from convnet.models import layers, pooling
from convnet.models.intermediates import tap, tapped
from convnet.models.layers import Array, Dtype

_STEM_WIDTH = 32
_LEAST_SIDE, _LEAST_MIDDLE = 75, 17

# A branch is a sequence of steps: a pool; a convolution (features, kernel[, stride[,
# padding]]), which pads with zeros unless it strides; or two of those side by side.
_STEM = (
    (32, 3, 2),
    (32, 3, 1, "VALID"),
    (64, 3),
    "max",
    (80, 1),
    (192, 3, 1, "VALID"),
    "max",
)
_REDUCED = (
    ((384, 3, 2),),
    ((64, 1), (96, 3), (96, 3, 2)),
    ("max",),
)
_REDUCED_AGAIN = (
    ((192, 1), (320, 3, 2)),
    ((192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3, 2)),
    ("max",),
)
_SIDES = ((384, (1, 3)), (384, (3, 1)))
_WIDE = (
    ((320, 1),),
    ((384, 1), _SIDES),
    ((448, 1), (384, 3), _SIDES),
    ("average", (192, 1)),
)


def _windows(pool: int) -> tuple:
    return (
        ((64, 1),),
        ((48, 1), (64, 5)),
        ((64, 1), (96, 3), (96, 3)),
        ("average", (pool, 1)),
    )


def _rows_and_columns(c: int) -> tuple:
    row, column = (1, 7), (7, 1)
    return (
        ((192, 1),),
        ((c, 1), (c, row), (192, column)),
        ((c, 1), (c, column), (c, row), (c, column), (192, row)),
        ("average", (192, 1)),
    )


_MIXED = (
    *map(_windows, (32, 64, 64)),
    _REDUCED,
    *map(_rows_and_columns, (128, 160, 160, 192)),
    _REDUCED_AGAIN,
    _WIDE,
    _WIDE,
)
# The auxiliary head sees what the eighth puts out.
_MIDDLE = 8
_AUXILIARY = ((128, 1), (768, 5, 1, "VALID"))


class InceptionBase(nn.Module):
    """The stem, eleven blocks of branches, and the mean over all places.

    `width` is the number of features of the stem's first convolution, to which all
    others are in proportion (rounded down).
    """

    width: int = _STEM_WIDTH
    variant: str = "torchvision"
    bn_momentum: float = 0.9
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Array, train: bool = False, middle: bool = False
    ) -> Array | tuple[Array, Array]:
        """Returns the features (b, c); with `middle` also the auxiliary head's map."""
        if x.ndim != 4 or min(x.shape[1:3]) < _LEAST_SIDE:
            raise ValueError(
                f"inception_v3 takes images (b, h, w, c) of at least {_LEAST_SIDE}"
                f" pixels a side, not inputs of shape {x.shape}"
            )
        branch = partial(
            Branch,
            width=self.width,
            variant=self.variant,
            bn_momentum=self.bn_momentum,
            dtype=self.dtype,
        )
        x = branch(_STEM, name="stem")(x, train)
        maps = []
        for i, branches in enumerate(_MIXED, 1):
            x = Mixed(branches, branch, name=f"mixed{i}")(x, train)
            maps.append(x)
        features = tap(self, "features", pooling.global_average(x))
        return (features, maps[_MIDDLE - 1]) if middle else features


class Mixed(nn.Module):
    """Branches side by side, whose features are concatenated."""

    branches: tuple
    branch: partial

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        sides = [
            self.branch(steps, name=f"branch{i}")(x, train)
            for i, steps in enumerate(self.branches, 1)
        ]
        return tap(self, "concat", jnp.concatenate(sides, -1))


class Branch(nn.Module):
    """Convolutions, each with batch norm and ReLU, and pools: see `_STEM`.

    A pool has the number of the convolution that it follows.
    """

    steps: tuple
    width: int
    variant: str
    bn_momentum: float
    dtype: Dtype

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        done = 0
        for step in self.steps:
            if step == "max":
                x = tap(self, f"pool{done}", pooling.max_pool(x, 3, 2))
            elif step == "average":
                counted = self.variant != "keras"
                x = pooling.average_pool(x, 3, 1, 1, count_padding=counted)
                x = tap(self, f"pool{done}", x)
            elif isinstance(step[0], tuple):
                sides = [
                    self._convolve(x, train, done + i, *side)
                    for i, side in enumerate(step, 1)
                ]
                x = tap(self, "concat", jnp.concatenate(sides, -1))
                done += len(step)
            else:
                done += 1
                x = self._convolve(x, train, done, *step)
        return x

    def _convolve(
        self,
        x: Array,
        train: bool,
        number: int,
        features: int,
        kernel: int | tuple[int, int],
        stride: int = 1,
        padding: str = "",
    ) -> Array:
        conv = layers.Conv(
            max(1, features * self.width // _STEM_WIDTH),
            kernel,
            stride,
            padding=padding or ("SAME" if stride == 1 else "VALID"),
            use_bias=False,
            dtype=self.dtype,
            name=f"conv{number}",
        )
        norm = layers.BatchNorm(
            self.bn_momentum,
            1e-3,
            use_scale=self.variant != "keras",
            dtype=self.dtype,
            name=f"norm{number}",
        )
        return layers.convolve_and_normalize(
            self, conv, norm, x, train, "relu", f"relu{number}"
        )


class AuxiliaryHead(nn.Module):
    """Float32 logits `(b, num_outputs)` from a map in the middle of the network."""

    num_outputs: int
    branch: partial

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        if min(x.shape[1:3]) < _LEAST_MIDDLE:
            raise ValueError(
                f"the auxiliary head takes a map of at least {_LEAST_MIDDLE} places a"
                f" side, not {x.shape}: use images of 299x299, or aux=False"
            )
        x = tap(self, "pool0", pooling.average_pool(x, 5, 3))
        x = self.branch(_AUXILIARY, name="branch1")(x, train)
        logits = nn.Dense(self.num_outputs, dtype=jnp.float32, name="logits")
        return tapped(self, logits, pooling.global_average(x))


class ClassifierWithAuxiliary(layers.Classifier):
    """A `Classifier` with an auxiliary head, params `{"aux"}`, beside its own.

    The auxiliary logits are the tap "aux/logits". They enter neither the logits of the
    network nor the loss.
    """

    aux: nn.Module

    def __call__(self, inputs: Array, train: bool = False) -> Array:
        features, middle = self.base(inputs, train, middle=True)
        logits = self.head(features, train)
        self.aux(middle, train)
        return logits


def inception_v3(
    num_outputs: int,
    dtype: Dtype,
    *,
    width: int = _STEM_WIDTH,
    dense: Sequence[int] = (),
    dropout: float = 0.5,
    bn_momentum: float = 0.9,
    variant: str = "torchvision",
    aux: bool = False,
) -> layers.Classifier:
    """Inception V3 for images of 299x299, and with `aux` its auxiliary head."""
    settings = {"width": width, "variant": variant}
    settings |= {"bn_momentum": bn_momentum, "dtype": dtype}
    base = InceptionBase(**settings)
    head = layers.Head(num_outputs, dense, dropout, dtype)
    if not aux:
        return layers.Classifier(base, head)
    branch = partial(Branch, **settings)
    return ClassifierWithAuxiliary(base, head, AuxiliaryHead(num_outputs, branch))

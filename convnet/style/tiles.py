"""The objective of a picture too large for memory, from overlapping tiles of it.

No tile is minimised by itself: loss and gradient are those of the whole picture, so
that there are no seams to blend. The loss is a function of sums over places: squared
differences for the content, products of features for the style. A tile adds those of
its core. Its margin lets the core see all that it sees in the whole picture, and gets a
gradient too. One pass over the tiles gives the sums, and the loss; a second one the
gradient, in which tiles that overlap are added.
"""

import itertools
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from convnet.style import objective
from convnet.style.features import Features
from convnet.style.objective import Evaluation, Targets, Terms, Weights, compiled

# Pixels around a core. The units of VGG-19's relu5_1 see 78 to either side.
MARGIN = 128

Arrays = dict[str, jax.Array]
# By tap: squared differences from the content, and `correlations` of features.
Sums = tuple[Arrays, Arrays]


class Tile(NamedTuple):
    """A window of a picture, and the core of it that counts.

    Attributes:
      start: first row and first column of the window.
      core: ((top, bottom), (left, right)) in pixels of the picture; an end that is None
        is the picture's.
    """

    start: tuple[int, int]
    core: tuple[tuple[int, int | None], tuple[int, int | None]]


class Cut(NamedTuple):
    """A window as arrays: where it starts, its height and width, masks of its core.

    `masks` are float32 (h', w', 1) by tap, 1 where a place belongs to the core.
    """

    start: tuple[int, int]
    shape: tuple[int, int]
    masks: dict[str, np.ndarray]


def plan(shape: tuple[int, int], size: int) -> list[Tile]:
    """Cuts a picture into windows of one shape, whose cores cover it once.

    Args:
      shape: height and width in pixels.
      size: side of a window, more than two margins; a shorter side is not cut.
    """
    axes = [list(_axis(side, size)) for side in shape]
    return [
        Tile((top, left), (rows, columns))
        for (top, rows), (left, columns) in itertools.product(*axes)
    ]


def _axis(side: int, size: int) -> Iterator[tuple[int, tuple[int, int | None]]]:
    """Yields start and core of each window along one axis."""
    low, last = 0, side <= size
    while not last:
        start = min(max(low - MARGIN, 0), side - size)
        last = start + size == side
        high = None if last else start + size - MARGIN
        yield start, (low, high)
        low = high
    if side <= size:
        yield 0, (0, None)


class TiledObjective:
    """`objective.Objective` in the memory of one tile; arguments as there.

    The sides of both pictures must be multiples of the largest stride.

    Args:
      size: side of a window, a multiple of the largest stride.

    Attributes:
      cuts: the windows of the content.
    """

    def __init__(
        self,
        features: Features,
        content: jax.Array,
        style: jax.Array,
        taps: tuple[tuple[str, ...], tuple[str, ...]],
        weights: Weights,
        relative: bool = True,
        *,
        size: int,
    ) -> None:
        self._features = features.only(*taps)
        self._variables, self._strides = features.variables, features.strides()
        self._taps, self._weights, self._size = taps, weights, size
        maps = self._features.shapes(size, size)
        self._channels = {name: shape[-1] for name, shape in maps.items()}
        self._sum = compiled(self._sums)
        self._pull = compiled(jax.grad(self._along, 1))
        self._total = jax.jit(jax.value_and_grad(self._loss, has_aux=True))
        self._smooth = jax.jit(jax.value_and_grad(objective.total_variation))

        nothing = dict.fromkeys(taps[0], jnp.float32(0))
        cuts = self._cut(style.shape)
        products = self._add_up(style, cuts, itertools.repeat(nothing))[1]
        grams = {
            name: sums / self._values(cuts, name) for name, sums in products.items()
        }
        self.cuts = self._cut(content.shape)
        of_content = compiled(features.only(taps[0]))
        self._wanted = [
            of_content(self._variables, _window(content, cut)) for cut in self.cuts
        ]
        squares = self._add_up(content, self.cuts, itertools.repeat(nothing))[0]
        # Arrays of one number, of the same mean square as the maps themselves.
        alike = {
            name: jnp.sqrt(sums / self._values(self.cuts, name))
            for name, sums in squares.items()
        }
        self._targets = Targets({}, grams, objective.scales(alike, grams, relative))

    def __call__(self, picture: jax.Array) -> Evaluation:
        """Evaluates a picture (h, w, c) of the content's shape, floats."""
        sums = self._add_up(picture, self.cuts, self._wanted)
        (loss, terms), along = self._total(sums)
        tv, gradient = self._smooth(picture)
        gradient = self._weights.tv * gradient
        for cut, wanted in zip(self.cuts, self._wanted, strict=True):
            window = _window(picture, cut)
            part = self._pull(self._variables, window, cut.masks, wanted, along)
            gradient = _overlap_add(gradient, part, cut.start)
        terms["tv"] = self._weights.tv * tv
        return Evaluation(loss + terms["tv"], terms, gradient)

    def _cut(self, shape: tuple[int, ...]) -> list[Cut]:
        height, width = (min(side, self._size) for side in shape[:2])
        maps = self._features.shapes(height, width)
        return [
            Cut(
                tile.start,
                (height, width),
                {
                    name: _mask(tile, maps[name][:2], self._strides[name])
                    for name in self._features.names
                },
            )
            for tile in plan(shape[:2], self._size)
        ]

    def _values(self, cuts: list[Cut], name: str) -> int:
        """How many values the map of a tap has, in the whole picture."""
        return self._channels[name] * sum(int(cut.masks[name].sum()) for cut in cuts)

    def _sums(
        self, variables: Any, window: jax.Array, masks: Arrays, wanted: Arrays
    ) -> Sums:
        maps = self._features(variables, window)
        squares = {
            name: jnp.sum(masks[name] * jnp.square(maps[name] - wanted[name]))
            for name in self._taps[0]
        }
        products = {
            name: objective.correlations(masks[name] * maps[name])
            for name in self._taps[1]
        }
        return squares, products

    def _along(
        self,
        variables: Any,
        window: jax.Array,
        masks: Arrays,
        wanted: Arrays,
        direction: Sums,
    ) -> jax.Array:
        """The inner product of the sums and a direction: the loss, made linear."""
        sums = self._sums(variables, window, masks, wanted)
        return sum(jax.tree.leaves(jax.tree.map(jnp.vdot, sums, direction)))

    def _add_up(
        self, picture: jax.Array, cuts: list[Cut], wanted: Iterable[Arrays]
    ) -> Sums:
        total = None
        for cut, arrays in zip(cuts, wanted, strict=False):
            window = _window(picture, cut)
            part = self._sum(self._variables, window, cut.masks, arrays)
            total = part if total is None else jax.tree.map(jnp.add, total, part)
        return total

    def _loss(self, sums: Sums) -> tuple[jax.Array, Terms]:
        """The loss but its total variation, and its terms."""
        squares, products = sums
        scales = self._targets.scales["content"]
        content = sum(
            scales[name] * total / self._values(self.cuts, name)
            for name, total in squares.items()
        )
        grams = {
            name: total / self._values(self.cuts, name)
            for name, total in products.items()
        }
        terms = {
            "content": self._weights.content * content,
            "style": self._weights.style * objective.style_loss(grams, self._targets),
        }
        return sum(terms.values()), terms


def _mask(tile: Tile, shape: tuple[int, int], stride: int) -> np.ndarray:
    """1 at the places of a map (h', w', 1) that belong to a tile's core, else 0."""
    inside = []
    for start, (low, high), side in zip(tile.start, tile.core, shape, strict=True):
        places = start + stride * np.arange(side)
        inside.append((places >= low) & (places < (np.inf if high is None else high)))
    return np.outer(*inside)[..., None].astype(np.float32)


def _window(picture: jax.Array, cut: Cut) -> jax.Array:
    (top, left), (height, width) = cut.start, cut.shape
    return picture[top : top + height, left : left + width]


@jax.jit
def _overlap_add(
    whole: jax.Array, part: jax.Array, start: tuple[int, int]
) -> jax.Array:
    shape = part.shape
    start = (*start, 0)
    here = jax.lax.dynamic_slice(whole, start, shape)
    return jax.lax.dynamic_update_slice(whole, here + part, start)

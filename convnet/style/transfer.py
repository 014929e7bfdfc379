"""From two pictures to one, coarse to fine."""

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from convnet.style import colour, minimize, pictures
from convnet.style.features import Features
from convnet.style.minimize import Step
from convnet.style.objective import Objective, Weights
from convnet.style.tiles import TiledObjective

# Above this longer side, in pixels, a picture is computed in tiles of it.
LARGEST = 1024
# A coarser level is put before as long as it has so many pixels on its longer side:
# below, the strokes of a network made for 224 pixels fill the whole picture.
_COARSEST = 256
_LEAST_SIZE = 32

STARTS = ("content", "noise", "style")
COLOURS = ("style", "luminance", "histogram")


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a picture is made.

    Attributes:
      taps: names for the content, names for the style.
      weights: of the terms of the loss.
      relative: see `objective.scales`.
      optimizer: "lbfgs" or "adam".
      start: "content", "style" or "noise": the first picture.
      colour: "style" takes the style's colours; "luminance" keeps the content's and
        transfers the brightness alone; "histogram" first gives the style's picture the
        content's mean and covariance of colours.
      seed: of the noise.
      tile: side of a window above `LARGEST` pixels, a multiple of the largest stride.
    """

    taps: tuple[tuple[str, ...], tuple[str, ...]]
    weights: Weights
    relative: bool = True
    optimizer: str = "lbfgs"
    start: str = "content"
    colour: str = "style"
    seed: int = 0
    tile: int = LARGEST


@dataclasses.dataclass(frozen=True)
class Level:
    """One size of the picture, and how often its loss is evaluated."""

    height: int
    width: int
    evaluations: int

    @property
    def tiled(self) -> bool:
        """Whether the picture is computed in tiles."""
        return max(self.height, self.width) > LARGEST


def levels(
    shape: tuple[int, ...], size: int, steps: int, count: int, stride: int
) -> list[Level]:
    """Plans a transfer, the coarsest level first; each level has twice the last's side.

    Args:
      shape: of the content, (h, w, ...).
      size: longer side of the result in pixels.
      steps: evaluations at the coarsest level; each finer one has half as many, because
        it starts from a finished picture, and costs four times as much.
      count: of levels; 0: as many as leave the coarsest at least 256 pixels.
      stride: the network's largest, of which a picture in tiles has whole multiples.
    """
    if count == 0:
        count = 1
        while size >> count >= _COARSEST:
            count += 1
    plan = []
    for place in range(count):
        longer = max(_LEAST_SIZE, size >> (count - 1 - place))
        multiple = stride if longer > LARGEST else 1
        height, width = pictures.sides(shape, longer, multiple)
        plan.append(Level(height, width, max(1, steps >> place)))
    return plan


class Transfer:
    """A style transfer on its way; iterate it to make it go on.

    Args:
      features: the network's.
      content: uint8 (h, w, 3), of any size.
      style: likewise, of any other size.
      settings: how.
      plan: as `levels` makes it.
    """

    def __init__(
        self,
        features: Features,
        content: np.ndarray,
        style: np.ndarray,
        settings: Settings,
        plan: list[Level],
    ) -> None:
        self._features, self._settings, self._plan = features, settings, plan
        self._content, self._style = content, style

    def __iter__(self) -> Iterator[Step]:
        """Yields a step after each evaluation; their numbers go on over the levels."""
        picture, done = None, 0
        minimizer = minimize.MINIMIZERS[self._settings.optimizer]
        for level in self._plan:
            shape = (level.height, level.width)
            content, style = self._pair(level)
            if picture is None:
                picture = self._first(content, style)
            else:
                picture = pictures.enlarge(picture, shape)
            evaluate = self._objective(level, jnp.asarray(content), jnp.asarray(style))
            for step in minimizer(evaluate, picture, level.evaluations):
                picture = step.picture
                yield dataclasses.replace(step, evaluations=done + step.evaluations)
            done += level.evaluations

    def pixels(self, picture: jax.Array) -> np.ndarray:
        """Returns a step's picture as it is shown, uint8 (h, w, 3)."""
        values = np.asarray(picture)
        if self._settings.colour == "luminance":
            content = pictures.resize(self._content, values.shape[:2])
            values = colour.with_luminance(content, values)
        return pictures.to_uint8(values)

    def _pair(self, level: Level) -> tuple[np.ndarray, np.ndarray]:
        """Content and style at a level, (h, w, 3) or, for luminance, (h, w, 1)."""
        stride = max(self._features.strides().values()) if level.tiled else 1
        shape = (level.height, level.width)
        content = pictures.resize(self._content, shape)
        sides = pictures.sides(self._style.shape, max(shape), stride)
        style = pictures.resize(self._style, sides)
        if self._settings.colour == "luminance":
            content, style = colour.luminance(content), colour.luminance(style)
            style = colour.matched_luminance(style, content)
        elif self._settings.colour == "histogram":
            style = colour.matched_colours(style, content)
        return content, style

    def _first(self, content: np.ndarray, style: np.ndarray) -> jax.Array:
        if self._settings.start == "noise":
            return jnp.asarray(pictures.noise(content.shape, self._settings.seed))
        if self._settings.start == "style":
            return pictures.enlarge(jnp.asarray(style), content.shape[:2])
        return jnp.asarray(content)

    def _objective(
        self, level: Level, content: jax.Array, style: jax.Array
    ) -> minimize.Evaluate:
        settings = self._settings
        arguments = (content, style, settings.taps, settings.weights, settings.relative)
        if level.tiled:
            return TiledObjective(self._features, *arguments, size=settings.tile)
        return Objective(self._features, *arguments)

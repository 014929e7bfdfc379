"""The input that a unit answers to most, found by optimisation.

Olah, Mordvintsev and Schubert 2017, "Feature visualization", Distill,
doi:10.23915/distill.00007: gradient ascent on the waves that make up the input, which
is moved, turned and zoomed a little in each step, so that what remains does not hang
on single pixels.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from convnet import mesh
from convnet.data import affine

# Luminance, blue against yellow, and green against red and blue, with the deviations
# that they have in photographs: about 10 : 3 : 1 (Ruderman, Cronin and Chiao 1998).
_COLOURS = np.array(
    [[1.0, 1.0, 1.0], [1.0, 0.0, -1.0], [-0.5, 1.0, -0.5]], np.float32
) * np.array([[0.58], [0.28], [0.16]], np.float32)


@dataclasses.dataclass(frozen=True)
class Options:
    """How an input is looked for.

    Attributes:
      steps: of Adam.
      rate: its learning rate.
      jitter: by how much the input is moved at most, as a share of its sides.
      angle: by how many degrees it is turned at most; of images only.
      zoom: by how much it is zoomed at most, as a share; of images only.
      smoothness: weight of the total variation, a mean over places.
    """

    steps: int = 128
    rate: float = 0.008
    jitter: float = 1 / 16
    angle: float = 6.0
    zoom: float = 0.08
    smoothness: float = 5.0


def most_activating(
    unit: Callable[[jax.Array], jax.Array],
    shape: Sequence[int],
    count: int,
    options: Options = Options(),
    seed: int = 0,
    to_input: Callable[[jax.Array], jax.Array] = lambda unit: unit,
) -> tuple[np.ndarray, np.ndarray]:
    """Finds inputs that maximise units of a network.

    Args:
      unit: pure: inputs (count, *spatial, c) -> the activations (count,), one of each
        input's own unit.
      shape: of an input, (*spatial, c).
      count: how many inputs are looked for together.
      options: how.
      seed: of the start and of all movements.
      to_input: pure: values in 0..1 -> what `unit` takes.

    Returns:
      Values in 0..1, float32 (count, *spatial, c), and the activations there, without
      any movement, (count,).
    """
    optimizer = optax.adam(options.rate)

    def loss(waves: dict, key: jax.Array) -> jax.Array:
        values = _values(waves, shape)
        moved = _move(values, key, options)
        rough = sum(
            jnp.mean(jnp.abs(jnp.diff(values, axis=axis)), tuple(range(1, values.ndim)))
            for axis in range(1, values.ndim - 1)
        )
        return jnp.sum(options.smoothness * rough - unit(to_input(moved)))

    def step(waves: dict, state: optax.OptState, key: jax.Array) -> tuple:
        gradient = jax.grad(loss)(waves, key)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(waves, updates), state

    compiler_options = mesh.compiler_options(jax.default_backend())
    step = jax.jit(step, compiler_options=compiler_options)
    key = jax.random.key(seed)
    waves = _start(jax.random.fold_in(key, options.steps), shape, count)
    state = optimizer.init(waves)
    for number in range(options.steps):
        waves, state = step(waves, state, jax.random.fold_in(key, number))

    @jax.jit
    def finish(waves: dict) -> tuple[jax.Array, jax.Array]:
        values = _values(waves, shape)
        return values, unit(to_input(values))

    values, found = finish(waves)
    return np.asarray(values), np.asarray(found)


def _start(key: jax.Array, shape: Sequence[int], count: int) -> dict:
    """Small random waves: real and imaginary parts of half a spectrum."""
    *spatial, c = shape
    half = (count, *spatial[:-1], spatial[-1] // 2 + 1, c)
    real, imaginary = 0.01 * jax.random.normal(key, (2, *half))
    return {"real": real, "imaginary": imaginary}


def _values(waves: dict, shape: Sequence[int]) -> jax.Array:
    """The waves' sum, in 0..1. Long waves weigh more, as in all that is natural."""
    *spatial, c = shape
    rank = len(spatial)
    frequencies = np.meshgrid(
        *[np.fft.fftfreq(n) for n in spatial[:-1]],
        np.fft.rfftfreq(spatial[-1]),
        indexing="ij",
    )
    length = np.sqrt(sum(np.square(f) for f in frequencies))
    scale = math.sqrt(math.prod(spatial)) / np.maximum(length, 1 / max(spatial))
    scale = (scale / max(spatial)).astype(np.float32)[..., None]
    spectrum = (waves["real"] + 1j * waves["imaginary"]) * scale
    axes = tuple(range(1, rank + 1))
    values = jnp.fft.irfftn(spectrum, tuple(spatial), axes, norm="ortho")
    if c == 3:
        values = values @ _COLOURS
    return jax.nn.sigmoid(4 * values)


def _move(values: jax.Array, key: jax.Array, options: Options) -> jax.Array:
    spatial = values.shape[1:-1]
    b = len(values)
    if len(spatial) != 2:
        draws = jax.random.uniform(key, (len(spatial),), minval=-1, maxval=1)
        for axis, side in enumerate(spatial):
            distance = jnp.rint(draws[axis] * options.jitter * side).astype(jnp.int32)
            values = jnp.roll(values, distance, axis + 1)
        return values
    angle, zoom, down, right = jax.random.uniform(key, (4, b), minval=-1, maxval=1)
    return affine.warp(
        values,
        affine.matrix(
            angle=angle * math.radians(options.angle),
            zoom=1 + zoom * options.zoom,
            shift_y=down * options.jitter * spatial[0],
            shift_x=right * options.jitter * spatial[1],
        ),
    )

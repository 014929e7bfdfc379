"""A model file's network as the methods need it: logits, taps, gradients, in batches.

Every function is compiled for one size of batch and called as often as it takes: with
JAX 0.10 a loop inside a compiled program would be many times slower on a CPU.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from convnet import mesh, predict_stream
from convnet import step as step_lib
from convnet.bundle import Bundle
from convnet.models import taps as ordered
from convnet.models.intermediates import through

Rule = Callable[[str, jax.Array], jax.Array]
# Of inputs whose gradient is computed at once: above it, caches overflow.
_MOST = 32


class Network:
    """Compiled functions of normalised inputs `x`, float32 (n, *spatial, c).

    One view of the input, whatever views the model file is predicted with.

    Attributes:
      shape: of an input, (*spatial, c).
      shapes: of each tap without the batch, in network order.
      batch_size: of what is computed many times.
    """

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle
        self.shape = tuple(bundle.preprocessing["input_shape"])
        size = predict_stream.batch_size(self.shape, jax.default_backend())
        self.batch_size = min(size, _MOST)
        self._model = bundle.model()
        self._variables = jax.device_put(bundle.variables)
        self._programs: dict[Any, Callable] = {}
        one = jax.ShapeDtypeStruct((1, *self.shape), jnp.float32)
        logits, taps = jax.eval_shape(self._tapped, self._variables, one)
        self.outputs = logits.shape[1:]
        self.shapes = {name: tap.shape[1:] for name, tap in ordered(taps).items()}

    @property
    def rank(self) -> int:
        """The number of spatial axes."""
        return len(self.shape) - 1

    def with_variables(self, variables: Any) -> "Network":
        """Returns the network with other variables, and the same compiled programs.

        For sanity checks: what does not change with the weights does not explain them.
        """
        other = copy.copy(self)
        other._variables = jax.device_put(variables)
        return other

    def normalize(self, inputs: np.ndarray) -> np.ndarray:
        """Inputs as they are stored, uint8 or float, (n, *shape) -> `x`."""
        about = self.bundle.preprocessing
        unit = step_lib.to_unit(jnp.asarray(inputs))
        mean, std = tuple(about["mean"]), tuple(about["std"])
        return np.asarray(step_lib.normalize(unit, mean, std))

    def denormalize(self, x: np.ndarray) -> np.ndarray:
        """`x` -> inputs as they are stored; uint8 is rounded and cut to 0..255."""
        about = self.bundle.preprocessing
        unit = np.asarray(x) * np.float32(about["std"]) + np.float32(about["mean"])
        if about["input_dtype"] != "uint8":
            return unit
        return np.clip(np.rint(unit * 255), 0, 255).astype(np.uint8)

    def logits(self, x: np.ndarray) -> np.ndarray:
        """Returns (n, *outputs)."""

        def run(variables: Any, x: jax.Array) -> jax.Array:
            return self._model.apply(variables, x, train=False)

        return self._batched("logits", run, self.batch_size, x)

    def taps(self, x: np.ndarray, names: Sequence[str]) -> dict[str, np.ndarray]:
        """Returns the taps (n, ...) of these names."""
        return self._batched(
            ("taps", *names), self._picked(names), min(self.batch_size, len(x)), x
        )

    def features(self, x: np.ndarray, name: str) -> np.ndarray:
        """Returns one tap of many inputs, the mean over places: (n, c)."""

        def run(variables: Any, x: jax.Array) -> jax.Array:
            tap = self._picked([name])(variables, x)[name]
            return jnp.mean(tap.reshape(len(x), -1, tap.shape[-1]), 1)

        return self._batched(("features", name), run, self.batch_size, x)

    def gradient(
        self, x: np.ndarray, direction: np.ndarray, rule: Rule | None = None
    ) -> np.ndarray:
        """Returns the gradient of the sum of logits * direction at `x`, of its shape.

        Args:
          x: inputs.
          direction: float32 (n, *outputs): which logits are explained.
          rule: changes the gradient as it passes the taps; see `through`.
        """

        def score(x: jax.Array, variables: Any, direction: jax.Array) -> jax.Array:
            return jnp.sum(self._model.apply(variables, x, train=False) * direction)

        def run(variables: Any, x: jax.Array, direction: jax.Array) -> jax.Array:
            if rule is None:
                return jax.grad(score)(x, variables, direction)
            with through(rule):
                return jax.grad(score)(x, variables, direction)

        size = self.batch_size if rule is None else min(self.batch_size, len(x))
        return self._batched(("gradient", rule), run, size, x, direction)

    def at_tap(
        self, x: np.ndarray, direction: np.ndarray, name: str
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns a tap and the gradient there of the sum of logits * direction."""
        path = tuple(name.split("/"))

        def score(
            change: jax.Array, variables: Any, x: jax.Array, direction: jax.Array
        ) -> tuple[jax.Array, jax.Array]:
            changed = {"perturbations": traverse_util.unflatten_dict({path: change})}
            logits, taps = self._tapped({**variables, **changed}, x)
            tap = traverse_util.flatten_dict(taps)[path]
            return jnp.sum(logits * direction), tap

        def run(variables: Any, x: jax.Array, direction: jax.Array) -> Any:
            zero = jnp.zeros((len(x), *self.shapes[name]))
            gradient, tap = jax.grad(score, has_aux=True)(zero, variables, x, direction)
            return tap.astype(jnp.float32), gradient

        size = min(self.batch_size, len(x))
        return self._batched(("at", name), run, size, x, direction)

    def unit_gradient(
        self, x: np.ndarray, weights: Mapping[str, np.ndarray]
    ) -> np.ndarray:
        """Returns the gradient at `x` of the sum of taps * weights, of its shape.

        Args:
          x: inputs.
          weights: (n, ...) for each of some taps; zeros leave a tap out, so that one
            program serves them all.
        """
        names = tuple(weights)

        def score(x: jax.Array, variables: Any, weights: Any) -> jax.Array:
            taps = self._picked(names)(variables, x)
            return sum(jnp.sum(taps[name] * weights[name]) for name in names)

        def run(variables: Any, x: jax.Array, weights: Any) -> jax.Array:
            return jax.grad(score)(x, variables, weights)

        size = min(self.batch_size, len(x))
        return self._batched(("units", *names), run, size, x, dict(weights))

    def mean_unit(self, x: jax.Array, channel: jax.Array, name: str) -> jax.Array:
        """Pure: the mean over places of channels (n,) of a tap of `x`; shape (n,)."""
        tap = self._picked([name])(self._variables, x)[name]
        tap = jnp.mean(tap.reshape(len(x), -1, tap.shape[-1]), 1)
        return jnp.take_along_axis(tap, channel[:, None], 1)[:, 0]

    def _tapped(self, variables: Any, x: jax.Array) -> tuple[jax.Array, Any]:
        logits, state = self._model.apply(variables, x, train=False, mutable=["taps"])
        return logits, state["taps"]

    def _picked(self, names: Sequence[str]) -> Callable[[Any, jax.Array], dict]:
        def run(variables: Any, x: jax.Array) -> dict[str, jax.Array]:
            taps = ordered(self._tapped(variables, x)[1])
            return {name: taps[name].astype(jnp.float32) for name in names}

        return run

    def _batched(self, key: Any, run: Callable, size: int, *arrays: Any) -> Any:
        """Calls `run(variables, *arrays)` on batches, the last filled up with zeros."""
        key = (key, size)
        if key not in self._programs:
            options = mesh.compiler_options(jax.default_backend())
            self._programs[key] = jax.jit(run, compiler_options=options)
        program, count, parts = self._programs[key], len(arrays[0]), []

        def part(array: np.ndarray, start: int) -> np.ndarray:
            array = np.asarray(array[start : start + size], np.float32)
            missing = size - len(array)
            return np.pad(array, [(0, missing)] + [(0, 0)] * (array.ndim - 1))

        for start in range(0, count, size):
            batch = jax.tree.map(lambda a, s=start: part(a, s), arrays)
            parts.append(jax.device_get(program(self._variables, *batch)))
        return jax.tree.map(lambda *leaves: np.concatenate(leaves)[:count], *parts)

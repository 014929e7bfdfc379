"""Which places of the input a unit can see: receptive fields, by arithmetic.

The traced program of a network says it all: convolutions and pools widen what a place
depends on, everything else passes it on or, across places, joins it.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from convnet import models
from convnet.models import lowering


@dataclasses.dataclass(frozen=True)
class ReceptiveField:
    """Of a feature map; one number for each spatial axis.

    Unit i of the map depends on the places from `start + i * step` to
    `start + i * step + size - 1` of the input, as far as these are in it. (Places at
    the end that strides leave over count, though no unit depends on them.)
    """

    size: tuple[int, ...]
    step: tuple[int, ...]
    start: tuple[int, ...]

    def box(self, unit: Sequence[int], spatial: Sequence[int]) -> tuple[slice, ...]:
        """Returns what the unit sees of an input with these sides."""
        corner = [
            first + i * step
            for first, i, step in zip(self.start, unit, self.step, strict=True)
        ]
        return tuple(
            slice(max(0, low), min(side, low + size))
            for low, size, side in zip(corner, self.size, spatial, strict=True)
        )

    def widen(
        self, window: Sequence[int], stride: Sequence[int], low: Sequence[int]
    ) -> "ReceptiveField":
        """Returns that of windows over this map, the first `low` places before it."""
        zipped = list(zip(self.size, self.step, window, strict=True))
        return ReceptiveField(
            tuple(size + (k - 1) * step for size, step, k in zipped),
            tuple(step * s for step, s in zip(self.step, stride, strict=True)),
            tuple(
                start - before * step
                for start, step, before in zip(self.start, self.step, low, strict=True)
            ),
        )


# Of what depends on the input, but not window by window.
_LOST = "lost"
_Field = ReceptiveField | str | None  # None: does not depend on the input


def receptive_fields(
    model: nn.Module, variables: Any, shape: Sequence[int]
) -> dict[str, ReceptiveField]:
    """Returns the receptive fields of a network's feature maps, in network order.

    Args:
      model: the network.
      variables: its variables, or their shapes and dtypes.
      shape: of an input, (*spatial, c).

    Returns:
      By the taps' names. Left out is what sees the whole input (after a mean over all
      places, or a dense layer), and what is not computed window by window.
    """

    def run(variables: Any, x: jax.Array) -> dict[str, jax.Array]:
        _, state = model.apply(variables, x, train=False, mutable=["taps"])
        return models.taps(state["taps"])

    x = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    with lowering.plain():
        closed, taps = jax.make_jaxpr(run, return_shape=True)(variables, x)
    rank = len(shape) - 1
    start = ReceptiveField((1,) * rank, (1,) * rank, (0,) * rank)
    count = len(closed.jaxpr.invars)
    found = _walk(closed.jaxpr, [None] * (count - 1) + [start], rank)
    names, shapes = zip(*sorted(taps.items()), strict=True)  # as JAX sorts dicts
    fields = dict(zip(names, found, strict=True))
    ranks = {n: len(s.shape) for n, s in zip(names, shapes, strict=True)}
    return {
        name: fields[name]
        for name in models.taps(_nested(names))
        if isinstance(fields[name], ReceptiveField) and ranks[name] == rank + 2
    }


def _nested(names: Sequence[str]) -> dict[str, Any]:
    from flax import traverse_util

    return traverse_util.unflatten_dict({tuple(n.split("/")): n for n in names})


def _walk(jaxpr: Any, inputs: Sequence[_Field], rank: int) -> list[_Field]:
    """Returns the fields of a program's outputs."""
    fields: dict[Any, _Field] = dict(zip(jaxpr.invars, inputs, strict=True))

    def read(atom: Any) -> _Field:
        return None if hasattr(atom, "val") else fields.get(atom)

    for equation in jaxpr.eqns:
        inner = _inner(equation.params)
        before = [read(atom) for atom in equation.invars]
        if inner is not None and len(inner.invars) == len(before):
            after = _walk(inner, before, rank)
        else:
            after = [_apply(equation, before, rank)] * len(equation.outvars)
        fields |= dict(zip(equation.outvars, after, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _inner(params: Mapping[str, Any]) -> Any:
    """The program that an equation calls (jit, custom derivatives), or None."""
    for name in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        if name in params:
            return getattr(params[name], "jaxpr", params[name])
    return None


def _apply(equation: Any, before: list[_Field], rank: int) -> _Field:
    known = [field for field in before if field is not None]
    if not known:
        return None
    if _LOST in known:
        return _LOST
    name, params = equation.primitive.name, equation.params
    shapes = [atom.aval.shape for atom in equation.invars]
    out = equation.outvars[0].aval.shape
    spatial = slice(1, rank + 1)
    if name == "conv_general_dilated":
        return _convolution(before[0], params, shapes, rank)
    if name.startswith("reduce_window"):
        lows = [low for low, _ in params["padding"]]
        return known[0].widen(
            params["window_dimensions"][spatial],
            params["window_strides"][spatial],
            lows[spatial],
        )
    if name == "pad" and len(out) == rank + 2:
        lows = [low for low, _, _ in params["padding_config"]]
        return known[0].widen((1,) * rank, (1,) * rank, lows[spatial])
    if name == "slice" and len(out) == rank + 2:
        strides = params["strides"] or (1,) * len(out)
        starts = [-start for start in params["start_indices"]]
        return known[0].widen((1,) * rank, strides[spatial], starts[spatial])
    if name == "concatenate":
        return _concatenation(params["dimension"], before, shapes, rank)
    if name == "reshape":
        return known[0] if _tiles(shapes[0], out, rank) else _LOST
    if name.startswith("reduce_"):
        return _reduction(known[0], params["axes"], shapes[0], rank)
    if name == "dot_general":
        (contracted, _), (batch, _) = params["dimension_numbers"]
        # Over the channels it is a convolution of one place.
        alone = not batch and contracted == (rank + 1,) and before[1] is None
        return before[0] if alone else _LOST
    if name in ("transpose", "gather", "sort", "rev"):
        return _LOST
    # Without channels: a norm over them. With twice the axes: tiles, see `pooling`.
    return _union(known) if len(out) - rank in (1, 2, rank + 2) else _LOST


def _convolution(
    field: _Field, params: Mapping[str, Any], shapes: list[tuple], rank: int
) -> _Field:
    layout = params["dimension_numbers"]
    if field is None or layout.lhs_spec[2:] != tuple(range(1, rank + 1)):
        return _LOST
    if any(hole != 1 for hole in params["lhs_dilation"]):
        return _LOST
    kernel = [shapes[1][axis] for axis in layout.rhs_spec[2:]]
    window = [
        (k - 1) * hole + 1
        for k, hole in zip(kernel, params["rhs_dilation"], strict=True)
    ]
    return field.widen(
        window, params["window_strides"], [low for low, _ in params["padding"]]
    )


def _concatenation(
    axis: int, before: list[_Field], shapes: list[tuple], rank: int
) -> _Field:
    if len(shapes[0]) != rank + 2:
        return _LOST
    if not 1 <= axis <= rank:
        return _union([field for field in before if field is not None])
    # Along a spatial axis that is padding (zeros, or the other end of a circle)
    # around the map, which is the longest.
    main = max(range(len(shapes)), key=lambda i: shapes[i][axis])
    if before[main] is None:
        return _LOST
    low = [0] * rank
    low[axis - 1] = sum(shape[axis] for shape in shapes[:main])
    return before[main].widen((1,) * rank, (1,) * rank, low)


def _tiles(shape: tuple, out: tuple, rank: int) -> bool:
    """Whether places are split in tiles (see `pooling`), or nothing is changed."""
    if len(shape) == rank + 2 and len(out) == 2 * rank + 2:
        products = [a * b for a, b in zip(out[1:-1:2], out[2:-1:2], strict=True)]
        return list(shape[1:-1]) == products
    return [n for n in shape if n != 1] == [n for n in out if n != 1]


def _reduction(
    field: ReceptiveField, axes: Sequence[int], shape: tuple, rank: int
) -> _Field:
    if tuple(axes) == (rank + 1,):  # over the channels
        return field
    within = tuple(range(2, 2 * rank + 1, 2))
    if len(shape) == 2 * rank + 2 and tuple(axes) == within:
        window = [shape[axis] for axis in within]
        return field.widen(window, window, (0,) * rank)
    return _LOST


def _union(fields: list[ReceptiveField]) -> _Field:
    """What depends on all of these: branches that meet again."""
    if len({field.step for field in fields}) != 1:
        return _LOST
    starts = np.array([field.start for field in fields])
    ends = starts + np.array([field.size for field in fields])
    first = starts.min(0)
    size = ends.max(0) - first
    return ReceptiveField(tuple(size.tolist()), fields[0].step, tuple(first.tolist()))

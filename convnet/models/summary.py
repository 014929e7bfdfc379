"""A table of a model's layers, made without computing anything."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import traverse_util

from convnet.models.intermediates import network_order


def summarize(
    model: nn.Module, input_shape: Sequence[int], dtype: Any = "float32"
) -> str:
    """Layers, the shapes of their outputs, and how many parameters each has.

    `input_shape` is that of a batch, `(b, *spatial, c)`; shapes in the table are those
    of one example. Raises what the model raises for inputs that it cannot take.
    """

    def run(inputs: jax.Array) -> tuple[Any, Any]:
        variables = model.init(jax.random.key(0), inputs)
        _, state = model.apply(variables, inputs, mutable=["taps"])
        return variables, state["taps"]

    inputs = jax.ShapeDtypeStruct(tuple(input_shape), jnp.dtype(dtype))
    variables, taps = jax.eval_shape(run, inputs)

    shapes = {
        path: "x".join(map(str, tap.shape[1:]))
        for path, tap in traverse_util.flatten_dict(taps).items()
    }
    counts: dict[tuple[str, ...], int] = {}
    for (*layer, _), leaf in traverse_util.flatten_dict(variables["params"]).items():
        counts[tuple(layer)] = counts.get(tuple(layer), 0) + math.prod(leaf.shape)

    rows = [("layer", "output", "parameters")]
    rows.append(("input", "x".join(map(str, inputs.shape[1:])), ""))
    for path in sorted(shapes.keys() | counts.keys(), key=network_order):
        count = f"{counts[path]:,}" if path in counts else ""
        rows.append(("/".join(path), shapes.get(path, ""), count))
    rows.append(("total", "", f"{sum(counts.values()):,}"))

    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        f"{layer:<{widths[0]}}  {shape:>{widths[1]}}  {count:>{widths[2]}}"
        for layer, shape, count in rows
    ]
    rule = "-" * len(lines[0])
    lines = [lines[0], rule, *lines[1:-1], rule, lines[-1]]
    return "\n".join(line.rstrip() for line in lines)

"""Accounting for an import: every variable of ours, every tensor of a file.

An importer says, for each variable, which tensor it is and how its axes lie there. What
is missing, what is left over and what has another shape is told in one error.
"""

import dataclasses
import difflib
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from convnet import models
from convnet.errors import ConvnetError

Shape = tuple[int, ...]
# Flat paths -> their variables.
Fresh = Callable[[Sequence[str]], dict[str, np.ndarray]]

_MOST_LINES = 12


@dataclasses.dataclass(frozen=True)
class Rule:
    """Where a variable comes from.

    Attributes:
      source: the name of the tensor in the file.
      axes: ours = theirs.transpose(axes); (): the axes lie as ours do.
      stored: the shape in the file, where it is not ours with its axes moved back.
      view: the shape that it is given before its axes are moved; then it is reshaped to
        ours.
    """

    source: str
    axes: tuple[int, ...] = ()
    stored: Shape = ()
    view: Shape = ()

    def stored_shape(self, ours: Shape) -> Shape:
        """Returns the shape that the tensor must have in the file."""
        if self.stored or not self.axes:
            return self.stored or ours
        return tuple(ours[self.axes.index(i)] for i in range(len(ours)))

    def read(self, tensor: Any, ours: Shape) -> np.ndarray:
        """Returns the variable, float32, for a tensor of the right shape."""
        values = np.asarray(tensor, np.float32)
        values = values.reshape(self.view) if self.view else values
        values = values.transpose(self.axes) if self.axes else values
        return np.ascontiguousarray(values.reshape(ours))


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of the report: `ours` is the flat path of a variable of this shape.

    `theirs` is the name of its tensor, or "" where it kept its initial value.
    """

    ours: str
    theirs: str
    shape: Shape


@dataclasses.dataclass(frozen=True)
class Imported:
    """What an importer returns.

    Attributes:
      variables: {"params": ..., "batch_stats": ...}, float32.
      architecture: {"name", "num_outputs", "options"}: the arguments of models.create.
      input_shape: that of one input, the network's own size.
      source: whose names the file has: "torchvision", "timm", "keras".
      report: a row for each variable.
    """

    variables: dict[str, Any]
    architecture: dict[str, Any]
    input_shape: Shape
    source: str
    report: tuple[Row, ...]


def template(architecture: Mapping[str, Any], input_shape: Shape) -> dict[str, Shape]:
    """Returns the shape of each variable by its flat path, "params/base/...".

    Args:
      architecture: {"name", "num_outputs", "options"}.
      input_shape: (*spatial, c).
    """
    shapes = _shapes(architecture, input_shape)
    return {name: tuple(leaf.shape) for name, leaf in _flatten(shapes).items()}


def initial(
    architecture: Mapping[str, Any], input_shape: Shape, seed: int = 0
) -> Fresh:
    """Returns a function that makes fresh variables, for the paths that a file lacks.

    Only those are computed: to compile the random numbers of all takes long.
    """
    model, inputs = _model(architecture), jnp.zeros((1, *input_shape))

    def fresh(paths: Sequence[str]) -> dict[str, np.ndarray]:
        @jax.jit
        def init() -> dict[str, jax.Array]:
            flat = _flatten(model.init(jax.random.key(seed), inputs))
            return {path: flat[path] for path in paths}

        return {path: np.asarray(leaf) for path, leaf in init().items()}

    return fresh


def match(
    path: Path,
    template: Mapping[str, Shape],
    tensors: Mapping[str, Any],
    rules: Mapping[str, Rule],
    *,
    ignore: Sequence[str] = (),
    initial: Fresh | None = None,
    allow_unexpected: bool = False,
    hint: str = "",
) -> tuple[dict[str, Any], tuple[Row, ...]]:
    """Makes our variables out of the tensors of a file.

    Args:
      path: the file, for the message.
      template: the shape of each variable by its flat path; see `template`.
      tensors: arrays by their names in the file.
      rules: for each path of the template, which tensor it is.
      ignore: regular expressions for whole names of tensors that hold no weights.
      initial: makes the variables whose tensors are missing; None: that is an error.
      allow_unexpected: leave out tensors that have no place.
      hint: what the message adds, such as what the file seems to be.

    Returns:
      The nested variables, and a row for each of them.

    Raises:
      ConvnetError: a tensor is missing, unexpected, or of another shape; lists all.
    """
    if rules.keys() != template.keys():
        raise ValueError(f"rules are not for {sorted(rules.keys() ^ template.keys())}")
    if len({rule.source for rule in rules.values()}) < len(rules):
        raise ValueError("two variables come from one tensor")
    names = [n for n in tensors if not any(re.fullmatch(p, n) for p in ignore)]
    wanted = {rule.source: ours for ours, rule in rules.items()}
    missing = [source for source in wanted if source not in tensors]
    unexpected = [name for name in names if name not in wanted]
    wrong = []
    for ours, rule in rules.items():
        if rule.source in tensors:
            found = tuple(tensors[rule.source].shape)
            want = rule.stored_shape(template[ours])
            if found != want:
                wrong.append((rule.source, found, want))
    lines = _sides(
        missing if initial is None else [], [] if allow_unexpected else unexpected
    )
    lines += _wrong_shapes(wrong)
    if lines:
        more = f"\n{hint}" if hint else ""
        raise ConvnetError(f"{path} does not fit:\n" + "\n".join(lines) + more)
    lacking = [ours for ours, rule in rules.items() if rule.source not in tensors]
    fresh = initial(lacking) if lacking else {}
    flat, rows = {}, []
    for ours, shape in template.items():
        source = "" if ours in fresh else rules[ours].source
        flat[ours] = rules[ours].read(tensors[source], shape) if source else fresh[ours]
        rows.append(Row(ours, source, shape))
    return traverse_util.unflatten_dict(flat, sep="/"), tuple(rows)


def _sides(missing: Sequence[str], unexpected: Sequence[str]) -> list[str]:
    """Missing names beside unexpected ones; what looks like a new name is beside it."""
    if not missing and not unexpected:
        return []
    rest, rows = list(unexpected), []
    for name in missing:
        near = difflib.get_close_matches(name, rest[:1000], n=1, cutoff=0.8)
        rows.append((name, near[0] if near else ""))
        if near:
            rest.remove(near[0])
    rows = [("", name) for name in rest] if not rows else _fill(rows, rest)
    left = f"{len(missing)} missing in the file"
    right = f"{len(unexpected)} there that have no place"
    shown = [(left, right), *rows[:_MOST_LINES]]
    width = max(len(row[0]) for row in shown)
    lines = [f"  {a[:60]:<{min(width, 60)}} | {b[:60]}".rstrip() for a, b in shown]
    if len(rows) > _MOST_LINES:
        lines.append(f"  ... and {len(rows) - _MOST_LINES} more lines")
    return lines


def _fill(rows: list[tuple[str, str]], rest: Iterable[str]) -> list[tuple[str, str]]:
    """Puts the names of `rest` into the gaps on the right side, then below."""
    rest = iter(rest)
    filled = [(name, near or next(rest, "")) for name, near in rows]
    return filled + [("", name) for name in rest]


def _wrong_shapes(wrong: Sequence[tuple[str, Shape, Shape]]) -> list[str]:
    lines = []
    for name, found, want in wrong[:_MOST_LINES]:
        same = sorted(found) == sorted(want)
        why = " (transposed?)" if same else ""
        if not same and math.prod(found) == math.prod(want):
            why = " (reshaped?)"
        lines.append(f"  {name[:60]} is {list(found)}, not {list(want)}{why}")
    if len(wrong) > _MOST_LINES:
        lines.append(f"  ... and {len(wrong) - _MOST_LINES} more of another shape")
    return lines


def _model(architecture: Mapping[str, Any]) -> Any:
    return models.create(
        architecture["name"],
        num_outputs=architecture["num_outputs"],
        **architecture["options"],
    )


def _shapes(architecture: Mapping[str, Any], input_shape: Shape) -> Any:
    inputs = jax.ShapeDtypeStruct((1, *input_shape), jnp.float32)
    return jax.eval_shape(_model(architecture).init, jax.random.key(0), inputs)


def _flatten(variables: Any) -> dict[str, Any]:
    return traverse_util.flatten_dict(variables, sep="/")

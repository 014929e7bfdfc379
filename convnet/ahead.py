"""What a function computes of its weights alone, computed once and not in each call.

A network in bfloat16 rounds its kernels, and one with batch norm multiplies them by its
scales, before it looks at an input: the smaller the batch, the more of its time.
"""

import functools
import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Literal, jaxpr_as_fun


class Ahead:
    """`inputs -> function(weights, inputs)`, compiled for each shape of the inputs.

    What depends on the weights alone is computed when it is first needed, and kept in
    their place, for all shapes.
    """

    def __init__(
        self,
        function: Callable[[Any, Any], Any],
        weights: Any,
        options: dict[str, Any] | None = None,
    ) -> None:
        """Compiles nothing yet.

        Args:
          function: pure; of a tree of arrays and of one array.
          weights: the tree.
          options: of the compiler.
        """
        self._function, self._weights, self._options = function, weights, options
        # By what they compute: the same for any shape of the inputs.
        self._ready: dict[Hashable, jax.Array] = {}
        self._programs: dict[tuple, Callable[[Any], Any]] = {}

    def __call__(self, inputs: Any) -> Any:
        """Returns the function's value for the weights and the inputs."""
        kind = (inputs.shape, inputs.dtype)
        if kind not in self._programs:
            self._programs[kind] = self._compile(inputs)
        return self._programs[kind](inputs)

    def _compile(self, inputs: Any) -> Callable[[Any], Any]:
        leaves, tree = jax.tree.flatten(self._weights)

        def flat(leaves: list, inputs: Any) -> Any:
            return self._function(tree.unflatten(leaves), inputs)

        closed, out = jax.make_jaxpr(flat, return_shape=True)(leaves, inputs)
        jaxpr = closed.jaxpr
        *given, read = jaxpr.invars
        before, border = _split(jaxpr, given)
        names = _names(before, {var: i for i, var in enumerate(given)})
        missing = [var for var in border if names[var] not in self._ready]
        known = set(map(id, before))
        after = [equation for equation in jaxpr.eqns if id(equation) not in known]

        def part(equations: list, reads: list, gives: list) -> Callable[..., list]:
            it = jaxpr.replace(invars=reads, outvars=gives, eqns=equations)
            return jaxpr_as_fun(ClosedJaxpr(it, closed.consts))

        jit = functools.partial(jax.jit, compiler_options=self._options)
        found = jit(part(before, given, missing))(*leaves)
        self._ready |= {names[v]: x for v, x in zip(missing, found, strict=True)}
        finish = part(after, [*border, read], jaxpr.outvars)

        def run(ready: list, inputs: Any) -> Any:
            return jax.tree.unflatten(jax.tree.structure(out), finish(*ready, inputs))

        return functools.partial(jit(run), [self._ready[names[v]] for v in border])


def _split(jaxpr: Any, given: Sequence) -> tuple[list, list]:
    """Returns the equations that follow from `given`, and what the others read of it.

    An equation that makes its operand more than twice as large (a bias on a map) stays
    with those that read it: its result would take memory, and time to read.
    """
    known, before = set(given), []
    for equation in jaxpr.eqns:
        operands = _operands(equation)
        if operands and known.issuperset(operands) and not _holds_arrays(equation):
            before.append(equation)
            known.update(equation.outvars)
    while True:
        ids = set(map(id, before))
        read = [v for e in jaxpr.eqns if id(e) not in ids for v in _operands(e)]
        read += [var for var in jaxpr.outvars if not isinstance(var, Literal)]
        border = [var for var in dict.fromkeys(read) if var in known]
        larger = [
            e for e in before if _grows(e) and not set(border).isdisjoint(e.outvars)
        ]
        if not larger:
            return before, border
        dropped = set(map(id, larger))
        before = [e for e in before if id(e) not in dropped]
        known.difference_update(v for e in larger for v in e.outvars)


def _operands(equation: Any) -> list:
    return [var for var in equation.invars if not isinstance(var, Literal)]


def _holds_arrays(equation: Any) -> bool:
    """Whether more than its name, its params' text and its operands decide it."""
    return any(
        isinstance(value, np.ndarray | jax.Array) or getattr(value, "consts", ())
        for value in equation.params.values()
    )


def _grows(equation: Any) -> bool:
    def size(variables: Sequence) -> int:
        return sum(math.prod(var.aval.shape) for var in variables)

    return size(equation.outvars) > 2 * size(_operands(equation))


def _names(equations: Sequence, names: dict) -> dict:
    """Returns for each result what it is computed by, and of what."""
    names = dict(names)
    for equation in equations:
        operands = tuple(
            str(v) if isinstance(v, Literal) else names[v] for v in equation.invars
        )
        # Of a function with a gradient of its own, the other params are about that, and
        # new in each trace.
        params = equation.params.get("call_jaxpr", equation.params)
        computed = hash((equation.primitive.name, str(params), operands))
        for i, var in enumerate(equation.outvars):
            names[var] = (computed, i)
    return names

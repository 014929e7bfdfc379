"""Whether the network that a model file describes is the one whose weights it holds.

All of this happens on shapes: a description of a network that would take hours or all
memory costs nothing until it is refused.
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import traverse_util
from jax.extend import core

from convnet.models import lowering
from convnet.tensorfile import Entry, shorten

if TYPE_CHECKING:
    from convnet.bundle import Bundle

# For two examples in float32: arithmetic operations, and bytes of the largest array.
# ResNet-101 at 224x224: 31e9 and 26e6.
_MOST_OPERATIONS = 10e12
_MOST_BYTES = 2e9


def check_tensors(bundle: "Bundle", tensors: dict[str, Entry]) -> None:
    """Compares the tensors of a file with those of the architecture.

    Raises:
      ValueError: there is no such architecture, or tensors are missing, unexpected, or
        of another shape or dtype; names them all.
    """
    # Every layer has tensors, and every width is the side of one: an architecture
    # that asks for more than there are is refused before it is built.
    sides = [side for entry in tensors.values() for side in entry.shape]
    largest = max([1024, len(tensors), *sides])
    for name, value in bundle.architecture["options"].items():
        numbers = value if isinstance(value, list) else [value]
        if len(numbers) > max(64, len(tensors)) or any(
            isinstance(number, int) and number > largest for number in numbers
        ):
            raise ValueError(
                f"option {name!r} of its architecture is {str(value)[:20]}, more than"
                " its tensors can fill"
            )
    budget = 2 * len(tensors) + 50
    calls = 0

    def count(call: Callable, args: Any, kwargs: Any, context: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > budget:
            raise ValueError(f"it has more layers than {len(tensors)} tensors are for")
        return call(*args, **kwargs)

    shape = (1, *bundle.preprocessing["input_shape"])
    inputs = jax.ShapeDtypeStruct(shape, jnp.float32)
    try:
        with nn.intercept_methods(count):
            wanted = jax.eval_shape(bundle.model().init, jax.random.key(0), inputs)
    except Exception as error:  # A constructor or JAX may raise anything.
        text = " ".join(str(error).split())[:300]
        raise ValueError(f"its architecture cannot be built: {text}") from error
    _compare(tensors, traverse_util.flatten_dict(wanted, sep="/"))


def _compare(tensors: dict[str, Entry], wanted: dict[str, Any]) -> None:
    missing = sorted(wanted.keys() - tensors.keys())
    unexpected = sorted(tensors.keys() - wanted.keys())
    if missing or unexpected:
        raise ValueError(
            f"missing tensors {shorten(missing)}, unexpected tensors"
            f" {shorten(unexpected)}"
        )
    wrong = [
        f"{name} is {entry}, want {wanted[name].dtype}{list(wanted[name].shape)}"
        for name, entry in sorted(tensors.items())
        if entry.shape != wanted[name].shape
        or entry.dtype not in (wanted[name].dtype, jnp.bfloat16)
    ]
    if wrong:
        more = f"; and {len(wrong) - 6} more" if len(wrong) > 6 else ""
        raise ValueError(f"tensor {'; '.join(wrong[:6])}{more}")


def compiled(
    function: Callable[..., jax.Array], *args: Any
) -> Callable[..., jax.Array]:
    """Compiles a function of arrays in its plain form, at the highest precision.

    Raises:
      ValueError: it would take unreasonably long, or unreasonably much memory.
    """
    with jax.default_matmul_precision("highest"), lowering.plain():
        # A new function each time: one that was traced before would not be plain.
        traced = jax.jit(lambda *args: function(*args)).trace(*args)
        largest = _largest(traced.jaxpr.jaxpr)
        if largest > _MOST_BYTES:
            raise ValueError(
                f"two examples take it an array of {largest:.2g} bytes; up to"
                f" {_MOST_BYTES:.2g} are tried"
            )
        lowered = traced.lower()
    operations = (lowered.cost_analysis() or {}).get("flops", 0)
    if operations > _MOST_OPERATIONS:
        raise ValueError(
            f"two examples take it {operations:.2g} operations; up to"
            f" {_MOST_OPERATIONS:.2g} are tried"
        )
    return lowered.compile()


def _largest(jaxpr: core.Jaxpr) -> int:
    """The bytes of the largest array that is computed.

    The compiled program's own account of its memory leaves out what libraries take.
    """
    sizes = [0]
    for equation in jaxpr.eqns:
        for variable in equation.outvars:
            shape = getattr(variable.aval, "shape", ())
            sizes.append(4 * math.prod(shape))
        for value in equation.params.values():
            if isinstance(value, core.ClosedJaxpr):
                sizes.append(_largest(value.jaxpr))
            elif isinstance(value, core.Jaxpr):
                sizes.append(_largest(value))
    return max(sizes)

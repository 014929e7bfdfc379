"""Named intermediates: what a layer writes, and how a caller reads it."""

import contextlib
import contextvars
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from flax import linen as nn
from flax import traverse_util

# Collections come back from a compiled function sorted by letter. The order of the
# network is the stem, then numbered parts by number, then these words.
# A pool that comes before the norm has a name of its own for that: "conv_pool"; a norm
# before the convolution is a "pre_norm".
_ORDER = ("base", "head", "aux", "whiten", "pre_norm", "conv", "conv_pool", "dense")
_ORDER += ("norm", "expand", "gelu", "project", "layer_scale")
_ORDER += ("shortcut_conv", "shortcut_norm", "add", "concat", "relu", "pool")
_ORDER += ("features", "logits")

_THROUGH = contextvars.ContextVar("through", default=None)


@contextlib.contextmanager
def through(function: Callable[[str, jax.Array], jax.Array]) -> Iterator[None]:
    """What is traced within sends every tap through `function(path, x) -> x`.

    The network goes on with what it returns: rules for the gradient, such as guided
    back-propagation's, and ablations need no other network.
    """
    token = _THROUGH.set(function)
    try:
        yield
    finally:
        _THROUGH.reset(token)


def tap(module: nn.Module, name: str, x: jax.Array) -> jax.Array:
    """Names `x` as an intermediate of `module`, and returns it.

    Under `mutable=["taps"]` it is written to the collection "taps", over what an
    earlier call left there; otherwise this costs nothing. Where the collection
    "perturbations" holds an array of the same path, it is added: the gradient with
    respect to zeros there is the gradient with respect to the tap.
    """
    function = _THROUGH.get()
    if function is not None:
        x = function("/".join((*module.path, name)), x)
    if module.has_variable("perturbations", name):
        x = x + module.get_variable("perturbations", name).astype(x.dtype)
    # Not at initialisation, where every collection is mutable: `init` returns what a
    # network keeps, not what passed through it.
    if module.is_mutable_collection("taps") and not module.is_initializing():
        # Not `sow`, which refuses the name of a submodule: a tap has the name of the
        # layer that made it.
        module.put_variable("taps", name, x)
    return x


def observed(module: nn.Module, *names: str) -> bool:
    """Whether these taps of `module` have to be computed: they are read or changed."""
    return (
        module.is_mutable_collection("taps")  # at initialisation too
        or any(module.has_variable("perturbations", name) for name in names)
        or _THROUGH.get() is not None
    )


def tapped(parent: nn.Module, layer: nn.Module, *args: Any) -> jax.Array:
    """Calls a layer of `parent`, and taps what it returns under the layer's name."""
    return tap(parent, layer.name, layer(*args))


def taps(collection: Mapping[str, Any]) -> dict[str, Any]:
    """The collection "taps" as `{"base/block1/conv1": array}`, in network order."""
    flat = traverse_util.flatten_dict(collection)
    return {"/".join(path): flat[path] for path in sorted(flat, key=network_order)}


def network_order(path: tuple[str, ...]) -> list[tuple[float, int, str]]:
    """The key that sorts paths of layers as the network calls them."""
    place = []
    for part in path:
        word, number = re.fullmatch(r"(.*?)(\d*)", part).groups()
        number = "0" if word == "stem" else number or "inf"
        rank = _ORDER.index(word) if word in _ORDER else len(_ORDER)
        place.append((float(number), rank, word))
    return place

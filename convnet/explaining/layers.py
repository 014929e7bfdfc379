"""What the taps of a network are, told by their names."""

import difflib
import math
import re
from collections.abc import Mapping, Sequence

import numpy as np
from flax import traverse_util

from convnet.errors import UsageError
from convnet.models.intermediates import network_order

_ACTIVATIONS = ("relu", "gelu", "silu", "swish", "sigmoid", "tanh")


def kind(tap: str) -> str:
    """Returns "convolution", "activation", "pooling", or "" for another tap."""
    word = re.sub(r"\d+$", "", tap.rsplit("/", 1)[-1])
    if word.endswith("pool"):
        return "pooling"
    if word.endswith(("conv", "whiten")):
        return "convolution"
    return "activation" if word.endswith(_ACTIVATIONS) else ""


def maps(shapes: Mapping[str, tuple[int, ...]], rank: int) -> list[str]:
    """Returns the taps that are feature maps: `rank` spatial axes, above one place.

    Args:
      shapes: of all taps without the batch, in network order.
      rank: the number of spatial axes of the input.
    """
    return [
        name
        for name, shape in shapes.items()
        if len(shape) == rank + 1 and math.prod(shape[:-1]) > 1
    ]


def last(taps: Sequence[str]) -> str:
    """Returns the last of `maps` that is no pool, what class activation maps are from.

    Nothing later knows places; a pool knows fewer than the map before it.
    """
    return ([tap for tap in taps if kind(tap) != "pooling"] or list(taps))[-1]


def choose(name: str, taps: Sequence[str]) -> str:
    """Returns the tap that a person names, by its path or the end of it.

    Raises:
      UsageError: there is none, or several; names the nearest.
    """
    found = [tap for tap in taps if tap == name] or [
        tap for tap in taps if name and f"/{tap}".endswith(f"/{name}")
    ]
    if len(found) == 1:
        return found[0]
    near = found or difflib.get_close_matches(name, taps, 5, 0.3) or taps[-5:]
    what = "several layers are called so" if found else "no layer with a map"
    raise UsageError(f"--layer={name}: {what}; the nearest are {', '.join(near)}")


def stages(taps: Sequence[str], most: int) -> list[tuple[str, list[str]]]:
    """Groups convolutions, activations and pools by the block that holds them.

    Returns at most `most` blocks, spread evenly from the first to the last, each with
    its taps in network order.
    """
    groups: dict[str, list[str]] = {}
    for tap in taps:
        if kind(tap):
            groups.setdefault(tap.rpartition("/")[0] or tap, []).append(tap)
    places = np.linspace(0, len(groups) - 1, min(most, len(groups)))
    chosen = {round(place) for place in places}
    return [item for place, item in enumerate(groups.items()) if place in chosen]


def first_kernel(
    variables: Mapping, rank: int, channels: int
) -> tuple[str, np.ndarray] | None:
    """Returns path and kernel (*k, channels, features) of the layer at the input.

    None where the first layer is no convolution of `rank` spatial axes.
    """
    for collection in ("batch_stats", "params"):
        flat = traverse_util.flatten_dict(dict(variables.get(collection, {})))
        paths = [path for path in flat if path[-1] == "kernel"]
        for path in sorted(paths, key=network_order)[:1]:
            kernel = np.asarray(flat[path])
            if kernel.ndim == rank + 2 and kernel.shape[-2] == channels:
                return "/".join(path[:-1]), kernel
    return None

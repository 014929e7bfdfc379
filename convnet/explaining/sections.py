"""The parts of the page: each runs a method, draws what it found, and names it."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from convnet import step as step_lib
from convnet.explaining import drawing, layers, receptive_field, texts, visualization
from convnet.explaining.album import Album, Panel
from convnet.explaining.answers import Target
from convnet.explaining.network import Network
from convnet.explaining.receptive_field import ReceptiveField
from convnet.explaining.study import Finding

CHANNELS = 8  # of a feature map that are drawn
STAGES = 6  # blocks of a network that are drawn
UNITS = 10  # for which the most activating input is looked for
FILTERS = 96  # of the first layer


def size(shape: Sequence[int]) -> str:
    """(15, 15, 64) -> "15×15 places, 64 channels"."""
    *places, channels = shape
    what = "channel" if channels == 1 else "channels"
    return f"{'×'.join(map(str, places))} places, {channels} {what}"


def filters(network: Network, album: Album) -> Panel | None:
    """The kernel of the first convolution; None where the first layer is none."""
    found = layers.first_kernel(
        network.bundle.variables, network.rank, network.shape[-1]
    )
    if found is None:
        return None
    name, kernel = found
    *window, channels, features = kernel.shape
    shown = min(features, FILTERS)
    note = (
        f"{name}: {features} filters of {'×'.join(map(str, window))} places and"
        f" {channels} {'channel' if channels == 1 else 'channels'}"
        + (f", of which {shown} are drawn." if shown < features else ".")
    )
    return album.add("filters", drawing.filters(kernel[..., :shown]), "", note)


def attribution(
    finding: Finding,
    method: str,
    targets: Sequence[Target],
    stored: np.ndarray,
    album: Album,
    folders: Sequence[str],
) -> list[Panel]:
    """One method's panel for each input."""
    what = drawing.kind(stored.shape[1:], str(stored.dtype))
    panels = []
    for row, target in enumerate(targets):
        note = texts.QUESTIONS[method].format(
            label=target.label,
            this=texts.THIS[what],
            bright=texts.BRIGHT[what],
        )
        heat = finding.heat[row]
        if finding.errors is not None:
            share = 100 * float(finding.errors[row])
            note += f" All shares add up to the score, but for {share:.2g} %."
        if method == "guided_backprop":
            drawn = drawing.gradient(finding.values[row], stored[row])
        elif method in ("integrated_gradients", "smooth_grad"):
            drawn = drawing.pixels(heat, finding.signed, stored[row])
        else:
            drawn = drawing.relevance(stored[row], heat, finding.signed)
        name = f"{folders[row]}/{method}"
        panels.append(album.add(name, drawn, texts.TITLES[method], note))
    return panels


def feature_maps(
    network: Network,
    x: np.ndarray,
    stages: Sequence[tuple[str, list[str]]],
    album: Album,
    folder: str,
) -> list[dict[str, Any]]:
    """Filter, detect, condense: the strongest channels of one input `x` (1, ...).

    Within a block the same channels are drawn, so that each can be followed.
    """
    found = network.taps(x, [tap for _, taps in stages for tap in taps])
    parts = []
    for block, taps in stages:
        end = found[taps[-1]][0]
        strength = np.abs(end).reshape(-1, end.shape[-1]).mean(0)
        chosen = np.argsort(-strength, kind="stable")[:CHANNELS]
        panels = []
        for tap in taps:
            maps, kind = found[tap][0], layers.kind(tap)
            picked = chosen
            if maps.shape[-1] != end.shape[-1]:
                own = np.abs(maps).reshape(-1, maps.shape[-1]).mean(0)
                picked = np.argsort(-own, kind="stable")[:CHANNELS]
            signed = kind != "activation" and bool(maps.min() < 0)
            verb, _ = texts.STEPS[kind]
            name = tap.rsplit("/", 1)[-1]
            drawn = drawing.sheet(maps[..., np.sort(picked)], signed, columns=4)
            file = f"{folder}/{tap.replace('/', '-')}"
            panels.append(album.add(file, drawn, f"{verb}: {name}", size(maps.shape)))
        parts.append({"title": block, "size": size(end.shape), "panels": panels})
    return parts


def receptive_fields(
    network: Network,
    fields: Mapping[str, ReceptiveField],
    stages: Sequence[tuple[str, list[str]]],
    stored: np.ndarray | None,
    album: Album,
) -> dict[str, Any]:
    """A row for each layer, and for the last of each block what its middle unit sees.

    `stored` (1, *shape) is the input on which the effective field is measured, None for
    rows alone.
    """
    rows = [
        {
            "tap": tap,
            "map": "×".join(map(str, network.shapes[tap][:-1])),
            "channels": network.shapes[tap][-1],
            "size": "×".join(map(str, fields[tap].size)),
            "step": "×".join(map(str, fields[tap].step)),
            "whole": all(
                seen >= 2 * side
                for seen, side in zip(fields[tap].size, network.shape, strict=False)
            ),
        }
        for tap in network.shapes
        if tap in fields and layers.kind(tap)
    ]
    ends = [taps[-1] for _, taps in stages if taps[-1] in fields]
    if stored is None or not ends:
        return {"rows": rows, "panels": []}
    x, spatial = network.normalize(stored), network.shape[:-1]
    units = {tap: tuple(side // 2 for side in network.shapes[tap][:-1]) for tap in ends}
    panels = []
    for tap in ends:
        weights = {t: np.zeros((1, *network.shapes[t]), np.float32) for t in ends}
        weights[tap][(0, *units[tap])] = 1
        seen = np.abs(network.unit_gradient(x, weights)[0]).sum(-1)
        drawn = drawing.relevance(stored[0], seen, False)
        extent = fields[tap].box(units[tap], spatial)
        if drawing.kind(stored.shape[1:], str(stored.dtype)) == "picture":
            drawing.box(drawn, extent, spatial)
        note = (
            f"{'×'.join(map(str, fields[tap].size))} places, of which"
            f" {math.prod(part.stop - part.start for part in extent):,} lie in this"
            f" input of {math.prod(spatial):,}."
        )
        name = f"receptive_field/{tap.replace('/', '-')}"
        panels.append(album.add(name, drawn, tap.removeprefix("base/"), note))
    return {"rows": rows, "panels": panels}


def most_activating(
    network: Network,
    tap: str,
    channels: Sequence[int],
    names: Sequence[str],
    album: Album,
    folder: str,
) -> list[Panel]:
    """The input that each of these channels of a tap answers to most."""
    about = network.bundle.preprocessing
    picture = about["input_dtype"] == "uint8"
    mean, std = tuple(about["mean"]), tuple(about["std"])

    def to_input(values: jax.Array) -> jax.Array:
        # Floats have no range of their own: three deviations either way.
        return step_lib.normalize(values, mean, std) if picture else 6 * values - 3

    chosen = jnp.asarray(np.array(channels, np.int32))

    def unit(x: jax.Array) -> jax.Array:
        return network.mean_unit(x, chosen, tap)

    values, _ = visualization.most_activating(
        unit, network.shape, len(channels), to_input=to_input
    )
    inputs = np.asarray(jax.vmap(to_input)(jnp.asarray(values)))
    panels = []
    for channel, name, one in zip(
        channels, names, network.denormalize(inputs), strict=True
    ):
        panels.append(album.add(f"{folder}/{channel}", drawing.example(one), name))
    return panels


def neighbours(
    found: Sequence[tuple[float, Any]],
    look_up: Callable[[Any], tuple[np.ndarray, str]],
    album: Album,
    folder: str,
) -> list[Panel]:
    """One input's neighbours; `look_up` gives an item's input as stored, and a name."""
    panels = []
    for place, (similarity, item) in enumerate(found, 1):
        stored, name = look_up(item)
        file, note = f"{folder}/nearest-{place}", f"similarity {similarity:.3f}"
        panels.append(album.add(file, drawing.example(stored), name, note))
    return panels


def fields_of(network: Network) -> dict[str, ReceptiveField]:
    """The receptive fields of the network's feature maps."""
    return receptive_field.receptive_fields(
        network.bundle.model(), network.bundle.variables, network.shape
    )

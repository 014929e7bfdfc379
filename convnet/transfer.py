"""Transfer: a run that starts from another model's weights.

config.init_from names the model, config.transfer says what of it is new, frozen, or
learns at another rate, by `patterns`.
"""

import dataclasses
import math
from typing import Any

import jax
import ml_collections
import numpy as np
from flax import linen as nn

from convnet import bundle as bundle_lib
from convnet import checkpoint, freezing, patterns, resolve, transfer_table
from convnet import config as config_lib
from convnet.bundle import Bundle
from convnet.data.source import Dataset
from convnet.errors import UsageError
from convnet.freezing import Frozen
from convnet.transfer_table import Leaf

# The sections of a config that a model has a word in; its task and labels are not those
# of the run.
_SECTIONS = ("model", "data")
_LISTED = 20  # leaves that do not fit


@dataclasses.dataclass(frozen=True)
class Plan:
    """What becomes of every leaf of the network.

    Attributes:
      origin: config.init_from, "" where all is new.
      leaves: of both collections, in the order of their paths.
      variables: what is loaded, a part of {"params", "batch_stats"}.
      frozen: what stays as it is, until it thaws.
      thaw_step: the step from which on all of it trains; 0: none.
    """

    origin: str
    leaves: tuple[Leaf, ...]
    variables: dict[str, Any]
    frozen: Frozen
    thaw_step: int

    def scales(self) -> dict[str, float]:
        """Returns the factors of the learning rate that are not 1, by path."""
        return {leaf.path: leaf.scale for leaf in self.leaves if leaf.scale != 1.0}

    def fingerprint(self) -> dict[str, Any]:
        """Returns what tells the loaded weights from others; {} without any."""
        if not self.origin:
            return {}
        return {"init_from": {"sha256": checkpoint.sha256(self.variables)}}

    def to_dict(self) -> dict[str, Any]:
        """Returns every leaf's origin and fate, as plain values."""
        leaves = {
            f"{leaf.collection}/{leaf.path}": {
                "origin": "loaded" if leaf.loaded else "new",
                "fate": "frozen" if leaf.frozen else "trained",
                "lr_scale": leaf.scale,
            }
            for leaf in self.leaves
        }
        return {"init_from": self.origin, "leaves": leaves}

    def table(self) -> str:
        """Returns the leaves counted by part; "" where all is new and learns alike."""
        if not self.origin and not self.scales():
            return ""
        lines = [f"init_from: {self.origin}"] if self.origin else []
        lines.append(transfer_table.draw(self.leaves, thaws=bool(self.thaw_step)))
        if self.thaw_step:
            lines.append(f"from step {self.thaw_step:,} on all of it is trained")
        return "\n".join(lines)


def adopt(config: ml_collections.ConfigDict) -> Bundle | None:
    """Loads the model of config.init_from, and takes over what is the model's to say.

    Architecture, options and preprocessing are set where the config leaves them at
    their defaults.

    Returns:
      The model; None without init_from.

    Raises:
      UsageError: there is no such model, it is of another architecture than the config
        asks for, or config.transfer is set without one.
      ConvnetError: the file cannot be used.
    """
    if not config.init_from:
        for name in ("new", "freeze", "thaw_epoch"):
            if config.transfer[name]:
                raise UsageError(
                    f"transfer.{name} is {config.transfer[name]!r}, but init_from is"
                    " empty: name the model to start from"
                )
        return None
    bundle = load("init_from", config.init_from)
    said = config_lib.default()
    bundle_lib.configure(said, bundle)
    start, found = (config_lib.flatten(c) for c in (config_lib.default(), config))
    name = said.model.name
    if found["model.name"] not in (start["model.name"], name):
        raise UsageError(
            f"model.name is {found['model.name']!r}, but init_from ="
            f" {config.init_from!r} holds a {name}: leave model.name out, or choose"
            " another model"
        )
    config.model.name = name
    for key, value in config_lib.changed(said).items():
        section, leaf = key.split(".")
        if section in _SECTIONS and found[key] == start[key]:
            config[section][leaf] = value
    return bundle


def load(key: str, name: str) -> Bundle:
    """Reads the model that a key of the config names.

    Raises:
      UsageError: there is no such model; names the key.
      ConvnetError: it cannot be used.
    """
    if name.startswith("hf://"):
        from convnet.weights import importing

        return importing.load(name).bundle
    try:
        return bundle_lib.load(name)
    except UsageError as error:
        text = str(error).removeprefix("--model=")
        raise UsageError(f"{key}={text}") from error


def plan(
    config: ml_collections.ConfigDict,
    bundle: Bundle | None,
    model: nn.Module,
    example: np.ndarray,
    dataset: Dataset,
) -> Plan:
    """Says of every leaf whether it is loaded or new, frozen or trained.

    New is what config.transfer.new names, and of the head what does not fit, or, if
    the classes of the data are others than the model's, its logits.

    Args:
      config: after `adopt`.
      bundle: what `adopt` returned.
      model: the network.
      example: an input, (1, *spatial, c).
      dataset: the data.

    Raises:
      ValueError: the network does not take such an input.
      UsageError: the data are of another dtype than the model's, a pattern matches
        nothing, leaves of the file and the network do not fit and no pattern names
        them, or nothing is left to train.
    """
    if bundle and bundle.preprocessing["input_dtype"] != str(example.dtype):
        raise UsageError(
            f"the data hold {example.dtype}, but init_from = {config.init_from!r} takes"
            f" {bundle.preprocessing['input_dtype']}: store them so"
        )
    settings = config.transfer
    if settings.thaw_epoch and not settings.freeze:
        raise UsageError(
            f"transfer.thaw_epoch is {settings.thaw_epoch}, but transfer.freeze is"
            " empty: nothing is frozen"
        )
    inputs = jax.ShapeDtypeStruct(example.shape, np.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), inputs)
    wanted = _leaves(shapes)
    given = _leaves(bundle.variables) if bundle else {}
    names = {path for _, path in [*wanted, *given]}
    own = {path for _, path in wanted}
    new = patterns.select("transfer.new", patterns.parse(settings.new), names)
    frozen = patterns.select("transfer.freeze", patterns.parse(settings.freeze), own)
    scales = patterns.factors(
        "transfer.lr_scales",
        settings.lr_scales,
        {path for collection, path in wanted if collection == "params"},
    )
    if bundle and bundle.classes != dataset.classes:
        new |= {path for path in names if patterns.matches("head/logits", path)}
    loaded = {
        key: given[key]
        for key, leaf in wanted.items()
        if key in given and given[key].shape == leaf.shape and key[1] not in new
    }
    if bundle:
        _check_fit(config.init_from, wanted, given, loaded, new)
    leaves = tuple(
        Leaf(
            collection,
            path,
            math.prod(leaf.shape),
            (collection, path) in loaded,
            path in frozen,
            scales.get(path, 1.0),
        )
        for (collection, path), leaf in sorted(wanted.items(), key=lambda x: x[0][1])
    )
    _check_fates(leaves)
    return Plan(
        config.init_from,
        leaves,
        _nested(loaded),
        Frozen.of(shapes["params"], shapes.get("batch_stats", {}), frozen),
        resolve.thaw_step(config, len(dataset.train)),
    )


def _check_fit(
    origin: str, wanted: dict, given: dict, loaded: dict, new: set[str]
) -> None:
    """Raises UsageError, with both sides, for what neither fits nor starts anew."""
    rows = []
    for key in sorted(wanted.keys() | given.keys(), key=lambda key: key[1]):
        path = key[1]
        if key not in loaded and path not in new and not patterns.matches("head", path):
            sides = [
                str(list(s[key].shape)) if key in s else "-" for s in (given, wanted)
            ]
            rows.append((path, *sides))
    if not rows:
        return
    more = len(rows) - _LISTED
    rows = [("", "in the file", "in the network"), *rows[:_LISTED]]
    lines = transfer_table.aligned(rows, "<<<")
    lines += [f"... and {more} more"] if more > 0 else []
    raise UsageError(
        f"init_from={origin} does not fit the network:\n  "
        + "\n  ".join(lines)
        + "\nset model.* (and the channels of the data) as in the file, or name in"
        " transfer.new what is to start anew"
    )


def _check_fates(leaves: tuple[Leaf, ...]) -> None:
    lost = [leaf.path for leaf in leaves if leaf.frozen and not leaf.loaded]
    if lost:
        raise UsageError(
            f"transfer.freeze freezes what is new and would never learn: {lost[0]}"
            + (f" and {len(lost) - 1} more" if len(lost) > 1 else "")
        )
    if not any(leaf.collection == "params" and not leaf.frozen for leaf in leaves):
        raise UsageError(
            "transfer.freeze freezes all there is: nothing is left to train"
        )


def _leaves(variables: dict[str, Any]) -> dict[tuple[str, str], Any]:
    return {
        (collection, path): leaf
        for collection, tree in variables.items()
        for path, leaf in freezing.flatten(tree).items()
    }


def _nested(leaves: dict[tuple[str, str], Any]) -> dict[str, Any]:
    return freezing.unflatten({"/".join(key): leaf for key, leaf in leaves.items()})

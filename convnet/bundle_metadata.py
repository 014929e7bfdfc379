"""What a model file says beside its weights: written as JSON, and checked when read."""

import dataclasses
import json
import math
from typing import Any

import numpy as np

from convnet import config as config_lib
from convnet import tta
from convnet.tensorfile import parse_json, shorten

FORMAT = 1
_KIND = "convnet"
# The probe's logits are kept up to so many; of more, every nth.
_MOST_LOGITS = 8192
# Of one input: 3,000 x 3,000 pixels, or ten steps of three maps of 1,440 x 721.
_MOST_VALUES = 2**25

_FIELDS = {
    "architecture": {"name": str, "num_outputs": int, "options": dict},
    "task": {"name": str, "positive": int | None},
    "classes": list,
    "preprocessing": {
        "input_shape": list,
        "input_dtype": str,
        "resize": str,
        "crop_fraction": float | int,
        "interpolation": str,
        "mean": list,
        "std": list,
    },
    "provenance": dict,
    "views": str,
    "probe": {"shape": list, "logits": list},
}

# Younger than the format: files without them stay readable.
_OPTIONAL = {"crop_fraction", "interpolation", "views"}


@dataclasses.dataclass(frozen=True)
class Probe:
    """The logits that a model file claims for its probe input.

    Attributes:
      shape: that of all logits.
      logits: float32, all of them or every nth, in their order.
    """

    shape: tuple[int, ...]
    logits: np.ndarray

    @classmethod
    def of(cls, logits: np.ndarray) -> "Probe":
        """Returns the probe of logits of any shape."""
        step = math.ceil(logits.size / _MOST_LOGITS) or 1
        return cls(logits.shape, logits.ravel()[::step].astype(np.float32))


def pack(about: dict[str, Any], probe: Probe) -> dict[str, str]:
    """Returns the metadata of a file: the fields of a Bundle but its variables.

    Raises:
      ValueError: they are not what `unpack` accepts.
    """
    table = {"shape": probe.shape, "logits": probe.logits.tolist()}
    text = json.dumps(about | {"probe": table})
    metadata = {"format": f"{_KIND} {FORMAT}", _KIND: text}
    unpack(metadata)
    return metadata


def unpack(metadata: dict[str, str]) -> tuple[dict[str, Any], Probe]:
    """Reads the metadata of a file.

    Returns:
      The fields of a Bundle but its variables, and the probe.

    Raises:
      ValueError: it is no model file of ours, one of a newer convnet, or something in
        it is missing, unknown or of the wrong kind.
    """
    kind, _, version = metadata.get("format", "").partition(" ")
    if kind != _KIND or _KIND not in metadata:
        raise ValueError(
            "it is a safetensors file, but holds no architecture, labels and"
            " preprocessing of convnet's"
        )
    if version != str(FORMAT):
        newer = version.isascii() and version.isdecimal() and version.lstrip("0") > "1"
        why = "a newer convnet wrote it: update convnet" if newer else "not a version"
        raise ValueError(
            f"its format is {version[:20]!r}, this convnet reads {FORMAT}: {why}"
        )
    about = parse_json(metadata[_KIND], "its metadata")
    _check_fields("", about, _FIELDS)
    table = about.pop("probe")
    _check_preprocessing(about["preprocessing"])
    _check_task(about)
    if (views := about.get("views", "none")) not in tta.VIEWS:
        raise ValueError(f"views is {views[:40]!r}: want one of {', '.join(tta.VIEWS)}")
    return about | {"classes": tuple(about["classes"])}, _probe(table)


def _check_fields(where: str, table: Any, wanted: dict[str, Any]) -> None:
    if unknown := sorted(set(table) - set(wanted)):
        raise ValueError(f"its metadata has unknown fields {shorten(unknown)}{where}")
    if missing := sorted(set(wanted) - set(table) - _OPTIONAL):
        raise ValueError(f"its metadata lacks {shorten(missing)}{where}")
    for name, value in table.items():
        kind = wanted[name]
        nested = isinstance(kind, dict)
        if isinstance(value, bool) or not isinstance(value, dict if nested else kind):
            want = "a table" if nested else getattr(kind, "__name__", kind)
            raise ValueError(f"{name} is {repr(value)[:60]}{where}; want {want}")
        if nested:
            _check_fields(f" in {name}", value, kind)


def _check_preprocessing(about: dict[str, Any]) -> None:
    shape = about["input_shape"]
    if (
        not 2 <= len(shape) <= 5
        or any(type(n) is not int or n < 1 for n in shape)
        or math.prod(shape) > _MOST_VALUES
    ):
        raise ValueError(
            f"input_shape is {shorten(shape)}: want one to four sides and the channels,"
            f" not more than {_MOST_VALUES} values"
        )
    for name, choices in (
        ("input_dtype", ("uint8", "float32")),
        ("resize", config_lib.KEYS["data.resize"].choices),
        ("interpolation", config_lib.KEYS["data.interpolation"].choices),
    ):
        if about.get(name, choices[0]) not in choices:
            raise ValueError(
                f"{name} is {about[name][:40]!r}: want one of {', '.join(choices)}"
            )
    key, share = config_lib.KEYS["data.crop_fraction"], about.get("crop_fraction", 1.0)
    if not key.low <= share <= key.high:  # nor NaN
        raise ValueError(
            f"crop_fraction is {share}: want a number from {key.low:g} to {key.high:g}"
        )
    for name in ("mean", "std"):
        values = about[name]
        if (
            len(values) not in (1, shape[-1])
            or any(type(n) not in (int, float) for n in values)
            or not all(abs(n) < 1e30 for n in values)  # nor NaN
            or (name == "std" and not all(n > 1e-30 for n in values))
        ):
            more = " above 0" if name == "std" else ""
            raise ValueError(
                f"{name} is {shorten(values)}: want one number{more}, or one for each"
                f" of the {shape[-1]} channels"
            )


def _check_task(about: dict[str, Any]) -> None:
    task, classes = about["task"], about["classes"]
    outputs = about["architecture"]["num_outputs"]
    if not all(isinstance(name, str) for name in classes):
        raise ValueError(f"classes are {shorten(classes)}: want names")
    "".join(classes).encode()  # UnicodeEncodeError: half of a surrogate pair
    count, positive = len(classes), task["positive"]
    good = {
        "classification": positive is None and count == outputs > 1,
        "binary": positive is not None and 0 <= positive < count and outputs == 1,
        "regression": positive is None and count == 0,
        "style": positive is None and count == 0,
    }
    if not good.get(task["name"], False):
        raise ValueError(
            f"{count} classes and {outputs} outputs do not make up the task"
            f" {task['name'][:40]!r} with positive {positive}"
        )


def _probe(table: dict[str, Any]) -> Probe:
    shape, logits = table["shape"], table["logits"]
    good = len(shape) <= 8 and all(type(n) is int and 0 < n < 2**40 for n in shape)
    count = math.prod(shape) if good else 0
    step = math.ceil(count / _MOST_LOGITS) or 1
    if not good or len(logits) != math.ceil(count / step):
        raise ValueError(
            f"its probe has {len(logits)} logits for the shape {shorten(shape)}"
        )
    if any(type(v) not in (int, float) or not abs(v) < 3e38 for v in logits):
        raise ValueError("its probe holds logits that are no finite numbers")
    return Probe(tuple(shape), np.asarray(logits, np.float32))

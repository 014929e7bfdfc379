"""Turns other people's weights into a model file.

usage: python -m convnet.convert --from=torchvision|timm|keras|convnetjs
           --weights=FILE, FOLDER or hf://OWNER/NAME[@REVISION]
           --output=M.safetensors [--arch=vgg16] [--labels=FILE]
           [--storage=bfloat16] [--accounting]
           [--allow_missing] [--allow_unexpected] [--image_size=N]
           [--crop_fraction=X] [--interpolation=bilinear|bicubic]
           [--mean=R,G,B] [--std=R,G,B]

The result takes RGB pictures as they are stored. The preprocessing is that of the
public weights, or of timm's config.json; the flags change it for weights that were
trained otherwise. Where the original framework is installed, the logits of both are
compared, and a difference is an error.
"""

import dataclasses
import os
import shlex
import sys
from pathlib import Path
from typing import Any

from absl import flags

from convnet import cli, mesh
from convnet.errors import ConvnetError, UsageError

_SOURCES = ["torchvision", "timm", "keras", "convnetjs"]


def define(values: flags.FlagValues, argv: list[str]) -> None:
    """Defines the flags of this app."""
    flags.DEFINE_enum(
        "from", None, _SOURCES, "where the weights come from", flag_values=values
    )
    texts = {
        "weights": "a file (.safetensors, .pth, .weights.h5, .h5, .keras), a folder"
        " (timm's, or a ConvNetJS snapshot), or a model of the Hugging Face hub",
        "arch": "the architecture; by default what the file looks like",
        "output": "the model file that is written",
        "labels": "a text file with the name of a class in each line; by default those"
        " that the model brings, ImageNet's for 1,000 outputs, CIFAR-10's for ten of"
        " a ConvNetJS network, else 'class 0' and so on",
    }
    for name, text in texts.items():
        flags.DEFINE_string(name, None, text, flag_values=values)
    flags.DEFINE_enum(
        "storage",
        "float32",
        ["float32", "bfloat16"],
        "how kernels are stored; bfloat16 halves the file and rounds them",
        flag_values=values,
    )
    switches = {
        "accounting": "print, for each variable, the tensor that it comes from",
        "allow_missing": "variables that the file lacks get random initial values",
        "allow_unexpected": "tensors of the file may be left over",
    }
    for name, text in switches.items():
        flags.DEFINE_bool(name, False, text, flag_values=values)
    flags.DEFINE_integer(
        "image_size",
        None,
        "side of the inputs in pixels",
        lower_bound=1,
        upper_bound=4096,
        flag_values=values,
    )
    flags.DEFINE_float(
        "crop_fraction",
        None,
        "share of the resized picture's side that is cut out (data.crop_fraction)",
        lower_bound=0.1,
        upper_bound=1.0,
        flag_values=values,
    )
    flags.DEFINE_enum(
        "interpolation",
        None,
        ["bilinear", "bicubic"],
        "how pictures are resized (data.interpolation)",
        flag_values=values,
    )
    for name in ("mean", "std"):
        flags.DEFINE_list(
            name,
            None,
            f"{name} of the inputs, from 0 to 1, one number or one a channel",
            flag_values=values,
        )


def main(values: flags.FlagValues) -> None:
    """Reads the weights, writes the model file, and says what is in it.

    Raises:
      UsageError: a flag is missing, or names what is not there.
      ConvnetError: the weights are malformed or do not fit, the original framework's
        logits are others, or the file cannot be written.
    """
    for name in ("from", "weights", "output"):
        if not values[name].value:
            raise UsageError(f"--{name} is missing (--help shows the usage)")
    output = Path(values.output).expanduser()
    if not output.parent.is_dir() or output.is_dir():
        raise UsageError(f"--output={output}: want a file in a folder that is there")
    labels = _labels(Path(values.labels).expanduser()) if values.labels else ()
    changed = _changed(values)
    # Keras, for the comparison, would otherwise take TensorFlow where it is installed.
    os.environ["KERAS_BACKEND"] = "jax"
    mesh.start("auto")
    # After `start`, because these bring JAX up.
    from convnet import bundle as bundle_lib
    from convnet.models import summary
    from convnet.weights import importing

    found = importing.load(
        values.weights,
        values["from"].value,
        values.arch or "",
        labels,
        allow_missing=values.allow_missing,
        allow_unexpected=values.allow_unexpected,
    )
    _account(found.rows, values.accounting)
    compared = _compared(found)
    bundle = dataclasses.replace(
        found.bundle,
        preprocessing=_resized(found.bundle, values.image_size) | changed,
        provenance={
            **found.bundle.provenance,
            "command": shlex.join(["python", "-m", "convnet.convert", *sys.argv[1:]]),
            "compared": compared,
        },
    )
    bundle_lib.save(output, bundle, values.storage)
    written = bundle_lib.load(output)
    about = written.preprocessing
    print(summary.summarize(written.model(), (1, *about["input_shape"])))
    print(f"labels ({values.labels or found.named_by}): {_shown(written.classes)}")
    _describe(about)
    logits = written.probe()
    print(f"probe: {logits.size} logits from {logits.min():.6g} to {logits.max():.6g}")
    print(f"wrote {output} ({output.stat().st_size:,} bytes, {values.storage})")


def _labels(path: Path) -> tuple[str, ...]:
    try:
        lines = path.read_text("utf-8").splitlines()
    except FileNotFoundError as error:
        raise UsageError(f"--labels={path}: no such file") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"--labels={path} is no text in UTF-8") from error
    names = tuple(line.strip() for line in lines)
    if not names or not all(names):
        raise UsageError(f"--labels={path}: want the name of a class in each line")
    return names


def _changed(values: flags.FlagValues) -> dict[str, Any]:
    """What the flags say of the preprocessing."""
    changed: dict[str, Any] = {}
    for name in ("crop_fraction", "interpolation"):
        if values[name].value is not None:
            changed[name] = values[name].value
    for name in ("mean", "std"):
        if values[name].value is not None:
            try:
                changed[name] = tuple(float(number) for number in values[name].value)
            except ValueError as error:
                text = ",".join(values[name].value)
                raise UsageError(f"--{name}={text}: want numbers") from error
    return changed


def _resized(bundle: Any, size: int | None) -> dict[str, Any]:
    """The preprocessing of a bundle, for inputs of another size."""
    about = bundle.preprocessing
    if size is None:
        return about
    side, _, channels = about["input_shape"]
    if size != side and bundle.architecture["options"].get("gather") == "flatten":
        raise UsageError(
            f"--image_size={size}: the first dense layer is for inputs of {side}"
        )
    return about | {"input_shape": (size, size, channels)}


def _account(rows: tuple[Any, ...], every: bool) -> None:
    """Says what became of each tensor: in a line, or in one for each variable."""
    if not rows:
        return
    if every:
        width = max(len(row.ours) for row in rows)
        for row in rows:
            print(f"{row.ours:<{width}}  {row.theirs or '(initial)'}  {row.shape}")
    fresh = [row.ours for row in rows if not row.theirs]
    print(f"{len(rows) - len(fresh)} of {len(rows)} variables are from the file")
    if fresh:
        more = f" and {len(fresh) - 6} more" if len(fresh) > 6 else ""
        print(f"initial values: {', '.join(fresh[:6])}{more}")


def _compared(found: Any) -> dict[str, Any]:
    from convnet.weights import comparing

    if any(not row.theirs for row in found.rows):
        compared = {"with": None, "why": "not all variables are from the file"}
    elif not found.rows:
        compared = {"with": None, "why": "ConvNetJS runs in browsers"}
    else:
        compared = comparing.compare(found.bundle, found.path)
    if compared["with"] is None:
        print(f"not compared with the original framework: {compared['why']}")
        return compared
    print(
        f"compared with {compared['with']}: the logits differ by"
        f" {compared['relative']:.2g} of the largest"
    )
    if not compared["relative"] <= comparing.TOLERANCE:
        raise ConvnetError(
            f"{found.path}: the logits are not those of {compared['with']}: they differ"
            f" by {compared['relative']:.2g} of the largest, {comparing.TOLERANCE:g} is"
            " allowed; no model file is written"
        )
    return compared


def _shown(names: tuple[str, ...]) -> str:
    if len(names) <= 20:
        return ", ".join(names)
    return f"{', '.join(names[:5])} ... {names[-1]}, {len(names)} in all"


def _describe(about: dict[str, Any]) -> None:
    from convnet.data.resize import Resize

    resize = Resize.of(about)
    print(f"inputs: {about['input_dtype']} {about['input_shape']}, value / 255 - mean,")
    print(f"        divided by std; mean {about['mean']}, std {about['std']}")
    side = about["input_shape"][0]
    print(
        f"pictures: {resize.rule} to {resize.whole(side)}, the central {side} pixels,"
        f" {resize.interpolation}"
    )


if __name__ == "__main__":
    cli.run(main, define, __doc__)

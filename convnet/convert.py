"""Turns other people's weights into a model file.

usage: python -m convnet.convert --from=convnetjs --weights=FOLDER
           --output=M.safetensors [--labels=FILE] [--storage=bfloat16]
"""

from pathlib import Path

from absl import flags

from convnet import cli, mesh
from convnet.errors import UsageError


def define(values: flags.FlagValues, argv: list[str]) -> None:
    """Defines the flags of this app."""
    flags.DEFINE_enum(
        "from", None, ["convnetjs"], "where the weights come from", flag_values=values
    )
    flags.DEFINE_string(
        "weights", None, "the folder of the snapshot's text files", flag_values=values
    )
    flags.DEFINE_string(
        "output", None, "the model file that is written", flag_values=values
    )
    flags.DEFINE_string(
        "labels",
        None,
        "a text file with the name of a class in each line; by default CIFAR-10's"
        " names for ten outputs and inputs of 32x32x3, else 'class 0' and so on",
        flag_values=values,
    )
    flags.DEFINE_enum(
        "storage",
        "float32",
        ["float32", "bfloat16"],
        "how kernels are stored; bfloat16 halves the file and rounds them",
        flag_values=values,
    )


def main(values: flags.FlagValues) -> None:
    """Reads the weights, writes the model file, and says what is in it.

    Raises:
      UsageError: a flag is missing, or names what is not there.
      ConvnetError: the weights are malformed, or the file cannot be written.
    """
    for name in ("from", "weights", "output"):
        if not values[name].value:
            raise UsageError(f"--{name} is missing (--help shows the usage)")
    output = Path(values.output).expanduser()
    if not output.parent.is_dir() or output.is_dir():
        raise UsageError(f"--output={output}: want a file in a folder that is there")
    labels = _labels(Path(values.labels).expanduser()) if values.labels else ()
    mesh.start("auto")
    # After `start`, because these bring JAX up.
    from convnet import bundle as bundle_lib
    from convnet.models import summary
    from convnet.weights import convnetjs

    bundle = convnetjs.load(Path(values.weights).expanduser(), labels)
    bundle_lib.save(output, bundle, values.storage)
    written = bundle_lib.load(output)
    about = written.preprocessing
    print(summary.summarize(written.model(), (1, *about["input_shape"])))
    origin = values.labels or ("not given; so named by default")
    print(f"labels ({origin}): {', '.join(written.classes)}")
    print(f"inputs: {about['input_dtype']} {about['input_shape']}, value / 255 - mean,")
    print(f"        divided by std; mean {about['mean']}, std {about['std']}")
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


if __name__ == "__main__":
    cli.run(main, define, __doc__)

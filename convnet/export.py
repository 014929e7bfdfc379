"""Writes a model that runs without convnet: as StableHLO, or as ONNX.

usage: python -m convnet.export --model=M --format=stablehlo|onnx --output=FILE

Inputs as they are stored go in (uint8 images, a batch of any size), probabilities come
out; weights, normalisation and the model's own test-time views are inside, labels and
preprocessing beside. What was written is loaded again by a fresh process without
convnet, and its answers compared with the model's own, before FILE is there.

StableHLO runs on CPU, CUDA and TPU. FILE is a zip archive; all that it takes is JAX:

    import json, zipfile
    from jax import export, jit  # pip install jax flatbuffers
    file = zipfile.ZipFile("FILE")
    about = json.loads(file.read("about.json"))  # classes, preprocessing, ...
    model = export.deserialize(bytearray(file.read("function")))
    probabilities = jit(model.call)(images)

ONNX runs in ONNX Runtime, and in all else that reads opset 21:

    import json, onnxruntime  # pip install onnxruntime
    session = onnxruntime.InferenceSession("FILE")
    about = session.get_modelmeta().custom_metadata_map
    classes = json.loads(about["classes"])
    probabilities = session.run(None, {"inputs": images})[0]
"""

import contextlib
import io
import json
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from convnet import cli, files, mesh
from convnet.errors import UsageError

if TYPE_CHECKING:
    from convnet.bundle import Bundle

FORMATS = ("stablehlo", "onnx")
PLATFORMS = ("cpu", "cuda", "tpu")
# So that the same model gives the same bytes: the earliest date that a zip can hold.
_DATE = (1980, 1, 1, 0, 0, 0)


def define(values: flags.FlagValues, argv: list[str]) -> None:
    """Defines the flags of this app."""
    flags.DEFINE_string(
        "model",
        None,
        "a model file, a workdir, or the name of a model that ships",
        flag_values=values,
    )
    flags.DEFINE_enum(
        "format",
        None,
        FORMATS,
        "what is written; onnx takes the packages of the extra 'onnx'",
        flag_values=values,
    )
    flags.DEFINE_string("output", None, "the file that is written", flag_values=values)


def main(values: flags.FlagValues) -> None:
    """Exports a model, checks what was written, and says how to use it.

    Raises:
      UsageError: a flag is missing, or names what is not there.
      ConvnetError: the model cannot be read or exported, a package is missing, or the
        exported model predicts something else.
    """
    for name in ("model", "format", "output"):
        if not values[name].value:
            raise UsageError(f"--{name} is missing (--help shows the usage)")
    output = Path(values.output).expanduser()
    if not output.parent.is_dir() or output.is_dir():
        raise UsageError(f"--output={output}: want a file in a folder that is there")
    mesh.start("auto")
    # After `start`, because this brings JAX up.
    from convnet import bundle as bundle_lib
    from convnet import export_check

    bundle = bundle_lib.load(Path(values.model).expanduser())
    difference, tried = write(bundle, values.format, output)
    about = describe(bundle)
    print(f"wrote {output} ({output.stat().st_size:,} bytes)")
    for side in ("input", "output"):
        dtype, shape = about[side]["dtype"], ", ".join(map(str, about[side]["shape"]))
        print(f"{side}: {dtype} ({shape}), {about[side]['meaning']}")
    print(
        f"loaded again without convnet, with {tried} in batches of 1 and the rest:\n"
        f"largest difference {difference:.2g} ({export_check.TOLERANCE:g} is allowed)"
    )
    print(f"to use it:\n{_usage(values.format, output)}")


def write(bundle: "Bundle", kind: str, output: Path) -> tuple[float, str]:
    """Exports a model; the file is there only if it predicts what the model does.

    Args:
      bundle: the model.
      kind: of `FORMATS`.
      output: the file; one that is there is replaced.

    Returns:
      What `export_check.check` returns.

    Raises:
      ConvnetError: it cannot be exported or written, or predicts something else.
    """
    from convnet import export_check

    if kind == "onnx":
        from convnet import export_onnx

        content = export_onnx.convert(bundle, describe(bundle))
    else:
        content = stablehlo(bundle)
    # Beside its place, under a name that a fresh process can load.
    beside = output.with_name(f".{output.name}.{os.getpid()}.exported")
    try:
        files.write(beside, content)
        del content
        difference, tried = export_check.check(bundle, kind, beside, describe(bundle))
        os.replace(beside, output)
    finally:
        beside.unlink(missing_ok=True)
    return difference, tried


def describe(bundle: "Bundle") -> dict[str, Any]:
    """Returns what travels beside the weights, as plain values.

    `input` and `output` have a dtype, a shape that begins with the batch "b", and a
    meaning; all else is as in the model file.
    """
    import jax

    about = bundle.preprocessing
    one = jax.ShapeDtypeStruct((1, *about["input_shape"]), about["input_dtype"])
    found = jax.eval_shape(bundle.predict, bundle.variables, one)
    meaning = "what is predicted"
    if bundle.task["name"] == "classification":
        meaning = "the probability of each class"
    elif bundle.task["name"] == "binary":
        meaning = f"the probability of {bundle.classes[bundle.task['positive']]!r}"

    def side(value: jax.ShapeDtypeStruct, meaning: str) -> dict[str, Any]:
        shape = ["b", *value.shape[1:]]
        return {"dtype": str(value.dtype), "shape": shape, "meaning": meaning}

    plain = {
        "input": side(one, "as stored: normalisation is inside"),
        "output": side(found, meaning),
        "classes": bundle.classes,
        "task": bundle.task,
        "preprocessing": about,
        "views": bundle.views,
        "architecture": bundle.architecture,
        "provenance": bundle.provenance,
    }
    return json.loads(json.dumps(plain))


def stablehlo(bundle: "Bundle") -> bytes:
    """Returns a zip of about.json and `function`, which `jax.export` deserializes.

    The function takes the inputs alone, a batch of any size, in the highest precision
    on every platform: what the check found holds on all of them.
    """
    import jax
    from jax import export

    from convnet.models import lowering

    about = bundle.preprocessing
    scope = export.SymbolicScope()
    sides = ", ".join(map(str, about["input_shape"]))
    shape = export.symbolic_shape(f"b, {sides}", scope=scope)
    # A new function: one that was traced before would not be plain.
    predict = jax.jit(lambda inputs: bundle.predict(bundle.variables, inputs))
    wanted = jax.ShapeDtypeStruct(shape, about["input_dtype"])
    with jax.default_matmul_precision("highest"), lowering.plain(), _no_folders():
        exported = export.export(predict, platforms=PLATFORMS)(wanted)
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as file:
        text = json.dumps(describe(bundle), indent=2)
        file.writestr(zipfile.ZipInfo("about.json", _DATE), text)
        file.writestr(zipfile.ZipInfo("function", _DATE), exported.serialize())
    return content.getvalue()


@contextlib.contextmanager
def _no_folders() -> Iterator[None]:
    """Keeps the paths of this machine's source files out of what JAX writes."""
    import jax

    name = "jax_hlo_source_file_canonicalization_regex"
    before = getattr(jax.config, name)
    jax.config.update(name, r".*[\\/]")
    try:
        yield
    finally:
        jax.config.update(name, before)


def _usage(kind: str, output: Path) -> str:
    """The lines of this module's docstring that load a file of this kind."""
    blocks = [part for part in (__doc__ or "").split("\n\n") if part.startswith("    ")]
    return blocks[FORMATS.index(kind)].replace("FILE", output.name)


if __name__ == "__main__":
    cli.run(main, define, __doc__)

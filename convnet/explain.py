"""Explains a model and its answers: one page, and every drawing as a PNG file.

usage: python -m convnet.explain --model=M INPUT... --output=DIR [--class=cat]
           [--methods=grad_cam,occlusion] [--layer=TAP]
           [--train=FOLDER or --config=experiments/X.py]

INPUT is what `convnet.predict` takes: pictures, folders, patterns, .npy and .npz files
for models of series or maps. For each the page shows what in it decided (Grad-CAM,
Grad-CAM++, occlusion, integrated gradients, SmoothGrad, guided back-propagation), its
way through the network, and with --train or --config the training examples that are
most alike; of the model its first filters, receptive fields, and the inputs that its
units answer to most.

DIR is made anew: explain.html, which needs no other file, explain.json and the PNGs. A
DIR that an earlier run made is replaced.

Exit status: 0 done; 1 failed; 2 usage; 3 done, but some inputs could not be read; 130
or 143 interrupted.
"""

import difflib
import itertools
import json
import os
import shlex
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from convnet import cli, decoders, files, inputs, mesh
from convnet.data.decode import DecodeError
from convnet.data.resize import Resize
from convnet.errors import ConvnetError, UsageError
from convnet.explaining import texts
from convnet.input_arrays import Wanted
from convnet.predict_output import shown

LIMIT = 24  # inputs on a page
_PAGE, _DATA = "explain.html", "explain.json"
_BATCH = 250  # training examples


def define(values: flags.FlagValues, argv: list[str]) -> None:
    """Defines the flags of this app."""
    strings = {
        "model": "a model file, a workdir, or the name of a model that ships",
        "output": "the folder that is made",
        "class": "the class to explain; by default the most probable one",
        "at": "the output to explain of a model that puts out numbers or maps, such as"
        " 12,20; by default the largest",
        "layer": "the feature map that class activation maps and units come from, by"
        " its path or the end of it; by default the last activation",
        "train": "folder, with folders in it, of training examples to find the nearest"
        " ones in",
    }
    for name, text in strings.items():
        flags.DEFINE_string(name, None, text, flag_values=values)
    flags.DEFINE_list(
        "methods",
        list(texts.METHODS),
        "what to show; nearest needs --train or --config",
        flag_values=values,
    )
    cli.define_config(values, argv)


def main(values: flags.FlagValues, arguments: list[str]) -> int:
    """Explains what the arguments name; returns the exit status, 0 or 3.

    Raises:
      UsageError: a flag, a path, a class or a layer is wrong.
      ConvnetError: the model, the training data or the output cannot be used.
    """
    for name in ("model", "output"):
        if not values[name].value:
            raise UsageError(f"--{name} is missing (--help shows the usage)")
    check_methods(values.methods)
    paths = inputs.expand(arguments)
    output = Path(os.path.abspath(os.path.expanduser(values.output)))
    _check_output(output)
    if values.train and values.config:
        raise UsageError("--train and --config both name training examples: take one")
    train = inputs.expand([values.train]) if values.train else None
    mesh.start("auto")
    # XLA cannot store programs that call oneDNN; they are compiled each time.
    warnings.filterwarnings("ignore", "Error writing persistent compilation")
    # After `start`, because these bring JAX up.
    from convnet import bundle as bundle_lib
    from convnet.explaining import contents, layers
    from convnet.explaining.album import Album
    from convnet.explaining.answers import Answers
    from convnet.explaining.network import Network

    bundle = bundle_lib.load_answering(values.model)
    network = Network(bundle)
    answers = Answers(bundle, network.outputs)
    index = _index(values["class"].value, values.at, answers)
    maps = layers.maps(network.shapes, network.rank)
    if not maps:
        raise ConvnetError(f"--model={values.model}: the network has no feature map")
    layer = layers.choose(values.layer, maps) if values.layer else layers.last(maps)
    about = bundle.preprocessing
    wanted = Wanted(network.shape, about["input_dtype"], Resize.of(about))
    collection = _collection(values, train, wanted, bundle)
    names, stored, errors = read(paths, wanted)
    names, stored = answered(network, names, stored, errors)
    for path, reason in errors:
        print(f"cannot read {shown(path)}: {shown(reason)}", file=sys.stderr)

    def fill(folder: Path) -> None:
        maker = contents.Contents(
            network, answers, Album(folder), values.methods, layer
        )
        found = maker.make(names, stored, index, collection)
        from convnet.explaining import page

        model = Path(os.path.abspath(os.path.expanduser(values.model))).name
        found |= {
            "title": f"What {model} sees",
            "summary": f"{_count(len(names), 'input')}, {bundle.architecture['name']}"
            f" network, {len(maps)} feature maps from"
            f" {'×'.join(map(str, network.shapes[maps[0]][:-1]))} to"
            f" {'×'.join(map(str, network.shapes[maps[-1]][:-1]))} places.",
            "errors": errors,
            "about": _about(bundle, layer, found),
            "command": shlex.join(["python", "-m", "convnet.explain", *sys.argv[1:]]),
        }
        files.write(folder / _PAGE, page.render(found))
        files.write(folder / _DATA, _json(values.model, layer, found))

    write_folder(output, fill)
    print(f"page: {output / _PAGE}")
    return 3 if errors else 0


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def check_methods(wanted: Sequence[str]) -> None:
    """Raises UsageError for a method that there is not; names the nearest."""
    for name in wanted:
        if name not in texts.METHODS:
            near = difflib.get_close_matches(name, texts.METHODS, 3, 0.4)
            raise UsageError(
                f"--methods={name}: no such method; the nearest are"
                f" {', '.join(near or texts.METHODS)}"
            )


def _index(name: str | None, at: str | None, answers: Any) -> tuple[int, ...] | None:
    if name is not None:
        return answers.named(name)
    return answers.placed(at) if at is not None else None


def read(
    paths: list[str], wanted: Wanted
) -> tuple[list[str], np.ndarray, list[tuple[str, str]]]:
    """Returns names and inputs (n, *shape) as stored, and (path, reason) of the rest.

    Raises:
      UsageError: there are more than a page can hold, or none at all.
    """
    found = list(itertools.islice(inputs.records(paths, wanted), LIMIT + 1))
    if not found:
        raise UsageError(f"{', '.join(paths)}: no input in there")
    if len(found) > LIMIT:
        raise UsageError(f"more than {LIMIT} inputs: a page takes no more; name fewer")
    names, rows, errors = [], [], []
    for record in found:
        try:
            if record.error:
                raise DecodeError(record.path, record.error)
            pixels = record.pixels
            rows.append(
                decoders.pixels(record.path, wanted) if pixels is None else pixels
            )
            names.append(record.path)
        except DecodeError as error:
            errors.append((record.path, error.reason))
    stored = np.zeros((len(rows), *wanted.shape), wanted.dtype)
    for place, row in enumerate(rows):
        stored[place] = row
    return names, stored, errors


def answered(
    network: Any, names: list[str], stored: np.ndarray, errors: list[tuple[str, str]]
) -> tuple[list[str], np.ndarray]:
    """Leaves out what the network has no finite answer to, and adds it to `errors`."""
    if not names:
        return names, stored
    logits = network.logits(network.normalize(stored)).reshape(len(names), -1)
    good = np.isfinite(logits).all(1)
    for name in itertools.compress(names, ~good):
        errors.append((name, "the network's answer is not a number"))
    return list(itertools.compress(names, good)), stored[good]


def _collection(
    values: flags.FlagValues, train: list[str] | None, wanted: Wanted, bundle: Any
) -> Any:
    """The training examples of --train or --config; None without."""
    from convnet.explaining import training

    if train is not None:
        if values.train.endswith(".py"):
            raise UsageError(
                f"--train={values.train}: wants a folder; an experiment's data are"
                f" named by --config={values.train}"
            )
        return training.files(train, wanted)
    if values.config is not None:
        return training.experiment(values.config, wanted, bundle, _BATCH)
    return None


def _about(bundle: Any, layer: str, found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    about = bundle.preprocessing
    shape = "×".join(map(str, about["input_shape"]))
    yield "Network", bundle.architecture["name"]
    yield "Input", f"{about['input_dtype']}, {shape}"
    yield "Layer of the class activation maps and units", layer
    if any("steps" in one for one in found["examples"]):
        yield (
            "Integrated gradients",
            f"from the mean of the training data, in"
            f" {max(one['steps'] for one in found['examples'])} steps at most",
        )


def _json(model: str, layer: str, found: dict[str, Any]) -> str:
    rows: list[dict[str, Any]] = []
    for one in found["examples"]:
        row = {"path": one["name"], "folder": one["folder"], "explained": one["label"]}
        row |= {"top": one["top"]} if one["top"] else {"prediction": one["value"]}
        if "steps" in one:
            row["integrated_gradients"] = {
                "steps": one["steps"],
                "completeness_error": one["completeness_error"],
            }
        rows.append(row)
    rows += [{"path": path, "error": reason} for path, reason in found["errors"]]
    fields = found["fields"]["rows"] if found["fields"] else []
    about = {
        "model": model,
        "layer": layer,
        "inputs": rows,
        "receptive_fields": {row["tap"]: row["size"] for row in fields},
        "seconds": found["seconds"],
    }
    return json.dumps(about, indent=2) + "\n"


def _check_output(output: Path) -> None:
    """Raises UsageError if the folder cannot be made, or holds other things."""
    flag = f"--output={output}"
    if not output.parent.is_dir():
        raise UsageError(f"{flag}: no folder {output.parent}")
    if output.exists() and not output.is_dir():
        raise UsageError(f"{flag}: a file; want a folder")
    if output.is_dir() and any(output.iterdir()) and not (output / _PAGE).is_file():
        raise UsageError(f"{flag}: holds other things; want a new folder")


def write_folder(output: Path, fill: Callable[[Path], None]) -> None:
    """Makes a folder that is whole or not there: `fill` fills one beside its place.

    Raises:
      ConvnetError: it cannot be written; what was there before still is.
    """
    try:
        with tempfile.TemporaryDirectory(
            dir=output.parent, prefix=f".{output.name}.", ignore_cleanup_errors=True
        ) as beside:
            new, old = Path(beside, "new"), Path(beside, "old")
            new.mkdir()
            fill(new)
            if output.exists():
                os.rename(output, old)
            try:
                os.rename(new, output)
            except OSError:
                if old.exists():
                    os.rename(old, output)
                raise
    except OSError as error:
        raise ConvnetError(
            f"--output={output} cannot be written: {error.strerror or error}"
        ) from error


if __name__ == "__main__":
    cli.run(main, define, __doc__, takes_arguments=True)

"""Predicts pictures: files, folders, patterns, lists, arrays.

usage: python -m convnet.predict --model=M PATH... [--find=cat] [--threshold=0.5]
           [--top=3] [--tta | --notta] [--dtype=bfloat16] [--output=FILE.jsonl or .csv]
           [--report=FILE.html]

PATH is a picture, whatever its name ends in; a folder, with all folders in it; a
pattern in quotes ("photos/**/*.png"); .npy or .npz with what the model takes (rows are
named FILE#INDEX); or - for a list on standard input, a path a line, or ended by nulls.
Of a folder, hidden files and notes beside the pictures (.txt, .json, ...) are left out.

Rows are written as they come, to --output, or as lines to standard output: the path, a
tab, "cat 0.97", a tab, the next class. With --find only what is at least as probable as
the threshold is written, at the end, the most probable first. Progress, what cannot be
read and a summary go to standard error. In CSV, a text that a spreadsheet would take
for a formula gets an apostrophe before it, and a path "./".

Exit status: 0 done; 1 failed; 2 usage; 3 done, but some inputs could not be read; 130
or 143 interrupted.
"""

import contextlib
import difflib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from absl import flags
from tqdm import tqdm

from convnet import cli, inputs, mesh, predict_output, predict_stream
from convnet.data.resize import Resize
from convnet.errors import UsageError
from convnet.gallery import Gallery
from convnet.input_arrays import Wanted
from convnet.inputs import Record
from convnet.predict_output import Found, Row, Writer, shown

_VIEWS = {None: None, True: "flip_translate", False: "none"}


def define(values: flags.FlagValues, argv: list[str]) -> None:
    """Defines the flags of this app."""
    flags.DEFINE_string(
        "model",
        None,
        "a model file, a workdir, or the name of a model that ships",
        flag_values=values,
    )
    flags.DEFINE_string("find", None, "the class to search for", flag_values=values)
    flags.DEFINE_float(
        "threshold",
        0.5,
        "least probability of what --find finds; where the report's slider starts",
        lower_bound=0.0,
        upper_bound=1.0,
        flag_values=values,
    )
    flags.DEFINE_integer(
        "top", 3, "classes named for a picture", lower_bound=1, flag_values=values
    )
    flags.DEFINE_bool(
        "tta",
        None,
        "average over six views of a picture, or (--notta) take one; by default as the"
        " model was evaluated. Each view takes its time",
        flag_values=values,
    )
    flags.DEFINE_enum(
        "dtype",
        "float32",
        ["float32", "bfloat16"],
        "what the network computes in",
        flag_values=values,
    )
    flags.DEFINE_string(
        "output", None, "file of the rows, .jsonl or .csv", flag_values=values
    )
    flags.DEFINE_string(
        "report", None, "HTML page of the pictures, to look at", flag_values=values
    )


def main(values: flags.FlagValues, arguments: list[str]) -> int:
    """Predicts what the arguments name; returns the exit status, 0 or 3.

    Raises:
      ConvnetError: the model or an output cannot be used.
    """
    if values.model is None:
        raise UsageError("--model is missing (--help shows the usage)")
    paths = inputs.expand(arguments)
    kind = predict_output.kind_of(values.output) if values.output else None
    if values.report:
        predict_output.check_folder("report", values.report)
    mesh.start("auto")
    # After `start`, because these bring JAX up.
    import jax

    from convnet import bundle as bundle_lib

    bundle = bundle_lib.load_answering(values.model)
    labels = class_names(bundle.classes, bundle.task["positive"])
    searched = find_class(values.find, labels) if values.find is not None else None
    about = bundle.preprocessing
    wanted = Wanted(tuple(about["input_shape"]), about["input_dtype"], Resize.of(about))
    gallery = _gallery(values, labels, wanted.resize) if values.report else None
    places = min(values.top, len(labels)) if searched is None else 1
    times = predict_stream.Times()
    answers = predict_stream.predict(
        inputs.records(paths, wanted),
        wanted,
        bundle.predict_fn(values.dtype, _VIEWS[values.tta]),
        jax.default_backend(),
        times,
    )
    progress = _Progress(values.output is not None or searched is not None)
    try:
        with (
            contextlib.closing(answers),
            progress,
            Writer(values.output, kind, places) as writer,
        ):
            found = Found(writer, values.threshold) if searched is not None else None
            for records, outputs in answers:
                rows = to_rows(records, outputs, labels, places, searched)
                progress.advance(rows)
                (found or writer).write(rows)
                if gallery:
                    _add(gallery, records, rows, labels)
            count = found.finish() if found else None
    except BrokenPipeError:
        # The reader of the lines (`head`) has all that it wanted; nor is there anybody
        # for what Python still holds.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    if gallery:
        gallery.write(values.report)
    print(_summary(progress, count, times), file=sys.stderr)
    return 3 if progress.failed else 0


def _gallery(
    values: flags.FlagValues, labels: Sequence[str], resize: Resize
) -> Gallery:
    if not labels:
        raise UsageError(
            "--report: the model puts out numbers, and a page shows classes"
        )
    model = Path(os.path.abspath(os.path.expanduser(values.model))).name
    title, threshold = f"Predictions of {model}", 0.0
    if values.find is not None:
        title = f"{values.find}, found by {model}"
    if values.find is not None or values["threshold"].present:
        threshold = values.threshold
    return Gallery(title, labels, resize, threshold, values.find or "")


def _add(
    gallery: Gallery,
    records: Sequence[Record],
    rows: Sequence[Row],
    labels: Sequence[str],
) -> None:
    for record, row in zip(records, rows, strict=True):
        if "error" not in row:
            label = labels.index(row["label"])
            gallery.add(row["path"], label, row["probability"], record.pixels)


def class_names(classes: Sequence[str], positive: int | None) -> tuple[str, ...]:
    """Returns the names of `probabilities`' columns; () for a regression.

    A binary model knows its class and the other one, or all others together.
    """
    if positive is None:
        return tuple(classes)
    others = [name for index, name in enumerate(classes) if index != positive]
    negative = others[0] if len(others) == 1 else f"not {classes[positive]}"
    return (negative, classes[positive])


def find_class(name: str, labels: Sequence[str]) -> int:
    """Returns the index of a class.

    Raises:
      UsageError: there is none of this name; names the nearest.
    """
    if name in labels:
        return labels.index(name)
    if not labels:
        raise UsageError("--find: the model puts out numbers, it knows no classes")
    lower = {label.lower(): label for label in labels}
    near = difflib.get_close_matches(name.lower(), lower, 3, 0.5)
    near += [label for label in lower if name.lower() in label and label not in near]
    if near:
        hint = "the nearest are " + ", ".join(lower[label] for label in near[:5])
    else:
        hint = "it knows " + ", ".join(labels[:10]) + (", ..." * (len(labels) > 10))
    raise UsageError(f"--find={name}: the model knows no such class; {hint}")


def to_rows(
    records: Sequence[Record],
    outputs: np.ndarray,
    labels: Sequence[str],
    top: int,
    found: int | None,
) -> list[Row]:
    """Returns a row for each record.

    Args:
      records: n inputs.
      outputs: (n, k) probabilities; (n,) of the positive class; numbers (n, ...).
      labels: k names, of a binary model (negative, positive); () for numbers.
      top: how many classes a row names.
      found: the class whose probability a row gives, None for the most probable ones.
    """
    if labels and outputs.ndim == 1:
        outputs = np.stack([1 - outputs, outputs], 1)
    flat = outputs.reshape(len(outputs), -1)
    good = np.isfinite(flat).all(1)
    order = np.argsort(-flat, 1, kind="stable")[:, :top] if labels else None
    rows: list[Row] = []
    for index, record in enumerate(records):
        if record.error or not good[index]:
            error = record.error or "the network's answer is not a number"
            rows.append({"path": record.path, "error": error})
        elif order is None:
            numbers = flat[index, 0] if flat.shape[1] == 1 else outputs[index]
            rows.append({"path": record.path, "prediction": numbers.tolist()})
        elif found is not None:
            rows.append(_answer(record.path, labels[found], flat[index, found]))
        else:
            best = [[labels[i], _number(flat[index, i])] for i in order[index]]
            rows.append({**_answer(record.path, *best[0]), "top": best})
    return rows


def _answer(path: str, label: str, probability: float) -> Row:
    return {"path": path, "label": label, "probability": _number(probability)}


def _number(probability: float) -> float:
    return float(f"{probability:.6g}")  # what float32 holds


class _Progress:
    """Counts, names what cannot be read, and shows a bar on a terminal."""

    def __init__(self, quiet_output: bool) -> None:
        self.read = self.failed = 0
        self._bar = None
        # Lines that come to the same terminal show by themselves how far it is.
        if sys.stderr.isatty() and (quiet_output or not sys.stdout.isatty()):
            self._bar = tqdm(unit=" images", unit_scale=False, smoothing=0.1)

    def advance(self, rows: Sequence[Row]) -> None:
        """Counts rows, and lists errors."""
        failed = [row for row in rows if "error" in row]
        text = "".join(
            f"cannot read {shown(row['path'])}: {shown(row['error'])}\n"
            for row in failed
        )
        if text and self._bar is not None:
            self._bar.write(text, sys.stderr, end="")
        elif text:
            sys.stderr.write(text)
        self.failed += len(failed)
        self.read += len(rows) - len(failed)
        if self._bar is not None:
            self._bar.update(len(rows))

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()


def _summary(
    progress: _Progress, found: int | None, times: predict_stream.Times
) -> str:
    images = progress.read + progress.failed
    searched = "" if found is None else f"{found:,} found, "
    rate, alone = (
        f"{images / seconds:,.0f}" if seconds else "-"
        for seconds in (times.total, times.network)
    )
    return (
        f"{progress.read:,} read, {searched}{progress.failed:,} could not be read\n"
        f"{rate} images/s end to end, {alone} in the network alone"
        f" ({times.setup:.1f} s to compile, {times.total:.1f} s to predict)"
    )


if __name__ == "__main__":
    cli.run(main, define, __doc__, takes_arguments=True)

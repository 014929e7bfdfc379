"""Evaluation: every example of a split exactly once.

usage: python -m convnet.evaluate --model=M --config=experiments/X.py [--output=DIR]
"""

import dataclasses
import functools
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
from absl import flags

from convnet import cli, mesh, resolve
from convnet import metrics as metrics_lib
from convnet.data import pipeline
from convnet.data.order import EvalOrder, HostBatch
from convnet.data.source import Source
from convnet.errors import ConvnetError, UsageError
from convnet.report import Mistake
from convnet.task import Binary, Classification, Regression, Task

PredictStep = Callable[..., dict[str, jax.Array]]


@dataclasses.dataclass(frozen=True)
class _Picked:
    """`EvalOrder` over some of the examples."""

    index: np.ndarray
    batch_size: int

    def __len__(self) -> int:
        return len(EvalOrder(len(self.index), self.batch_size))

    def __call__(self, step: int) -> HostBatch:
        batch = EvalOrder(len(self.index), self.batch_size)(step)
        return {**batch, "index": self.index[batch["index"]]}


def predict_views(
    predict: PredictStep,
    variables: Any,
    split: pipeline.Split,
    config: ml_collections.ConfigDict,
) -> dict[str, np.ndarray]:
    """`predict_split` with the test-time augmentation that config.evaluate asks for."""
    batch_size, views = config.data.batch_size, config.evaluate.tta
    predicted = predict_split(predict, variables, split, batch_size)
    if views == "none":
        return predicted
    rows = np.arange(len(predicted["index"]))
    if config.evaluate.tta_below < 1:
        rows = rows[_confidence(predicted["prediction"]) <= config.evaluate.tta_below]
    if not len(rows):
        return predicted
    again = predict_split(
        functools.partial(predict, views=views),
        variables,
        split,
        batch_size,
        _Picked(predicted["index"][rows], batch_size),
    )
    for name, values in again.items():
        predicted[name][rows] = values
    return predicted


def _confidence(probabilities: np.ndarray) -> np.ndarray:
    """The probability of the most probable class; (n, k), or (n,) of one of two."""
    if probabilities.ndim == 1:
        return np.maximum(probabilities, 1 - probabilities)
    return probabilities.max(-1)


def predict_split(
    predict: PredictStep,
    variables: Any,
    split: pipeline.Split,
    batch_size: int,
    order: _Picked | None = None,
) -> dict[str, np.ndarray]:
    """Runs the predict step over a split, or the part of it that `order` picks.

    Returns:
      `index` (n,), `label` and `prediction` (n, ...), and the task's metrics (n,) of
      the n readable examples, in the order of the data.
    """
    order = order or EvalOrder(split.examples, batch_size)
    outputs: list[dict[str, jax.Array]] = []
    for batch in split.batches(order, 0, len(order)):
        outputs.append(predict(variables, split.data, batch))
        if len(outputs) > 8:  # Batches under way take memory.
            jax.block_until_ready(outputs[-8])
    host = jax.device_get(outputs)
    joined = {name: np.concatenate([o[name] for o in host]) for name in host[0]}
    keep = joined.pop("weight") > 0
    return {name: values[keep] for name, values in joined.items()}


def means(predicted: dict[str, np.ndarray]) -> dict[str, float]:
    """Returns the mean of each metric, summed in float64, and `examples`."""
    count = len(predicted["index"])
    return {
        name: float(values.sum(dtype=np.float64) / count)
        for name, values in predicted.items()
        if name not in ("index", "label", "prediction")
    } | {"examples": count}


def summary(predicted: dict[str, np.ndarray]) -> dict[str, float]:
    """Returns `means`, and of a classifier its expected calibration error."""
    found = means(predicted)
    if "accuracy" in predicted:
        confidence, correct = (
            _confidence(predicted["prediction"]),
            predicted["accuracy"],
        )
        error = metrics_lib.calibration(confidence, correct > 0)["ece"]
        found["calibration_error"] = error
    return found


def evaluation(
    task: Task, predicted: dict[str, np.ndarray], baseline: dict[str, float]
) -> metrics_lib.Evaluation:
    """Returns what the report shows: labels, predictions and losses by example."""
    labels = predicted["label"]
    if isinstance(task, Binary):
        labels = (labels == task.positive).astype(np.int32)
    kind = "probabilities" if "accuracy" in predicted else "predictions"
    return metrics_lib.Evaluation(
        ids=[str(index) for index in predicted["index"]],
        labels=labels,
        losses=predicted["loss"],
        baseline=baseline,
        **{kind: predicted["prediction"]},
    )


def baselines(task: Task, source: Source) -> dict[str, float]:
    """Returns the mean squared error of forecasts that need no learning.

    "persistence" where a label looks like the last step of its input: nothing changes.
    Otherwise, for regression, "mean": the mean of the labels.
    """
    if not isinstance(task, Regression):
        return {}
    records = [source[index] for index in range(len(source))]
    labels = np.stack([record["label"] for record in records])
    if records[0]["input"].shape[1:] == task.label_shape:
        forecast = np.stack([record["input"][-1] for record in records])
        return {"persistence": float(np.mean((forecast - labels) ** 2))}
    return {"mean": float(np.mean((labels - labels.mean(0)) ** 2))}


def mistakes(
    task: Task, predicted: dict[str, np.ndarray], source: Source, count: int = 24
) -> list[Mistake]:
    """Returns the examples that the model is most wrong about, the worst first.

    Of a style network, which is not wrong but good or bad, evenly chosen ones.
    """
    wrong = predicted["accuracy"] < 1 if "accuracy" in predicted else None
    order = np.argsort(-predicted["loss"], kind="stable")
    if wrong is not None:
        order = order[wrong[order]]
    if task.of_inputs:
        order = np.linspace(0, len(order) - 1, min(count, len(order))).astype(int)
    found = []
    for row in order[:count]:
        record = source[int(predicted["index"][row])]
        label, answer = predicted["label"][row], predicted["prediction"][row]
        probability = None
        if task.of_inputs:
            label = ""
        elif isinstance(task, Classification):
            probability, answer = float(answer.max()), int(answer.argmax())
        elif isinstance(task, Binary):
            label, chance = int(label == task.positive), float(answer)
            answer = int(chance > 0.5)
            probability = chance if answer else 1 - chance
        found.append(
            Mistake(record["id"], label, answer, probability, **_shown(record["input"]))
        )
    return found


def _shown(value: np.ndarray) -> dict[str, np.ndarray]:
    """An input as a report can draw it: an image, a series, or nothing."""
    if value.dtype == np.uint8 and value.ndim == 3 and value.shape[-1] in (1, 3):
        return {"image": value}
    return {"series": value} if value.ndim == 2 else {}


def define(values: flags.FlagValues, argv: list[str]) -> None:
    """Defines the flags of this app."""
    cli.define_config(values, argv)
    flags.DEFINE_string(
        "model",
        None,
        "a model file, a workdir, or the name of a model that ships",
        flag_values=values,
    )
    flags.DEFINE_string(
        "output", None, "folder for evaluation.json and report.html", flag_values=values
    )


def main(values: flags.FlagValues) -> None:
    """Evaluates a model on the test split of an experiment's data.

    The architecture, the input's size and its normalisation are the model's; the data
    are the experiment's.

    Raises:
      ConvnetError: the model or the data cannot be used.
    """
    if values.model is None or values.config is None:
        raise UsageError("--model and --config are needed (--help shows the usage)")
    config = resolve.check_type(values.config, "--config")
    mesh.start(config.compilation_cache, mesh.threads(config))
    # After `start`, because these bring JAX up.
    from convnet import bundle as bundle_lib
    from convnet import finish, prepare, report
    from convnet.workdir import Workdir

    bundle = bundle_lib.load(Path(values.model).expanduser())
    if bundle.task["name"] == "style" != config.task.name:
        raise UsageError(
            f"--model={values.model} is a style network; want the experiment that"
            " trained it, which knows its style, not one with task.name ="
            f" {config.task.name!r}"
        )
    bundle_lib.configure(config, bundle)
    if config.evaluate.tta == "auto":
        config.evaluate.tta = bundle.views
    it = prepare.prepare(config)
    wanted = bundle.preprocessing
    if (list(it.example_shape), str(it.example_dtype)) != (
        list(wanted["input_shape"]),
        wanted["input_dtype"],
    ):
        raise ConvnetError(
            f"the model takes {wanted['input_dtype']} {wanted['input_shape']}, the data"
            f" hold {it.example_dtype} {list(it.example_shape)} (see data.image_size)"
        )
    if it.dataset.classes != bundle.classes:
        raise ConvnetError(
            f"the model's classes are {bundle.classes}, those of the data"
            f" {it.dataset.classes}"
        )
    it.predicted = predict_views(it.predict, bundle.variables, it.split("test"), config)
    found = {f"test/{name}": value for name, value in summary(it.predicted).items()}
    for name, value in found.items():
        print(f"{name}: {value:.6g}")
    if values.output:
        workdir = Workdir(Path(values.output).expanduser())
        workdir.create()
        workdir.write_json("evaluation.json", {"model": values.model, **found})
        command = shlex.join(["python", "-m", "convnet.evaluate", *sys.argv[1:]])
        page = finish.page(it, workdir, found, command)
        report.write(workdir.path / "report.html", page)
        print(f"report: {workdir.path / 'report.html'}")


if __name__ == "__main__":
    cli.run(main, define, __doc__)

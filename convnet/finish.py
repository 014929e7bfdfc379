"""The end of a run: the last evaluation, result.json and report.html."""

import importlib.metadata
import os
import platform
from typing import Any

import jax

from convnet import bundle, evaluate, preview, processes, report, resolve
from convnet import checkpoint as checkpoint_lib
from convnet import config as config_lib
from convnet import mesh as mesh_lib
from convnet.prepare import Run
from convnet.task import Binary
from convnet.workdir import Workdir

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def finish(it: Run, workdir: Workdir, command: str) -> dict[str, Any]:
    """Evaluates the last state, writes the model file, the report, then result.json.

    result.json comes last: where it exists, the run is finished. All processes
    evaluate, and process 0 writes.

    Returns:
      The content of result.json.
    """
    # None: the run was killed between its last step and here.
    if it.predicted is None or it.config.evaluate.tta != "none":
        it.predicted = evaluate.predict_views(
            it.predict, it.state.variables(), it.split("test"), it.config
        )
    for split in it.splits.values():
        split.bad.share()
    result = _result(it, evaluate.summary(it.predicted))
    model = to_bundle(it, result, command)
    if processes.leads():
        bundle.save(workdir.path / "model.safetensors", model)
        contents = page(it, workdir, result, command)
        report.write(workdir.path / "report.html", contents)
        workdir.write_json("result.json", result)
    return processes.tell(result)


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that a result depends on."""
    found = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return {"python": platform.python_version(), **found}


def _result(it: Run, means: dict[str, float]) -> dict[str, Any]:
    config = it.config
    count = sum(x.size for x in jax.tree.leaves(it.state.params))
    images = it.total_steps * config.data.batch_size
    return {
        "step": it.total_steps,
        "epochs": images / it.train_order.examples,
        **{f"test/{name}": value for name, value in means.items()},
        "train/seconds": it.train_seconds,
        "compile/seconds": it.compile_seconds,
        "train/images_per_second": images / max(it.train_seconds, 1e-9),
        "params/count": int(count),
        "params/sha256": checkpoint_lib.result_sha256(it.state),
        "seed": config.seed,
        "devices": it.mesh.size,
        "device_kind": jax.devices()[0].device_kind,
        "processes": jax.process_count(),
        "versions": versions(),
        "config/sha256": config_lib.sha256(config),
    }


def to_bundle(it: Run, result: dict[str, Any], command: str) -> bundle.Bundle:
    """Returns what the model file of a run holds."""
    config, task = it.config, it.recipe.task
    origin = {
        "command": command,
        "data": config.data.name,
        "config": config_lib.result_keys(config),
    }
    return bundle.Bundle(
        architecture={
            "name": config.model.name,
            "num_outputs": task.num_outputs,
            "options": resolve.model_options(config),
        },
        task={"name": task.name, "positive": getattr(task, "positive", None)},
        classes=it.dataset.classes,
        preprocessing={
            "input_shape": it.example_shape,
            "input_dtype": str(it.example_dtype),
            "resize": config.data.resize,
            "crop_fraction": config.data.crop_fraction,
            "interpolation": config.data.interpolation,
            "mean": tuple(config.data.mean),
            "std": tuple(config.data.std),
        },
        provenance={**origin, "result": result},
        variables=mesh_lib.fetch(it.state.variables()),
        views=config.evaluate.tta,
    )


def page(
    it: Run, workdir: Workdir, result: dict[str, Any], command: str
) -> report.Report:
    """Returns what the report shows of a run, or of an evaluation without a run."""
    task, dataset = it.recipe.task, it.dataset
    classes = dataset.classes
    if isinstance(task, Binary):
        positive = classes[task.positive]
        others = [name for name in classes if name != positive]
        classes = (others[0] if len(others) == 1 else f"not {positive}", positive)
    baseline = evaluate.baselines(task, dataset.test)
    images, captions = preview.examples(it, 32)
    skipped = [bad for split in it.splits.values() for bad in split.bad.listed()]
    environment = {
        **versions(),
        "devices": mesh_lib.describe(it.mesh),
        "threads": os.environ.get("NPROC", ""),
    }
    return report.Report(
        title=workdir.path.name,
        task=task.name,
        classes=classes,
        config=config_lib.to_dict(it.config),
        changed=it.changed,
        environment=environment,
        command=command,
        result=result,
        history=workdir.history(),
        evaluation=evaluate.evaluation(task, it.predicted, baseline),
        skipped=skipped,
        augmented=images,
        augmented_labels=captions,
        summary=it.summary,
        mistakes=evaluate.mistakes(task, it.predicted, dataset.test),
    )

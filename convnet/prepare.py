"""From a config to all that a run needs: data, model, optimizer, state."""

import dataclasses
import functools
import time
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh

from convnet import config as config_lib
from convnet import mesh as mesh_lib
from convnet import models, optim, resolve
from convnet import step as step_lib
from convnet import task as task_lib
from convnet.data import measure, pipeline
from convnet.data import source as source_lib
from convnet.data.order import TrainOrder
from convnet.errors import UsageError
from convnet.models import summary as summary_lib
from convnet.step import Recipe, TrainState


@dataclasses.dataclass
class Run:
    """Everything that a run needs, made by `prepare`."""

    config: ml_collections.ConfigDict
    changed: dict[str, Any]
    mesh: Mesh
    dataset: source_lib.Dataset
    recipe: Recipe
    schedule: optim.Schedule
    total_steps: int
    state: TrainState | None
    train_order: TrainOrder
    summary: str
    example_shape: tuple[int, ...]
    example_dtype: np.dtype
    compile_seconds: float = 0.0
    train_seconds: float = 0.0
    predicted: dict[str, Any] | None = None
    splits: dict[str, pipeline.Split] = dataclasses.field(default_factory=dict)
    _predict: dict[str, Any] = dataclasses.field(default_factory=dict)

    def split(self, name: str) -> pipeline.Split:
        """Returns the split "train" or "test", opened when it is first needed."""
        if name not in self.splits:
            source = getattr(self.dataset, name)
            self.splits[name] = pipeline.create(source, self.config.data, self.mesh)
        return self.splits[name]

    def compile(self, function: Any, *args: Any, **options: Any) -> Any:
        """Compiles a pure step for its arguments, on the clock of compilation."""
        start = time.perf_counter()
        jitted = jax.jit(
            functools.partial(function, recipe=self.recipe),
            compiler_options=mesh_lib.compiler_options(jax.default_backend()),
            **options,
        )
        with warnings.catch_warnings():
            # XLA cannot store programs that call oneDNN; they are compiled each time.
            warnings.filterwarnings("ignore", "Error writing persistent compilation")
            compiled = jitted.lower(*args).compile()
        self.compile_seconds += time.perf_counter() - start
        return compiled

    def predict(
        self, variables: Any, data: Any, batch: Any, views: str = "none"
    ) -> dict[str, jax.Array]:
        """The compiled predict step."""
        if views not in self._predict:
            step = functools.partial(step_lib.predict_step, views=views)
            self._predict[views] = self.compile(step, variables, data, batch)
        return self._predict[views](variables, data, batch)


def prepare(config: ml_collections.ConfigDict) -> Run:
    """Opens the data, builds model, optimizer and state.

    Args:
      config: as `config.default()`; its open values (the model's own options, mean and
        std) are filled in.

    Raises:
      UsageError: a value is wrong, or values do not go together.
      ConvnetError: the data cannot be used.
    """
    resolve.validate(config)
    mesh = mesh_lib.make(config.data.batch_size)
    dataset = source_lib.load(config.data, config.seed)
    changed = config_lib.changed(config)
    resolve.resolve(config, functools.partial(measure.mean_and_std, dataset.train))
    example = pipeline.first(dataset.train)["input"][None]
    for name in ("mean", "std"):
        if len(config.data[name]) not in (1, example.shape[-1]):
            raise UsageError(
                f"data.{name} is {config.data[name]}: want one number, or one for each"
                f" of the {example.shape[-1]} channels"
            )
    task = task_lib.create(config, dataset)
    model = models.create(
        config.model.name,
        num_outputs=task.num_outputs,
        dtype=config.model.dtype,
        **resolve.model_options(config),
    )
    total_steps = resolve.total_steps(config, len(dataset.train))
    try:
        optimizer, schedule = optim.create(
            config.optimizer, config.schedule, total_steps
        )
        recipe = Recipe(
            model,
            task,
            optimizer,
            tuple(config.data.mean),
            tuple(config.data.std),
            config.augment,
            config.seed,
            config.optimizer.accumulate,
            config.optimizer.ema,
        )
        summary = summary_lib.summarize(model, example.shape)
        first = pipeline.first(dataset.train)
        _check_shapes(recipe, first, config.evaluate.tta)
    except ValueError as error:
        raise UsageError(f"{error} (an input is {example.shape[1:]})") from error
    order = TrainOrder(len(dataset.train), config.data.batch_size, config.seed)
    return Run(
        config=config,
        changed=changed,
        mesh=mesh,
        dataset=dataset,
        recipe=recipe,
        schedule=schedule,
        total_steps=total_steps,
        state=None,
        train_order=order,
        summary=summary,
        example_shape=example.shape[1:],
        example_dtype=example.dtype,
    )


def _check_shapes(recipe: Recipe, record: dict[str, Any], views: str) -> None:
    """Traces both steps, so that what does not fit together fails before a run."""
    batch = {
        name: jnp.zeros((2, *np.shape(value)), np.asarray(value).dtype)
        for name, value in (("input", record["input"]), ("label", record["label"]))
    }
    batch |= {"index": jnp.arange(2), "epoch": jnp.zeros(2, int), "weight": jnp.ones(2)}
    jax.eval_shape(functools.partial(step_lib.augmented, recipe=recipe), 0, {}, batch)

    def predict() -> dict[str, jax.Array]:
        state = step_lib.create_state(recipe, batch["input"])
        variables = state.variables()
        return step_lib.predict_step(variables, {}, batch, recipe=recipe, views=views)

    jax.eval_shape(predict)


def initial_state(it: Run) -> TrainState:
    """Initialises the state on the mesh, under jit."""
    count = min(step_lib.init_examples(it.recipe), len(it.dataset.train))
    records = measure.spread(it.dataset.train, count)
    inputs = jnp.asarray(np.stack([record["input"] for record in records]))
    create = functools.partial(step_lib.create_state, it.recipe)
    start = time.perf_counter()
    # Run once: compiling the random draws well would take ten times as long.
    options = {"xla_backend_optimization_level": 0}
    state = jax.jit(
        create,
        out_shardings=mesh_lib.replicated(it.mesh),
        compiler_options=options if jax.default_backend() == "cpu" else None,
    )(inputs)
    jax.block_until_ready(state)
    it.compile_seconds += time.perf_counter() - start
    return state

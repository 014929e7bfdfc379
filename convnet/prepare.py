"""From a config to all that a run needs: data, model, optimizer, state."""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh

from convnet import config as config_lib
from convnet import features, models, optim, resolve, transfer
from convnet import mesh as mesh_lib
from convnet import step as step_lib
from convnet import task as task_lib
from convnet.data import measure, pipeline
from convnet.data import source as source_lib
from convnet.data.order import TrainOrder
from convnet.errors import UsageError
from convnet.freezing import Frozen, staged
from convnet.models import summary as summary_lib
from convnet.step import Recipe, TrainState


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled step, called with its arguments alone: those of its task are held."""

    compiled: jax.stages.Compiled
    held: Any

    def __call__(self, *args: Any) -> Any:
        return self.compiled(*args, held=self.held)


@dataclasses.dataclass
class Run:
    """Everything that a run needs, made by `prepare`.

    `later` has the recipes that replace `recipe`, by their first step, ascending. With
    `cached` the splits hold features in place of inputs (`convnet.features`).
    """

    config: ml_collections.ConfigDict
    changed: dict[str, Any]
    mesh: Mesh
    dataset: source_lib.Dataset
    recipe: Recipe
    later: dict[int, Recipe]
    cached: bool
    plan: transfer.Plan
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
            split = pipeline.create(source, self.config.data, self.mesh)
            # Of views of a test image there are no features.
            if self.cached and (name == "train" or self.config.evaluate.tta == "none"):
                split = features.compute(self, split, name)
            self.splits[name] = split
        return self.splits[name]

    def recipe_of(self, step: int) -> Recipe:
        """Returns the recipe of the step with this index."""
        begun = [recipe for start, recipe in self.later.items() if step >= start]
        return begun[-1] if begun else self.recipe

    def out_shardings(self) -> tuple[Any, Any]:
        """Returns where a train step puts the next state, and its metrics."""
        return mesh_lib.sharded(self.mesh, self.state), mesh_lib.replicated(self.mesh)

    def compile(
        self, function: Any, *args: Any, recipe: Recipe | None = None, **options: Any
    ) -> Program:
        """Compiles a pure step for its arguments, on the clock of compilation."""
        start = time.perf_counter()
        recipe = recipe or self.recipe

        def run(*args: Any, held: Any) -> Any:
            task = recipe.task.holding(held)
            return function(*args, recipe=dataclasses.replace(recipe, task=task))

        jitted = jax.jit(
            run,
            compiler_options=mesh_lib.compiler_options(
                jax.default_backend(), self.config.reproducible
            ),
            **options,
        )
        compiled = jitted.lower(*args, held=recipe.task.held).compile()
        self.compile_seconds += time.perf_counter() - start
        return Program(compiled, recipe.task.held)

    def predict(
        self, variables: Any, data: Any, batch: Any, views: str = "none"
    ) -> dict[str, jax.Array]:
        """The compiled predict step."""
        if views not in self._predict:
            step = functools.partial(step_lib.predict_step, views=views)
            # Whole on each device, for all processes.
            whole = mesh_lib.replicated(self.mesh)
            self._predict[views] = self.compile(
                step, variables, data, batch, out_shardings=whole
            )
        return self._predict[views](variables, data, batch)


def prepare(
    config: ml_collections.ConfigDict, schedule: optim.Schedule | None = None
) -> Run:
    """Opens the data, builds model, optimizer and state.

    Args:
      config: as `config.default()`; its open values (the model's own options, mean and
        std) are filled in.
      schedule: of the learning rate, in place of config.schedule.

    Raises:
      UsageError: a value is wrong, or values do not go together.
      ConvnetError: the data, or the model of init_from, cannot be used.
    """
    resolve.validate(config)
    changed = config_lib.changed(config)
    bundle = transfer.adopt(config)
    shards = config.mesh.shards if config.reproducible else 0
    mesh = mesh_lib.make(
        config.data.batch_size, config.mesh.data, config.mesh.fsdp, shards
    )
    dataset = source_lib.load(config.data, config.seed)
    resolve.resolve(config, functools.partial(measure.mean_and_std, dataset.train))
    example = pipeline.first(dataset.train)["input"][None]
    for name in ("mean", "std"):
        if len(config.data[name]) not in (1, example.shape[-1]):
            raise UsageError(
                f"data.{name} is {config.data[name]}: want one number, or one for each"
                f" of the {example.shape[-1]} channels"
            )
    task = task_lib.create(config, dataset)
    task = task.holding(mesh_lib.put_whole(mesh, task.held))
    if task.of_inputs:
        dataset = dataclasses.replace(dataset, classes=())
    model = models.create(
        config.model.name,
        num_outputs=task.num_outputs,
        dtype=config.model.dtype,
        **resolve.model_options(config),
    )
    examples = len(dataset.train)
    total_steps = resolve.total_steps(config, examples)
    try:
        plan = transfer.plan(config, bundle, model, example, dataset)
        make = functools.partial(
            Recipe,
            model,
            task,
            mean=tuple(config.data.mean),
            std=tuple(config.data.std),
            augment=config.augment,
            seed=config.seed,
            accumulate=config.optimizer.accumulate,
            ema=config.optimizer.ema,
            shards=shards,
            mesh=mesh,
        )
        recipe, later, schedule = _recipes(
            make, config, plan, total_steps, schedule or config.schedule
        )
        summary = summary_lib.summarize(model, example.shape)
        first = pipeline.first(dataset.train)
        _check_shapes(recipe, first, config.evaluate.tta)
    except ValueError as error:
        raise UsageError(f"{error} (an input is {example.shape[1:]})") from error
    return Run(
        config=config,
        changed=changed,
        mesh=mesh,
        dataset=dataset,
        recipe=recipe,
        later=later,
        cached=features.wanted(
            config, recipe, mesh, bool(plan.thaw_step), example.shape, examples
        ),
        plan=plan,
        schedule=schedule,
        total_steps=total_steps,
        state=None,
        train_order=TrainOrder(examples, config.data.batch_size, config.seed),
        summary="\n\n".join(filter(None, [summary, plan.table()])),
        example_shape=example.shape[1:],
        example_dtype=example.dtype,
    )


def _recipes(
    make: Callable[..., Recipe],
    config: ml_collections.ConfigDict,
    plan: transfer.Plan,
    total_steps: int,
    schedule: Any,
) -> tuple[Recipe, dict[int, Recipe], optim.Schedule]:
    """The recipe at the start, the later ones, and the schedule."""

    def create(frozen: Frozen, start: int) -> Any:
        optimizer, rate = optim.create(config.optimizer, schedule, total_steps, start)
        return frozen.without(optim.scaled(optimizer, plan.scales())), rate

    first, rate = create(plan.frozen, 0)
    recipe = make(optimizer=first, frozen=plan.frozen)
    thawed = None
    if plan.thaw_step:
        stages = first, create(Frozen(), plan.thaw_step)[0]
        recipe = make(optimizer=staged(stages, 0), frozen=plan.frozen)
        thawed = make(optimizer=staged(stages, 1))
    params = [leaf.path for leaf in plan.leaves if leaf.collection == "params"]
    settle_step, paths = optim.settled(config.optimizer, total_steps, params)
    later = {}
    for start in sorted({plan.thaw_step, settle_step} - {0}):
        now = thawed if thawed and start >= plan.thaw_step else recipe
        settled = paths - now.frozen.params if start >= settle_step else frozenset()
        if settled or start == plan.thaw_step:
            later[start] = dataclasses.replace(now, settled=Frozen(settled))
    return recipe, later, rate


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
    if all(x.loaded for x in it.plan.leaves if x.collection == "batch_stats"):
        count = 1  # What would be measured is loaded.
    records = measure.spread(it.dataset.train, count)
    inputs = np.stack([record["input"] for record in records])
    create = functools.partial(step_lib.create_state, it.recipe)
    start = time.perf_counter()
    # Run once: compiling the random draws well would take ten times as long.
    options = {"xla_backend_optimization_level": 0}
    shapes = jax.eval_shape(create, inputs, it.plan.variables)
    state = jax.jit(
        create,
        out_shardings=mesh_lib.sharded(it.mesh, shapes),
        compiler_options=options if jax.default_backend() == "cpu" else None,
    )(inputs, it.plan.variables)
    jax.block_until_ready(state)
    it.compile_seconds += time.perf_counter() - start
    return state

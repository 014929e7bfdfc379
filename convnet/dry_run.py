"""What a train step needs on a mesh, found by compiling it for CPU devices.

Nothing is trained, and no array of the run is allocated: shapes and shardings go in,
XLA's plan comes out. Layers have the forms that accelerators run (`lowering.plain`).
"""

import dataclasses
import functools
import math
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

import jax
import ml_collections
import numpy as np

from convnet import exchanges, features
from convnet import mesh as mesh_lib
from convnet import step as step_lib
from convnet.data import pipeline
from convnet.exchanges import Exchange
from convnet.models import lowering
from convnet.prepare import Run, prepare

_GB = 1e9
# Of an accelerator's memory a split may take a quarter (`pipeline.resident_bytes`).
_RESIDENT_SHARE = 4
_CAVEAT = (
    "Params, optimizer state, data and batch are exact. What is needed while the step"
    " runs, and which exchanges there are, is XLA's plan for CPUs: GPUs and TPUs order"
    " and fuse operations in other ways, keep bfloat16 where a CPU computes in float32,"
    " and need room for their libraries. Leave a fifth of the memory free."
)


@dataclasses.dataclass(frozen=True)
class Need:
    """What one step needs.

    Attributes:
      batch: examples on each device.
      held: bytes on each device of what the step is given, by name.
      temporary: bytes on each device beyond that, while it runs.
      exchanges: all of a step.
      flops: floating-point operations on each device.
    """

    batch: int
    held: dict[str, int]
    temporary: int
    exchanges: tuple[Exchange, ...]
    flops: float

    @property
    def total(self) -> int:
        """Bytes on each device while the step runs."""
        return sum(self.held.values()) + self.temporary


def run(config: ml_collections.ConfigDict, memory_gb: float) -> str:
    """Returns the table that `convnet.main --dry_run` prints.

    Args:
      config: the experiment; `jax.devices()` are the devices of its mesh.
      memory_gb: of a device, in 10^9 bytes.

    Raises:
      UsageError: a value is wrong, or the mesh does not go with it.
      ConvnetError: the data cannot be read.
    """
    it = prepare(config)
    need = measure(it, config.data.batch_size // it.mesh.size, memory_gb)
    devices = it.mesh.size
    shape = f"{it.mesh.shape[mesh_lib.DATA]} x {it.mesh.shape[mesh_lib.FSDP]}"
    lines = [
        f"{config.model.name}, {config.model.dtype}, {config.optimizer.name}, inputs"
        f" {it.example_shape}: {config.data.batch_size} examples on a mesh of {shape}"
        f" devices (data x fsdp), {need.batch} on each",
        "",
        "on each device                             MB",
        *(f"  {name:30} {size / 1e6:13,.1f}" for name, size in need.held.items()),
        f"  {'while the step runs':30} {need.temporary / 1e6:13,.1f}",
        f"  {'in all':30} {need.total / 1e6:13,.1f}",
        "",
        *_exchanges(need.exchanges),
        "",
        f"arithmetic: {need.flops / 1e9:,.1f} GFLOP a step on each device,"
        f" {need.flops * devices / 1e9:,.1f} in all",
        _largest(it, need, memory_gb),
        "",
        textwrap.fill(_CAVEAT, 88),
    ]
    return "\n".join(lines)


def _exchanges(found: tuple[Exchange, ...]) -> Iterator[str]:
    if not found:
        yield "exchanges between devices: none"
        return
    yield "exchanges in a step                count         MB   MB sent by a device"
    for kind in exchanges.KINDS:
        those = [one for one in found if one.kind == kind]
        if those:
            size = sum(one.bytes for one in those) / 1e6
            sent = sum(one.sent for one in those) / 1e6
            yield f"  {kind:30} {len(those):7} {size:10,.1f} {sent:10,.1f}"


def _largest(it: Run, need: Need, memory_gb: float) -> str:
    limit = memory_gb * _GB

    def total(batch: int) -> int:
        found = need if batch == need.batch else measure(it, batch, memory_gb)
        return found.total

    parts = max(it.recipe.shards, 1) * it.recipe.accumulate
    unit = math.lcm(parts, it.mesh.size) // it.mesh.size
    batch, size = largest_batch(total, limit, unit, need.batch)
    if not batch:
        return f"memory: not even {unit} examples a device fit into {memory_gb:g} GB"
    return (
        f"memory: the largest batch that fits into {memory_gb:g} GB, in powers of two:"
        f" {batch:,} on each device, {batch * it.mesh.size:,} in all"
        f" ({size / _GB:.1f} GB)"
    )


def largest_batch(
    total: Callable[[int], int], limit: float, unit: int, start: int
) -> tuple[int, int]:
    """Finds the largest batch that fits, of those that are `unit` times a power of two.

    A line through two sizes says where to look, and what it says is looked at.

    Args:
      total: bytes of a batch, growing with it.
      limit: bytes that there are.
      unit: the smallest batch.
      start: where the line begins; it goes through four times that, too.

    Returns:
      The batch and its bytes; (0, the bytes of `unit`) if not even that fits.
    """
    total = functools.cache(total)
    slope = max((total(4 * start) - total(start)) / (3 * start), 1e-9)
    fit = start + (limit - total(start)) / slope
    power = max(math.floor(math.log2(max(fit / unit, 1))), 0)
    while power and total(unit << power) > limit:
        power -= 1
    if total(unit << power) > limit:
        return 0, total(unit)
    while total(unit << (power + 1)) <= limit:
        power += 1
    return unit << power, total(unit << power)


def measure(it: Run, batch: int, memory_gb: float = 80.0) -> Need:
    """Compiles a train step for so many examples on each device.

    Args:
      it: as prepared; its state is not needed, and stays what it is.
      batch: examples on each device.
      memory_gb: of a device, in 10^9 bytes: decides whether the data lie there.
    """
    inputs = (step_lib.init_examples(it.recipe), *it.example_shape)
    state = jax.eval_shape(
        functools.partial(step_lib.create_state, it.recipe),
        jax.ShapeDtypeStruct(inputs, it.example_dtype),
        it.plan.variables,
    )
    shardings = mesh_lib.sharded(it.mesh, state)
    state = jax.tree.map(_placed, state, shardings)
    data, rows = _input(it, batch * it.mesh.size, memory_gb)
    with lowering.plain():
        lowered = jax.jit(
            functools.partial(step_lib.train_step, recipe=it.recipe),
            donate_argnums=0,
            out_shardings=(shardings, mesh_lib.replicated(it.mesh)),
        ).lower(state, data, rows)
    # Nothing will run: XLA's plan is all that is wanted, not fast machine code.
    compiled = lowered.compile({"xla_backend_optimization_level": 0})
    plan = compiled.memory_analysis()
    held = {
        "params": state.params,
        "optimizer state": state.opt_state,
        "batch statistics": state.batch_stats,
        "moving averages": state.ema,
        "data": data,
        "batch": rows,
    }
    sizes = {name: _bytes(tree) for name, tree in held.items()}
    return Need(
        batch,
        {name: size for name, size in sizes.items() if size},
        # What comes out takes the place of the state, but for the metrics.
        plan.temp_size_in_bytes + plan.output_size_in_bytes - plan.alias_size_in_bytes,
        tuple(exchanges.find(compiled.as_text(), it.mesh.size)),
        compiled.cost_analysis().get("flops", 0.0),
    )


def _placed(leaf: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _bytes(tree: Any) -> int:
    """Bytes of a tree of placed shapes on one device."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def _input(it: Run, batch: int, memory_gb: float) -> tuple[Any, Any]:
    """Shapes of what lies on the devices for the run, and of a step's global batch."""
    label = np.asarray(pipeline.first(it.dataset.train)["label"])
    examples = len(it.dataset.train)

    def of(count: int, sharding: Any, **values: tuple[tuple[int, ...], Any]) -> Any:
        return {
            name: jax.ShapeDtypeStruct((count, *shape), dtype, sharding=sharding)
            for name, (shape, dtype) in values.items()
        }

    example = {
        "input": (it.example_shape, it.example_dtype),
        "label": (label.shape, label.dtype),
    }
    order = {"index": ((), np.int32), "epoch": ((), np.int32)}
    weight = {"weight": ((), np.float32)}
    split, whole = mesh_lib.batched(it.mesh), mesh_lib.replicated(it.mesh)
    size = examples * math.prod(it.example_shape) * np.dtype(it.example_dtype).itemsize
    placement = it.config.data.placement
    if it.cached:
        example = jax.ShapeDtypeStruct((1, *it.example_shape), np.float32)
        maps = features.shape_of(it.recipe, example)
        data = of(examples, whole, label=(label.shape, label.dtype), **weight)
        views = (features.views(it.config), examples, *maps.shape[1:])
        data["features"] = jax.ShapeDtypeStruct(views, maps.dtype, sharding=whole)
        return data, of(batch, split, **order, **weight)
    if placement == "device" or (
        placement == "auto" and size <= memory_gb * _GB / _RESIDENT_SHARE
    ):
        data = of(examples, whole, **example, **weight)
        return data, of(batch, split, **order, **weight)
    return {}, of(batch, split, **order, **weight, **example)

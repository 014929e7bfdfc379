"""The gradient of a batch: of the whole of it, or the sum over virtual shards.

Rounding depends on the order in which numbers are added, and a compiler orders the sum
over a batch anew for every number of devices. A fixed number of virtual shards takes
this freedom away: each is a small batch of its own, with BatchNorm over the shard
(the ghost batches of Hoffer et al., "Train longer, generalize better", 2017), compiled
alike wherever it runs, and their gradients are added leaf by leaf in the order of a
binary tree. How many of them lie on one device does not show in the bits.
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from convnet import mesh as mesh_lib
from convnet.freezing import merge

if TYPE_CHECKING:
    from convnet.step import Recipe

# (gradients, batch statistics, sums of metrics).
Found = tuple[Any, Any, dict[str, jax.Array]]
_PARTS = ("input", "target", "weight")


def head(model: nn.Module, features: jax.Array, train: bool) -> jax.Array:
    """The part of a network after its base: features to logits."""
    return model.head(features, train)


def of_batch(
    recipe: "Recipe",
    params: tuple[Any, Any],
    batch_stats: Any,
    batch: dict[str, jax.Array],
    dropout: jax.Array,
    cached: bool,
) -> Found:
    """Returns gradients, updated batch statistics and sums of metrics.

    Args:
      recipe: its `accumulate` is how many microbatches a step has, its `shards` how
        many virtual shards each of them has, 0 for none.
      params: those whose gradients are wanted, and the rest.
      batch_stats: before the step.
      batch: `input` (b, ...) as the network takes it, `target` (b, ...), `weight` (b,).
      dropout: the key of the step.
      cached: whether the inputs are features, for the head alone.
    """
    # Weights are 0 or 1: their sum is exact in any order.
    total = jnp.maximum(batch["weight"].sum(), 1.0)

    def of_rows(
        params: Any, batch_stats: Any, rows: Any, key: Any, total: Any
    ) -> Found:
        trained, rest = params

        def objective(trained: Any) -> Any:
            with recipe.frozen.resting():
                logits, updated = recipe.model.apply(
                    {"params": merge(trained, rest), "batch_stats": batch_stats},
                    rows["input"],
                    train=True,
                    mutable=["batch_stats"],
                    rngs={"dropout": key},
                    method=head if cached else None,
                )
            losses = recipe.task.loss(logits, rows["target"])
            loss = (losses * rows["weight"]).sum() / total
            values = recipe.task.metrics(logits, rows["target"])
            sums = {k: (v * rows["weight"]).sum() for k, v in values.items()}
            return loss, (updated.get("batch_stats", {}), sums)

        gradient = jax.value_and_grad(objective, has_aux=True)
        (loss, (updated, sums)), grads = gradient(trained)
        return grads, updated, {"objective": loss, **sums}

    of_part = _by_shards(recipe, of_rows) if recipe.shards else of_rows
    grads, metrics = None, None
    # Unrolled: on a CPU with JAX 0.10 loops are many times slower.
    for part in range(recipe.accumulate):
        # Interleaved, so that each device works on its own share of every microbatch.
        rows = {
            k: batch[k].reshape(-1, recipe.accumulate, *batch[k].shape[1:])[:, part]
            for k in _PARTS
        }
        key = jax.random.fold_in(dropout, part)
        part_grads, batch_stats, sums = of_part(params, batch_stats, rows, key, total)
        grads = part_grads if part == 0 else _add(grads, part_grads)
        metrics = sums if part == 0 else _add(metrics, sums)
    found = grads, batch_stats, metrics
    return jax.lax.optimization_barrier(found) if recipe.shards else found


def _add(one: Any, other: Any) -> Any:
    return jax.tree.map(jnp.add, one, other)


def _by_shards(recipe: "Recipe", of_rows: Callable[..., Found]) -> Callable[..., Found]:
    """`of_rows` for rows that lie split over the devices of the mesh."""
    devices = recipe.mesh.size
    here = recipe.shards // devices
    # The results of two programs agree if the parts that round are compiled apart from
    # what differs around them: nothing is fused across a barrier.
    hold = jax.lax.optimization_barrier

    def on_device(
        params: Any, batch_stats: Any, rows: Any, key: jax.Array, total: jax.Array
    ) -> Found:
        first = here * jax.lax.axis_index(mesh_lib.DATA)
        params, batch_stats, rows, key, total = hold(
            (params, batch_stats, rows, key, total)
        )

        def of_shard(shard: jax.Array, rows: Any) -> Found:
            rows, shard_key = hold((rows, jax.random.fold_in(key, shard)))
            return hold(of_rows(params, batch_stats, rows, shard_key, total))

        shards = jax.tree.map(lambda x: x.reshape(here, -1, *x.shape[1:]), rows)
        numbers = first + jnp.arange(here)
        # A CPU device may have one shard alone, and a loop of one round would be
        # compiled like none, to other bits than one of eight.
        if recipe.mesh.devices.flat[0].platform == "cpu":
            found = [of_shard(*_row((numbers, shards), i)) for i in range(here)]
        else:
            stacked = jax.lax.map(lambda x: of_shard(*x), (numbers, shards))
            found = [_row(stacked, i) for i in range(here)]
        grads, batch_stats, sums = hold(_sum(_tree_sum(found), devices))
        mean = jax.tree.map(lambda x: x / recipe.shards, batch_stats)
        return grads, mean, sums

    whole, split = PartitionSpec(), PartitionSpec(mesh_lib.DATA)
    return jax.shard_map(
        on_device,
        mesh=recipe.mesh,
        in_specs=(whole, whole, split, whole, whole),
        out_specs=whole,
        check_vma=False,
    )


def _row(tree: Any, index: int) -> Any:
    return jax.tree.map(lambda leaf: leaf[index], tree)


def _tree_sum(values: list[Any]) -> Any:
    """The sum of 2^n trees: of neighbours, then of neighbouring sums, and so on."""
    while len(values) > 1:
        pairs = zip(values[::2], values[1::2], strict=True)
        values = [_add(one, other) for one, other in pairs]
    return values[0]


def _sum(value: Any, devices: int) -> Any:
    """Goes on with the tree of `_tree_sum` over 2^n devices.

    In round r each device swaps its sum with the one 2^r away. Both add the same two
    numbers, and a + b is b + a also when it is rounded, so that all end with the same
    bits, after log2(devices) times the bytes of the gradient.
    """
    for distance in (2**r for r in range(int(math.log2(devices)))):
        swaps = [(device, device ^ distance) for device in range(devices)]
        value = _add(value, jax.lax.ppermute(value, mesh_lib.DATA, swaps))
    return value

"""Devices: the mesh, where arrays lie on it, and how its programs are compiled.

The mesh has two axes. A batch is split over both. What changes from step to step
(params, optimizer state, averages) lies whole on each device of axis `data`, and split
over those of axis `fsdp`, which need 1/n of the memory for it and gather what they
compute with (Rajbhandari et al., "ZeRO", 2020).
"""

import functools
import os
import warnings
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from convnet import heap, processor
from convnet.errors import UsageError

# On a CPU, XLA's defaults are slow for convolutions. YNNPACK stays for reductions only,
# and from JAX 0.12 on convolutions go to oneDNN.
_CPU_OPTIONS = {
    "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE",
    "xla_cpu_experimental_onednn_custom_call": True,
}
# XLA's own loops with vectors of 512 bits in place of 256, on processors that compute
# with these at full speed (before, AVX-512 lowered the clock): a tanh takes two thirds
# of the time on an Intel Xeon of the fourth generation.
_WIDE_OPTIONS = {"xla_cpu_prefer_vector_width": 512}
_WIDE = "avx512_bf16"

# With them a GPU adds in the same order each time, and an algorithm is chosen by rule,
# not by which was faster today.
_REPRODUCIBLE_OPTIONS = {
    "gpu": {"xla_gpu_deterministic_ops": True, "xla_gpu_autotune_level": 0},
}
DATA, FSDP = "data", "fsdp"
# Elements; below, a transfer takes longer than the memory is worth.
_LEAST_SPLIT = 1 << 14


def start(compilation_cache: str, threads: int = 0) -> None:
    """Prepares JAX for an app; called once by an entry point, before any computation.

    Fixes the number of CPU threads (NPROC), on which XLA's results depend; lets the
    process keep the memory that it frees, on a CPU; and switches on the persistent
    compilation cache.

    Args:
      compilation_cache: its folder; "auto" for the user's; "none" for no cache.
      threads: how many (`threads`); 0: as NPROC says, or one for each core.
    """
    fix_threads(threads)
    heap.share()
    if jax.default_backend() == "cpu":
        heap.keep()
    if compilation_cache == "none":
        return
    folder = Path(compilation_cache).expanduser()
    if compilation_cache == "auto":
        base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        folder = Path(base).expanduser() / "convnet" / "compiled"
    # On a CPU XLA cannot store programs that call oneDNN: these are compiled each time.
    warnings.filterwarnings("ignore", "Error writing persistent compilation")
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def pretend(devices: int) -> None:
    """Gives this process so many CPU devices, and no others: to compile for a mesh.

    Called by an entry point before `start`.
    """
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", devices)


def fix_threads(threads: int) -> None:
    """Fixes the number of CPU threads, before anything else that brings JAX up."""
    # macOS has no affinity.
    allowed = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))(0)
    os.environ.setdefault("NPROC", str(len(allowed)))
    if threads:
        os.environ["NPROC"] = str(threads)


def threads(config: Any) -> int:
    """Returns how many CPU threads a run needs, 0 for as many as there are.

    A reproducible one needs the same everywhere. XLA takes at least one for each
    device, and there are at most as many devices as shards.
    """
    return config.mesh.shards if config.reproducible else 0


def make(batch_size: int, data: int = 0, fsdp: int = 1, shards: int = 0) -> Mesh:
    """Returns the mesh (data, fsdp) of the first devices, of each process as many.

    Args:
      batch_size: that must be shared evenly.
      data, fsdp: devices along each axis; data = 0: all that there are.
      shards: virtual shards of a batch, 0 for none.

    Raises:
      UsageError: there are not so many devices, or the batch or the shards cannot be
        split evenly over them.
    """
    devices, processes = jax.devices(), jax.process_count()
    data = data or len(devices) // fsdp
    used = data * fsdp
    if not 0 < used <= len(devices) or used % processes:
        raise UsageError(
            f"mesh.data = {data} times mesh.fsdp = {fsdp} asks for"
            f" {max(data, 1) * fsdp} devices, and there are {len(devices)}"
            + (
                f" in {processes} processes, each of which uses as many as the others"
                if processes > 1
                else ""
            )
        )
    if processes > 1:
        # Each process has a stretch of the batch (`order.Part`).
        each = used // processes
        own = [[d for d in devices if d.process_index == i] for i in range(processes)]
        devices = [device for mine in own for device in mine[:each]]
    if batch_size % used:
        raise UsageError(
            f"data.batch_size is {batch_size}, which {used} devices cannot"
            f" share evenly: take a multiple of {used}"
        )
    # A loop of one round is no loop for a compiler: unrolled, it is another program.
    least = 1 if devices[0].platform == "cpu" else 2
    if shards and (fsdp > 1 or shards % (least * used)):
        raise UsageError(
            f"reproducible = True with mesh.shards = {shards} runs on 1, 2, 4, ..."
            f" {shards // least} devices along mesh.data, not on {data} times"
            f" mesh.fsdp = {fsdp}: choose mesh.data, or more mesh.shards (which is"
            " another result)"
        )
    if shards and used > 1 and jax.__version_info__ < (0, 12):
        raise UsageError(
            f"reproducible = True on {used} devices needs JAX 0.12, which is for Python"
            f" 3.12 and newer; with JAX {jax.__version__} other numbers of devices have"
            " other bits: choose mesh.data = 1"
        )
    return Mesh(np.asarray(devices[:used]).reshape(data, fsdp), (DATA, FSDP))


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of what every device holds whole (datasets, metrics)."""
    return NamedSharding(mesh, PartitionSpec())


def sharded(mesh: Mesh, tree: Any) -> Any:
    """Returns the sharding of each leaf of what changes from step to step.

    Leaves of some size are split over the devices of axis `fsdp`, along the largest
    axis that they can share evenly, the last of several; the others lie whole on each.

    Args:
      mesh: of the run.
      tree: of arrays or their shapes.
    """
    devices = mesh.shape[FSDP]

    def of(leaf: Any) -> NamedSharding:
        even = [
            (size, axis) for axis, size in enumerate(leaf.shape) if size % devices == 0
        ]
        if devices == 1 or leaf.size < _LEAST_SPLIT or not even:
            return replicated(mesh)
        return NamedSharding(mesh, PartitionSpec(*[None] * max(even)[1], FSDP))

    return jax.tree.map(of, tree)


def gathered(mesh: Mesh | None, tree: Any) -> Any:
    """Within jit: the tree as the network computes with it, whole on each device."""
    if mesh is None or mesh.shape[FSDP] == 1:
        return tree
    return jax.lax.with_sharding_constraint(tree, replicated(mesh))


def scattered(mesh: Mesh | None, tree: Any) -> Any:
    """Within jit: the tree as it lies in memory between steps."""
    if mesh is None or mesh.shape[FSDP] == 1:
        return tree
    return jax.lax.with_sharding_constraint(tree, sharded(mesh, tree))


def batched(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """Returns the sharding that splits an axis over the devices (batches)."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, (DATA, FSDP)))


def put_batch(mesh: Mesh, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """Puts a host batch on the devices, split by rows.

    Of several processes each gives its own rows (`order.Part`).
    """
    return _put(batch, batched(mesh))


def put_batches(mesh: Mesh, batches: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """`put_batch` for a stack of batches (steps, b, ...): split along the second."""
    return _put(batches, batched(mesh, axis=1))


def put_whole(mesh: Mesh, tree: Any) -> Any:
    """Puts a tree of arrays, the same in all processes, on every device."""
    return _put(tree, replicated(mesh))


def put_parts(mesh: Mesh, part: Any, count: int) -> Any:
    """Puts a tree on every device, whole, of which each process has some rows.

    Args:
      mesh: of the run.
      part: of as many rows in each process, a multiple of its devices.
      count: how many rows there are; the last process may have more, which are dropped.
    """
    cut = jax.jit(
        lambda tree: jax.tree.map(lambda rows: rows[:count], tree),
        out_shardings=replicated(mesh),
    )
    return cut(_put(part, batched(mesh)))


def _put(tree: Any, sharding: NamedSharding) -> Any:
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)
    make = functools.partial(jax.make_array_from_process_local_data, sharding)
    return jax.tree.map(lambda leaf: make(np.asarray(leaf)), tree)


def fetch(tree: Any) -> Any:
    """Returns a tree of arrays on the host, whole; all processes call together."""

    def whole(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array) or (
            leaf.is_fully_addressable or leaf.is_fully_replicated
        ):
            return leaf
        return multihost_utils.process_allgather(leaf, tiled=True)

    return jax.device_get(jax.tree.map(whole, tree))


@functools.cache
def compiler_options(platform: str, reproducible: bool = False) -> dict[str, Any]:
    """Returns the options for `jit` on this platform ("cpu", "gpu", "tpu").

    Those that pay are experimental: one that this XLA refuses is left out, and so is
    one that the environment's XLA_FLAGS name: the user's own word counts. Those that
    `reproducible` needs stay.
    """
    if platform != "cpu":
        return dict(_REPRODUCIBLE_OPTIONS.get(platform, {})) if reproducible else {}
    given = os.environ.get("XLA_FLAGS", "")
    wanted = _CPU_OPTIONS | (_WIDE_OPTIONS if processor.has(_WIDE) else {})
    return {
        name: value
        for name, value in wanted.items()
        if f"--{name}" not in given and _accepted({name: value})
    }


def _accepted(options: dict[str, Any]) -> bool:
    try:
        jax.jit(lambda x: x + 1, compiler_options=options).lower(0.0).compile()
    except Exception:  # XLA's errors have no common public class.
        return False
    return True


def describe(mesh: Mesh) -> str:
    """Returns for example "2 x cpu (cpu)", "8 x cpu (cpu) in 2 processes"."""
    device, count = mesh.devices.flat[0], jax.process_count()
    processes = f" in {count} processes" if count > 1 else ""
    return f"{mesh.devices.size} x {device.device_kind} ({device.platform}){processes}"

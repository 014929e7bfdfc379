"""Devices: the mesh, where arrays lie on it, and how its programs are compiled."""

import ctypes
import functools
import os
import warnings
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from convnet.errors import UsageError

# On a CPU, XLA's defaults are slow for convolutions. YNNPACK stays for reductions only,
# and from JAX 0.12 on convolutions go to oneDNN.
_CPU_OPTIONS = {
    "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE",
    "xla_cpu_experimental_onednn_custom_call": True,
}


def start(compilation_cache: str) -> None:
    """Prepares JAX for an app; called once by an entry point, before any computation.

    Fixes the number of CPU threads (NPROC, unless it is set), on which XLA's results
    depend; lets the process keep the memory that it frees, on a CPU; and switches on
    the persistent compilation cache.

    Args:
      compilation_cache: its folder; "auto" for the user's; "none" for no cache.
    """
    # macOS has no affinity.
    allowed = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))(0)
    os.environ.setdefault("NPROC", str(len(allowed)))
    if jax.default_backend() == "cpu":
        _keep_heap()
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


def _keep_heap() -> None:
    """Tells glibc to keep freed memory: fresh pages cost a quarter of a step's time.

    Measured on two cores: 237 -> 298 images/s for ResNet-9, 113 -> 141 for a CNN.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # Other C libraries have none.
        m_trim_threshold, m_mmap_max, m_arena_max = -1, -4, -8
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, -1)
        mallopt(m_arena_max, 1)


def make(batch_size: int) -> Mesh:
    """Returns the mesh of all devices, with the one axis `data`.

    Raises:
      UsageError: the batch cannot be split evenly over the devices.
    """
    devices = jax.devices()
    if batch_size % len(devices):
        raise UsageError(
            f"data.batch_size is {batch_size}, which {len(devices)} devices cannot"
            f" share evenly: take a multiple of {len(devices)}"
        )
    return Mesh(np.asarray(devices), ("data",))


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of what every device holds whole (params, datasets)."""
    return NamedSharding(mesh, PartitionSpec())


def batched(mesh: Mesh) -> NamedSharding:
    """Returns the sharding that splits the first axis over the devices (batches)."""
    return NamedSharding(mesh, PartitionSpec("data"))


def put_batch(mesh: Mesh, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """Puts a global host batch on the devices, split along its first axis."""
    return jax.device_put(batch, batched(mesh))


def put_batches(mesh: Mesh, batches: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """`put_batch` for a stack of batches (steps, b, ...): split along the second."""
    spec = PartitionSpec(None, "data")
    return jax.device_put(batches, NamedSharding(mesh, spec))


def put_whole(mesh: Mesh, tree: Any) -> Any:
    """Puts a tree of arrays on every device."""
    return jax.device_put(tree, replicated(mesh))


@functools.cache
def compiler_options(platform: str) -> dict[str, Any]:
    """Returns the options for `jit` that pay on this platform ("cpu", "gpu", "tpu").

    They are experimental: one that this XLA refuses is left out, and so is one that the
    environment's XLA_FLAGS name: the user's own word counts.
    """
    if platform != "cpu":
        return {}
    given = os.environ.get("XLA_FLAGS", "")
    return {
        name: value
        for name, value in _CPU_OPTIONS.items()
        if f"--{name}" not in given and _accepted({name: value})
    }


def _accepted(options: dict[str, Any]) -> bool:
    try:
        jax.jit(lambda x: x + 1, compiler_options=options).lower(0.0).compile()
    except Exception:  # XLA's errors have no common public class.
        return False
    return True


def describe(mesh: Mesh) -> str:
    """Returns for example "2 x cpu (cpu)"."""
    device = mesh.devices.flat[0]
    return f"{mesh.devices.size} x {device.device_kind} ({device.platform})"

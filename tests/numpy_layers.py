"""Layers in NumPy, float64, and variables to compare them with."""

import jax
import numpy as np

from convnet import models


def numpy_conv(x, kernel, stride=1, padding="SAME", bias=0.0):
    """Cross-correlation in float64 from sliding windows, for any rank."""
    x, kernel = np.asarray(x, np.float64), np.asarray(kernel, np.float64)
    rank, size = x.ndim - 2, kernel.shape[:-2]
    pads = []
    for n, k in zip(x.shape[1:-1], size, strict=True):
        if padding == "SAME":
            total = max((-(-n // stride) - 1) * stride + k - n, 0)
            pads.append((total // 2, total - total // 2))
        elif padding == "CIRCULAR":
            pads.append(((k - 1) // 2, k // 2))
        else:
            pads.append((0, 0) if padding == "VALID" else (padding, padding))
    mode = "wrap" if padding == "CIRCULAR" else "constant"
    x = np.pad(x, [(0, 0), *pads, (0, 0)], mode=mode)
    axes = tuple(range(1, rank + 1))
    windows = np.lib.stride_tricks.sliding_window_view(x, size, axis=axes)
    windows = windows[(slice(None), *[slice(None, None, stride)] * rank)]
    # b, *places, c, *size against *size, c, features
    over = tuple(range(rank + 1, windows.ndim))
    return np.tensordot(windows, kernel, (over, (rank, *range(rank)))) + bias


def numpy_pool(x, window, stride, padding, how):
    x = np.asarray(x, np.float64)
    rank = x.ndim - 2
    fill = -np.inf if how == "max" else 0.0
    x = np.pad(x, [(0, 0), *[(padding, padding)] * rank, (0, 0)], constant_values=fill)
    axes = tuple(range(1, rank + 1))
    windows = np.lib.stride_tricks.sliding_window_view(x, (window,) * rank, axis=axes)
    windows = windows[(slice(None), *[slice(None, None, stride)] * rank)]
    over = tuple(range(rank + 2, windows.ndim))
    if how == "max":
        return windows.max(over)
    if how == "average":
        return windows.mean(over)
    return np.sqrt((windows**2).mean(over))


def numpy_norm(x, params, stats):
    scale = params["scale"] / np.sqrt(np.asarray(stats["var"], np.float64) + 1e-5)
    return (x - stats["mean"]) * scale + params["bias"]


def draw_variables(model, x, rng, *args):
    """Variables in which nothing is zero or one, so that each of them matters."""

    def draw(path, leaf):
        noise = rng.standard_normal(leaf.shape).astype(np.float32)
        kind = path[-1].key
        if kind == "kernel":
            return noise / np.sqrt(np.float32(np.prod(leaf.shape[:-1])))
        if kind == "var":
            return 1 + 0.3 * np.abs(noise)
        return 0.3 * noise + (kind == "scale")

    def init(x):
        return model.init(jax.random.key(0), x, *args)

    return jax.tree_util.tree_map_with_path(draw, jax.eval_shape(init, x))


def tapped(model, variables, x):
    """Logits and taps, compiled as one: a compiled network is quicker to test."""

    @jax.jit
    def run(variables, x):
        logits, state = model.apply(variables, x, mutable=["taps"])
        return logits, state["taps"]

    logits, taps = run(variables, x)
    return np.asarray(logits), models.taps(jax.tree.map(np.asarray, taps))


def small_cnn():
    """A small network with all that a `cnn` can have, its variables and inputs."""
    rng = np.random.default_rng(1)
    model = models.create(
        "cnn",
        num_outputs=3,
        widths=(4, 5),
        depth=2,
        norm="batch",
        pool="average",
        dense=(7,),
        dropout=0.5,
        bn_momentum=0.7,
    )
    x = rng.standard_normal((4, 9, 8, 2)).astype(np.float32)
    return model, draw_variables(model, x, rng), x

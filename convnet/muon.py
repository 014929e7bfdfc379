"""Muon: the momentum of each kernel, orthogonalised (Jordan et al. 2024).

kellerjordan.github.io/posts/muon. What is no kernel of the base goes through SGD.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

# Newton-Schulz coefficients of Jordan 2024: the steepest slope at zero, at the price of
# singular values that end anywhere from 0.68 to 1.21 rather than at 1.
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
# Matrices are padded to a common shape where the stack then has at most so many times
# the numbers: few large products keep an accelerator busy, a CPU had only more to do.
_PADDED = {"cpu": 1.0}
_PADDED_ELSEWHERE = 8.0


def create(
    optimizer: Any, rate: Callable[[Any], jax.Array], total_steps: int, start: int = 0
) -> optax.GradientTransformation:
    """Builds the optimizer.

    - Kernels of the base, (*spatial, in, out) seen as (spatial * in, out): momentum,
      Nesterov's where wanted, then `orthogonalize`. With `normalize` each kernel is
      first set to a Frobenius norm of sqrt(out), and the update is the orthogonal
      matrix itself, so that the rate is the relative change in a step; for networks in
      which a norm follows each convolution. Otherwise updates are scaled by
      0.2 * sqrt(max(rows, columns)), which gives them about the root mean square of
      AdamW's (Liu et al. 2025, arXiv:2502.16982), and the decay is decoupled.
    - The head and all vectors: SGD with Nesterov's momentum `rest_momentum` and peak
      rates `head_lr` and `bias_lr`; `weight_decay` is the share of a leaf that enters
      the momentum at the peak rate, whatever that rate is.
    - The bias of a whitening layer likewise, but its rate falls linearly to 0 in the
      first `whiten_until` of the run.

    Args:
        optimizer: the section of the config.
        rate: index of an update -> the rate of the kernels; the others follow it.
        total_steps: number of updates of the whole run.
        start: how many of them came before this optimizer's first.
    """
    trace = optax.trace(optimizer.momentum, nesterov=optimizer.nesterov)
    kernels = [trace, _orthogonal(optimizer.normalize, optimizer.newton_schulz)]
    if optimizer.weight_decay and not optimizer.normalize:
        kernels.append(optax.add_decayed_weights(optimizer.weight_decay))
    kernels.append(optax.scale_by_learning_rate(rate))
    if optimizer.normalize:
        kernels.append(_normalized())

    def rest(peak: float, share: Callable[[Any], jax.Array]) -> Any:
        decay = optimizer.weight_decay / max(peak, 1e-30)
        return optax.chain(
            optax.add_decayed_weights(decay),
            optax.trace(optimizer.rest_momentum, nesterov=True),
            optax.scale_by_learning_rate(lambda step: peak * share(step)),
        )

    def follow(step: Any) -> jax.Array:
        return rate(step) / max(optimizer.lr, 1e-30)

    def early(step: Any) -> jax.Array:
        until = _until(optimizer, total_steps)
        return jnp.maximum(1 - jnp.asarray(step + start, jnp.float32) / until, 0.0)

    return optax.partition(
        {
            "kernel": optax.chain(*kernels),
            "head": rest(optimizer.head_lr, follow),
            "vector": rest(optimizer.bias_lr, follow),
            "whitening": rest(optimizer.bias_lr, early),
        },
        _labels,
    )


def settled(
    optimizer: Any, total_steps: int, paths: Iterable[str]
) -> tuple[int, frozenset[str]]:
    """See `optim.settled`."""
    found = frozenset(path for path in paths if _whitens(path.split("/")))
    step = math.ceil(_until(optimizer, total_steps))
    return (step, found) if found and step < total_steps else (0, frozenset())


def _until(optimizer: Any, total_steps: int) -> float:
    return max(optimizer.whiten_until * total_steps, 1.0)


def orthogonalize(matrices: jax.Array, steps: int) -> jax.Array:
    """Replaces singular values by about 1 (0.68 to 1.21 after five steps).

    Args:
        matrices: (..., rows, columns) float32; zeros at the ends change nothing.
        steps: of Newton and Schulz's iteration; three leave small values smaller.

    Returns:
        The same shape; zero for a zero matrix. With five steps singular values below
        about 0.2% of the Frobenius norm end lower.
    """
    a, b, c = _COEFFICIENTS
    rows, columns = matrices.shape[-2:]
    x = jnp.swapaxes(matrices, -1, -2) if rows > columns else matrices
    # Held, as in `optim.global_norm`.
    norms = jnp.linalg.norm(x, axis=(-2, -1), keepdims=True)
    x /= jax.lax.optimization_barrier(norms) + 1e-7
    # On accelerators in bfloat16, as its authors do.
    x = x if jax.default_backend() == "cpu" else x.astype(jnp.bfloat16)
    # Unrolled: they are few, and compiled loops are slow on a CPU with JAX 0.10.
    for _ in range(steps):
        gram = x @ jnp.swapaxes(x, -1, -2)
        x = a * x + (b * gram + c * gram @ gram) @ x
    x = x.astype(matrices.dtype)
    return jnp.swapaxes(x, -1, -2) if rows > columns else x


def stacks(
    shapes: Sequence[tuple[int, int]], padded: float
) -> list[tuple[tuple[int, int], list[int]]]:
    """Groups matrices that are computed together.

    Args:
        shapes: (rows, columns) of each.
        padded: how many times the numbers of its matrices a stack may have.

    Returns:
        For each stack the shape to pad to, and the places of its matrices in `shapes`.
    """
    order = sorted(range(len(shapes)), key=lambda i: shapes[i], reverse=True)
    groups: list[list[int]] = []
    for place in order:
        for group in groups:
            members = [shapes[i] for i in (*group, place)]
            rows, columns = (max(side) for side in zip(*members, strict=True))
            numbers = sum(r * c for r, c in members)
            if rows * columns * len(members) <= padded * numbers:
                group.append(place)
                break
        else:
            groups.append([place])
    return [
        (tuple(max(shapes[i][axis] for i in group) for axis in (0, 1)), group)
        for group in groups
    ]


def _labels(params: Any) -> Any:
    def label(path: tuple, leaf: jax.Array) -> str:
        names = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
        if names[0] == "head":
            return "head"
        if _whitens(names):
            return "whitening"
        return "kernel" if leaf.ndim > 1 else "vector"

    return jax.tree.map_with_path(label, params)


def _whitens(names: Sequence[str]) -> bool:
    """Whether a parameter, by the parts of its path, is a whitening layer's."""
    return names[0] != "head" and "whiten" in names


def _orthogonal(normalize: bool, steps: int) -> optax.GradientTransformation:
    def update(momentum: Any, params: Any = None) -> Any:
        del params
        leaves, treedef = jax.tree.flatten(momentum)
        matrices = [leaf.reshape(-1, leaf.shape[-1]) for leaf in leaves]
        shapes = [matrix.shape for matrix in matrices]
        limit = _PADDED.get(jax.default_backend(), _PADDED_ELSEWHERE)
        for (rows, columns), group in stacks(shapes, limit):
            stack = jnp.stack(
                [
                    jnp.pad(matrices[i], ((0, rows - r), (0, columns - c)))
                    for i in group
                    for r, c in [shapes[i]]
                ]
            )
            stack = orthogonalize(stack, steps)
            for matrix, i in zip(stack, group, strict=True):
                r, c = shapes[i]
                scale = 1.0 if normalize else 0.2 * math.sqrt(max(r, c))
                leaves[i] = scale * matrix[:r, :c].reshape(leaves[i].shape)
        return treedef.unflatten(leaves)

    return optax.stateless(update)


def _normalized() -> optax.GradientTransformation:
    """Adds to each update what brings its kernel to a norm of sqrt(out)."""

    def one(update: jax.Array, kernel: jax.Array) -> jax.Array:
        wanted = math.sqrt(kernel.shape[-1])
        norm = jax.lax.optimization_barrier(jnp.linalg.norm(kernel.ravel()))
        norm = jnp.maximum(norm, 1e-12)
        return update + kernel * (wanted / norm - 1)

    return optax.stateless(lambda updates, kernels: jax.tree.map(one, updates, kernels))

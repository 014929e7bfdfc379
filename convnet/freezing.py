"""What of a network stays as it is while the rest of it trains."""

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Collection, Sequence
from typing import Any

import optax
from flax import linen as nn
from flax import traverse_util

Tree = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Frozen:
    """The leaves and the layers that training does not touch.

    Attributes:
      params: the paths of parameters, such as "base/stem/conv/kernel".
      layers: the paths of modules that run as they do in prediction: batch norm with
        its running statistics, which it does not move, and no dropout.
    """

    params: frozenset[str] = frozenset()
    layers: frozenset[tuple[str, ...]] = frozenset()

    @classmethod
    def of(cls, params: Tree, batch_stats: Tree, paths: Collection[str]) -> "Frozen":
        """Returns what freezing the leaves `paths` of both collections means.

        A layer rests if all leaves in it are frozen, or all its own batch statistics.
        """
        leaves = set(flatten(params)) | set(flatten(batch_stats))
        trained = {up for leaf in leaves - set(paths) for up in above(leaf)}
        moving = {above(leaf)[-1] for leaf in set(flatten(batch_stats)) - set(paths)}
        owners = {above(leaf)[-1] for leaf in flatten(batch_stats)} - moving
        resting = {up for leaf in leaves for up in above(leaf)} - trained | owners
        return cls(
            frozenset(flatten(params)) & frozenset(paths),
            frozenset(tuple(path.split("/")) for path in resting if path),
        )

    def split(self, params: Tree) -> tuple[Tree, Tree]:
        """Returns the parameters that train, and those that do not, as two trees."""
        if not self.params:
            return params, {}
        parts: tuple[Tree, Tree] = ({}, {})
        for path, leaf in flatten(params).items():
            parts[path in self.params][path] = leaf
        trained, rest = (unflatten(part) for part in parts)
        return trained, rest

    def without(
        self, optimizer: optax.GradientTransformation
    ) -> optax.GradientTransformation:
        """Returns the optimizer of the parameters that train.

        It is given all parameters but only the gradients of these, and returns only
        their updates. It keeps no state for the others.
        """
        if not self.params:
            return optimizer

        def update(grads: Tree, state: Any, params: Tree) -> tuple[Tree, Any]:
            return optimizer.update(grads, state, self.split(params)[0])

        return optax.GradientTransformation(
            lambda params: optimizer.init(self.split(params)[0]), update
        )

    def resting(self) -> contextlib.AbstractContextManager[None]:
        """Within it, `apply` calls the frozen layers with `train=False`."""
        if not self.layers:
            return contextlib.nullcontext()
        return nn.intercept_methods(self._rest)

    def _rest(self, call: Callable, args: tuple, kwargs: Tree, context: Any) -> Any:
        module = context.module
        if context.method_name == "__call__" and module.path in self.layers:
            signature = inspect.signature(type(module).__call__)
            bound = signature.bind(module, *args, **kwargs)
            if "train" in bound.arguments:
                bound.arguments["train"] = False
            args, kwargs = bound.args[1:], bound.kwargs
        return call(*args, **kwargs)


def staged(
    optimizers: Sequence[optax.GradientTransformation], stage: int
) -> optax.GradientTransformation:
    """Returns the optimizer of one stage of a run.

    Its state is the tuple of all stages' states, of which it moves its own: the state
    of a run has the same structure from the first step to the last.
    """

    def update(grads: Tree, states: tuple, params: Tree) -> tuple[Tree, tuple]:
        updates, state = optimizers[stage].update(grads, states[stage], params)
        return updates, (*states[:stage], state, *states[stage + 1 :])

    return optax.GradientTransformation(
        lambda params: tuple(one.init(params) for one in optimizers), update
    )


def flatten(tree: Tree) -> Tree:
    """Returns the leaves of nested dicts by their paths, "base/stem/conv/kernel"."""
    return traverse_util.flatten_dict(tree, sep="/")


def above(path: str) -> list[str]:
    """Returns the paths of the modules that a leaf lies in, "" first."""
    parts = path.split("/")
    return ["/".join(parts[:depth]) for depth in range(len(parts))]


def merge(one: Tree, other: Tree) -> Tree:
    """Joins what `Frozen.split` took apart."""
    if not other:
        return one
    return unflatten({**flatten(one), **flatten(other)})


def unflatten(leaves: Tree) -> Tree:
    """Undoes `flatten`."""
    return traverse_util.unflatten_dict(leaves, sep="/")

"""Muon against its published update in NumPy float64, in PyTorch's layout."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convnet import muon, optim

STEPS = 8
SHAPES = {
    "base/stem/whiten/bias": (6,),
    "base/group1/conv1/kernel": (3, 3, 6, 4),
    "base/group1/norm1/bias": (4,),
    "base/group1/conv2/kernel": (3, 3, 4, 4),
    "base/group2/conv1/kernel": (3, 3, 4, 8),
    # Wider than it is tall.
    "base/group2/conv2/kernel": (2, 8),
    "head/logits/kernel": (8, 3),
    "head/logits/bias": (3,),
}
KERNELS = {n for n in SHAPES if n.startswith("base") and n.endswith("kernel")}


def optimizer(**changes):
    keys = {"name": "muon", "lr": 0.24, "momentum": 0.6, "nesterov": True}
    keys |= {"normalize": True, "newton_schulz": 3, "weight_decay": 0.004}
    keys |= {"head_lr": 0.67, "bias_lr": 0.053, "rest_momentum": 0.85}
    keys |= {"whiten_until": 0.375, "clip_norm": 0.0}
    return types.SimpleNamespace(**keys | changes)


def schedule(name="linear", **changes):
    keys = {"name": name, "warmup": 0.0, "steps": (), "factor": 0.1, "final": 0.0}
    return types.SimpleNamespace(**keys | changes)


def nest(flat):
    tree = {}
    for name, leaf in flat.items():
        *parents, last = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = jnp.asarray(leaf, jnp.float32)
    return tree


def flatten(tree):
    paths = jax.tree_util.tree_leaves_with_path(tree)
    return {
        "/".join(entry.key for entry in path): np.asarray(leaf) for path, leaf in paths
    }


@pytest.fixture(scope="module")
def start():
    rng = np.random.default_rng(0)
    return {name: rng.normal(0, 0.5, shape) for name, shape in SHAPES.items()}


@pytest.fixture(scope="module")
def gradients():
    """Growing from step to step: a clip norm in between acts on some of them only."""
    rng = np.random.default_rng(1)
    return [
        {name: (i + 1) * rng.normal(0, 0.1, shape) for name, shape in SHAPES.items()}
        for i in range(STEPS)
    ]


def train(chosen, start, gradients, plan=None):
    plan = plan or schedule()
    transformation, _ = optim.create(chosen, plan, STEPS)
    params = nest(start)
    state = transformation.init(params)

    @jax.jit
    def update(params, state, gradient):
        updates, state = transformation.update(gradient, state, params)
        return jax.tree.map(jnp.add, params, updates), state

    for gradient in gradients:
        params, state = update(params, state, nest(gradient))
    return flatten(params)


def newton_schulz(matrix, steps):
    """As published: on the wide orientation, from a Frobenius norm of 1."""
    tall = matrix.shape[0] > matrix.shape[1]
    x = (matrix.T if tall else matrix) / np.sqrt((matrix**2).sum())
    for _ in range(steps):
        x = 3.4445 * x - 4.7750 * (x @ x.T) @ x + 2.0315 * (x @ x.T) @ (x @ x.T) @ x
    return x.T if tall else x


class Airbench:
    """airbench94_muon's two optimizers, float64: kernels are (out, in, *window)."""

    def __init__(self, keys):
        self.keys, self.buffers = keys, {}

    def muon(self, name, kernel, gradient, share):
        """Jordan et al. 2024; without `normalize`, as Liu et al. 2025 scale it."""
        keys, mu = self.keys, self.keys.momentum
        buffer = mu * self.buffers.get(name, 0.0) + gradient
        self.buffers[name] = buffer
        direction = gradient + mu * buffer if keys.nesterov else buffer
        matrix = direction.reshape(len(direction), -1)
        whitened = newton_schulz(matrix, keys.newton_schulz).reshape(kernel.shape)
        rate = keys.lr * share
        if keys.normalize:
            kernel = kernel * len(kernel) ** 0.5 / np.sqrt((kernel**2).sum())
            return kernel - rate * whitened
        whitened = 0.2 * np.sqrt(max(matrix.shape)) * whitened
        return kernel - rate * (whitened + keys.weight_decay * kernel)

    def sgd(self, name, leaf, gradient, peak, share):
        """torch.optim.SGD, Nesterov, with the weight decay wd / peak."""
        gradient = gradient + self.keys.weight_decay / peak * leaf
        mu, old = self.keys.rest_momentum, self.buffers.get(name)
        buffer = gradient if old is None else mu * old + gradient
        self.buffers[name] = buffer
        return leaf - peak * share * (gradient + mu * buffer)

    def train(self, start, gradients, shares):
        keys, params = self.keys, dict(start)
        until = keys.whiten_until * STEPS
        for t, (gradient, share) in enumerate(zip(gradients, shares, strict=True)):
            norm = np.sqrt(sum((leaf**2).sum() for leaf in gradient.values()))
            factor = min(1, keys.clip_norm / norm) if keys.clip_norm else 1
            for name, leaf in params.items():
                g = gradient[name] * factor
                if name in KERNELS:
                    turned = [np.moveaxis(a, (-1, -2), (0, 1)) for a in (leaf, g)]
                    new = self.muon(name, *turned, share)
                    params[name] = np.moveaxis(new, (0, 1), (-1, -2))
                elif "whiten" in name:
                    # Learns for a part of the run only.
                    early = max(1 - t / until, 0)
                    params[name] = self.sgd(name, leaf, g, keys.bias_lr, early)
                else:
                    peak = keys.head_lr if "head" in name else keys.bias_lr
                    params[name] = self.sgd(name, leaf, g, peak, share)
        return params


LINE = [1 - t / STEPS for t in range(STEPS)]


@pytest.mark.parametrize(
    ("changes", "plan", "shares"),
    [
        ({}, schedule(), LINE),
        ({"nesterov": False, "clip_norm": 4.0}, schedule(), LINE),
        ({"normalize": False, "newton_schulz": 5}, schedule(), LINE),
        (
            {"normalize": False, "weight_decay": 0.0, "whiten_until": 1.0},
            schedule("step", steps=(0.5,), factor=0.3),
            [1.0] * 4 + [0.3] * 4,
        ),
    ],
    ids=["airbench", "clipped", "decoupled", "without decay"],
)
def test_updates_are_the_published_ones(changes, plan, shares, start, gradients):
    norms = [np.sqrt(sum((g**2).sum() for g in tree.values())) for tree in gradients]
    assert min(norms) < 4.0 < max(norms)  # or else clipping is not tested
    chosen = optimizer(**changes)
    ours = train(chosen, start, gradients, plan)
    expected = Airbench(chosen).train(start, gradients, shares)
    assert ours.keys() == expected.keys()
    for name in ours:
        moved = np.abs(expected[name] - start[name]).max()
        assert moved > 1e-3
        np.testing.assert_allclose(
            ours[name], expected[name], rtol=0, atol=3e-4 * moved, err_msg=name
        )


def test_normalized_kernels_have_a_norm_of_the_root_of_their_features(start, gradients):
    """Before the step is taken: at a rate of zero that is all that happens."""
    ours = train(optimizer(lr=0.0), start, gradients[:2])
    for name, leaf in ours.items():
        if name in KERNELS:
            norm = np.sqrt((start[name] ** 2).sum())
            wanted = start[name] * np.sqrt(leaf.shape[-1]) / norm
            np.testing.assert_allclose(leaf, wanted, rtol=1e-5, atol=1e-6)
        elif "whiten" not in name:
            # What follows the rate of the kernels stands still with it.
            np.testing.assert_array_equal(leaf, start[name].astype(np.float32), name)


def test_a_rate_of_zero_stands_still(start, gradients):
    chosen = optimizer(head_lr=0.0, bias_lr=0.0)
    ours = train(chosen, start, gradients)
    for name in SHAPES:
        still = np.array_equal(ours[name], start[name].astype(np.float32))
        assert still == (name not in KERNELS), name


def test_the_whitening_bias_stops_when_its_time_is_over(start, gradients):
    name = "base/stem/whiten/bias"
    trail = [train(optimizer(), start, gradients[:n])[name] for n in (2, 3, 4, 8)]
    assert not np.array_equal(trail[0], trail[1])
    np.testing.assert_array_equal(trail[1], trail[2])
    np.testing.assert_array_equal(trail[1], trail[3])


@pytest.mark.parametrize("until", [0.0, 0.375, 0.4])
def test_it_is_settled_from_the_first_step_that_does_not_move_it(
    until, start, gradients
):
    chosen, name = optimizer(whiten_until=until), "base/stem/whiten/bias"
    step, settled = optim.settled(chosen, STEPS, SHAPES)
    assert settled == {name}
    counts = step - 1, step, STEPS
    trail = [train(chosen, start, gradients[:n])[name] for n in counts]
    assert not np.array_equal(trail[0], trail[1])
    np.testing.assert_array_equal(trail[1], trail[2])


@pytest.mark.parametrize(
    ("changes", "paths"),
    [
        ({"name": "sgd"}, SHAPES),
        ({"whiten_until": 1.0}, SHAPES),
        ({}, ["base/whitening/bias", "head/logits/kernel"]),
    ],
)
def test_nothing_settles(changes, paths):
    assert optim.settled(optimizer(**changes), STEPS, paths) == (0, frozenset())


def test_moves_along_the_polar_factor(start, gradients):
    """One step: the momentum's singular vectors, with singular values near 1."""
    name = "base/group1/conv1/kernel"
    chosen = optimizer(normalize=False, newton_schulz=5, weight_decay=0.0, lr=1.0)
    ours = train(chosen, start, gradients[:1], schedule("constant"))
    gradient = gradients[0][name].reshape(-1, SHAPES[name][-1])
    step = (start[name] - ours[name]).reshape(gradient.shape)
    step /= 0.2 * np.sqrt(max(gradient.shape))
    u, _, vt = np.linalg.svd(gradient, full_matrices=False)
    turned = u.T @ step @ vt.T
    values = np.diag(turned)
    assert 0.65 < values.min() and values.max() < 1.25
    np.testing.assert_allclose(turned, np.diag(values), atol=1e-4)


# Newton and Schulz.


@pytest.mark.parametrize("steps", [1, 3, 5])
@pytest.mark.parametrize("shape", [(12, 5), (5, 12), (6, 6)])
def test_orthogonalize_changes_singular_values_alone(shape, steps):
    rng = np.random.default_rng(2)
    stack = rng.normal(size=(3, *shape)).astype(np.float32)
    stack[1] = 0
    ours = np.asarray(muon.orthogonalize(jnp.asarray(stack), steps))
    assert ours.shape == stack.shape and ours.dtype == np.float32
    for found, matrix in zip(ours[::2], stack[::2].astype(np.float64), strict=True):
        u, values, vt = np.linalg.svd(matrix, full_matrices=False)
        values /= np.sqrt((values**2).sum())
        for _ in range(steps):
            values = 3.4445 * values - 4.775 * values**3 + 2.0315 * values**5
        np.testing.assert_allclose(found, u * values @ vt, atol=3e-5)
    np.testing.assert_array_equal(ours[1], 0)
    padded = np.pad(stack, ((0, 0), (0, 4), (0, 9)))  # which may turn it, too
    found = np.asarray(muon.orthogonalize(jnp.asarray(padded), steps))
    np.testing.assert_allclose(found[:, : shape[0], : shape[1]], ours, atol=1e-5)
    assert not found[:, shape[0] :].any() and not found[..., shape[1] :].any()


def test_three_steps_leave_small_singular_values_smaller():
    values = np.array([1.0, 0.1, 0.01, 0.001])
    for steps, low in ((3, 0.03), (5, 0.6)):
        found = muon.orthogonalize(jnp.diag(jnp.asarray(values, jnp.float32)), steps)
        ends = np.diag(np.asarray(found))
        assert low < ends[2] and ends[:2].min() > 0.5 and ends.max() < 1.25
    assert ends[3] < 0.6


def test_an_accelerator_computes_in_bfloat16_and_pads(start, gradients, monkeypatch):
    exact = train(optimizer(), start, gradients[:3])
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert "bf16[" in str(
        jax.make_jaxpr(muon.orthogonalize, static_argnums=1)(jnp.ones((4, 3)), 3)
    )
    ours = train(optimizer(), start, gradients[:3])
    for name in SHAPES:
        moved = np.abs(exact[name] - start[name]).max()
        error = np.abs(ours[name] - exact[name]).max() / moved
        assert error < (0.02 if name in KERNELS else 1e-6), name
        assert (error > 0) == (name in KERNELS)


# Stacks.


@pytest.mark.parametrize(
    ("padded", "want"),
    [
        (1.0, [((4, 4), [1, 3]), ((2, 3), [0, 2])]),
        # 3 * 16 numbers for 38 is 1.26 times as many, 4 * 16 for 44 is 1.45.
        (1.3, [((4, 4), [1, 3, 0]), ((2, 3), [2])]),
        (1.5, [((4, 4), [1, 3, 0, 2])]),
    ],
)
def test_stacks_pad_no_more_than_allowed(padded, want):
    assert muon.stacks([(2, 3), (4, 4), (2, 3), (4, 4)], padded) == want


def test_stacks_hold_each_matrix_once():
    rng = np.random.default_rng(3)
    shapes = [tuple(side) for side in rng.integers(1, 40, (30, 2)).tolist()]
    sizes = []
    for padded in (1.0, 2.0, 8.0, 1e9):
        found = muon.stacks(shapes, padded)
        sizes.append(len(found))
        places = [place for _, group in found for place in group]
        assert sorted(places) == list(range(30))
        for (rows, columns), group in found:
            inside = [shapes[place] for place in group]
            assert (rows, columns) == tuple(map(max, zip(*inside, strict=True)))
            numbers = sum(r * c for r, c in inside)
            assert rows * columns * len(group) <= padded * numbers
    assert sizes[0] == len(set(shapes)) > sizes[1] >= sizes[2] >= sizes[3] == 1
    assert muon.stacks([], 2.0) == []


def test_padded_stacks_give_the_same(start, gradients, monkeypatch):
    shapes = [tuple(np.reshape(start[n], (-1, SHAPES[n][-1])).shape) for n in KERNELS]
    assert len(muon.stacks(shapes, 1.0)) == 4
    alone = train(optimizer(), start, gradients[:3])
    for limit in (2.0, 1e9):
        assert len(muon.stacks(shapes, limit)) < 4
        monkeypatch.setattr(muon, "_PADDED", {jax.default_backend(): limit})
        together = train(optimizer(), start, gradients[:3])
        for name in SHAPES:
            np.testing.assert_allclose(
                together[name], alone[name], rtol=1e-5, atol=2e-6, err_msg=name
            )


def test_the_state_holds_all_that_depends_on_time(start, gradients):
    """Split while the whitening still learns, passed on as arrays: the same bits."""
    params = nest(start)
    whole, _ = optim.create(optimizer(), schedule(), STEPS)
    state = whole.init(params)
    trail = []
    for gradient in gradients[:3]:
        trail.append((params, state))
        updates, state = whole.update(nest(gradient), state, params)
        params = jax.tree.map(jnp.add, params, updates)
    resumed, saved = jax.tree.map(np.asarray, trail[1])
    again, _ = optim.create(optimizer(), schedule(), STEPS)
    for gradient in gradients[1:3]:
        updates, saved = again.update(nest(gradient), saved, resumed)
        resumed = jax.tree.map(jnp.add, resumed, updates)
    jax.tree.map(np.testing.assert_array_equal, resumed, params)
